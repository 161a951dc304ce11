"""Certifies a machine: computes the same values in many ways and compares every bit."""

from pathlib import Path

from tqdm import tqdm

from jaxdet import certificates
from jaxdet.baseline import Baseline
from jaxdet.checkpoints import open_checkpoint
from jaxdet.engine.larger_tiles import described
from jaxdet.llm import LLM
from jaxdet.models.registry import family_of
from jaxdet.verify.cases import SEGMENTS, long_case, request_cases, restart_case, step_cases
from jaxdet.verify.control import control_cases
from jaxdet.verify.probe import MODEL_LEN, POOL, ROOM, Probe
from jaxdet.verify.report import Case, Report, environment
from jaxdet.verify.restart import reference_digest
from jaxdet.verify.several_steps import several_steps_case

__all__ = ["Case", "Report", "verify"]


def verify(
    model: str | Path, *, dtype: str = "auto", backend: str | None = None, progress: bool = True
) -> Report:
    """Runs every case of promises I1–I4 on this machine, and the same through plain jitted JAX.

    What it found is kept: an engine with this model, backend and dtype says at its start if values differed here.

    Args:
        model: as for `LLM`; its context must hold 512 tokens.
        dtype, backend: as for `LLM`.
        progress: show a progress bar.

    Raises:
        ValueError, FileNotFoundError: the model can't be loaded, see `LLM`.
    """
    checkpoint = open_checkpoint(model, check_config=family_of)
    limit = family_of(checkpoint.config).read_config(checkpoint.config).max_position
    llm = LLM(
        model,
        dtype=dtype,
        backend=backend,
        max_model_len=max(ROOM, min(MODEL_LEN, limit)),
        num_pages=POOL,
        compile_at_start=False,  # few of its programs run
        keep_logits=True,
    )
    probe = Probe(llm.engine.step_fn)
    with tqdm(
        desc="Verifying", unit="case", total=19 + (probe.step.backend in SEGMENTS), disable=not progress
    ) as bar:

        def run(cases):
            for case in cases:
                bar.set_postfix_str(f"{case.promise} {case.name}")
                bar.update()
                yield case

        digest = reference_digest(probe)
        cases = [
            *run(step_cases(probe)),
            *run(long_case(probe.step, llm.engine.max_model_len)),
            *run([several_steps_case(probe)]),
        ]
        cases += run(request_cases(llm, probe.tokens))
        cases += run([restart_case(str(model), llm.dtype, backend, digest)])
        plain = Baseline(checkpoint, dtype=llm.dtype, max_model_len=ROOM)
        control = list(run(control_cases(plain, probe.tokens)))
    cases.sort(key=lambda case: case.promise)
    used, tiles = llm.engine.step_fn.backend, described(llm.engine.step_fn.tiles)
    compared, differing = (sum(getattr(case, name) for case in cases) for name in ("compared", "differing"))
    certificates.keep(llm.name, used, llm.dtype, compared=compared, differing=differing, tiles=tiles)
    facts = environment(used, llm.dtype) | {"larger_tiles": tiles}
    return Report(llm.name, digest, cases, control, facts)
