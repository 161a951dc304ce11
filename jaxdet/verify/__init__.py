"""Certifies a machine: computes the same values in many ways and compares every bit."""

from pathlib import Path

from tqdm import tqdm

from jaxdet import certificates
from jaxdet.baseline import Baseline
from jaxdet.checkpoints import open_checkpoint
from jaxdet.engine.larger_tiles import described
from jaxdet.llm import LLM
from jaxdet.verify.cases import SEGMENTS, long_case, request_cases, restart_case, step_cases
from jaxdet.verify.control import control_cases
from jaxdet.verify.probe import MODEL_LEN, POOL, Probe
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
        model: as for `LLM`; its context must hold 1152 tokens.
        dtype, backend: as for `LLM`.
        progress: show a progress bar.

    Raises:
        ValueError, FileNotFoundError: the model can't be loaded, see `LLM`.
    """
    llm = LLM(
        model,
        dtype=dtype,
        backend=backend,
        max_model_len=MODEL_LEN,
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
        cases = [*run(step_cases(probe)), *run(long_case(probe.step)), *run([several_steps_case(probe)])]
        cases += run(request_cases(llm, probe.tokens))
        cases += run([restart_case(str(model), llm.dtype, backend, digest)])
        plain = Baseline(open_checkpoint(model), dtype=llm.dtype, max_model_len=MODEL_LEN)
        control = list(run(control_cases(plain, probe.tokens)))
    cases.sort(key=lambda case: case.promise)
    used, tiles = llm.engine.step_fn.backend, described(llm.engine.step_fn.tiles)
    compared, differing = (sum(getattr(case, name) for case in cases) for name in ("compared", "differing"))
    certificates.keep(llm.name, used, llm.dtype, compared=compared, differing=differing, tiles=tiles)
    facts = environment(used, llm.dtype) | {"larger_tiles": tiles}
    return Report(llm.name, digest, cases, control, facts)
