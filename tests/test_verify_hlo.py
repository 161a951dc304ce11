"""The lint passes the model's compiled step, and names what is planted into it."""

import functools
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from rich.console import Console

from jaxdet.cli import main
from jaxdet.engine.buckets import Bucket
from jaxdet.engine.packed import layout_of, pack
from jaxdet.engine.step import _decode
from jaxdet.engine.wanted import _batch, _sampling_rows
from jaxdet.llm import LLM
from jaxdet.models.layers import Batch
from jaxdet.sampling_params import SamplingParams
from jaxdet.testing import COMMON, FAMILIES, random_model, write_tiny_model
from jaxdet.verify.hlo import Report, copies, dots, lint, lint_step
from jaxdet.verify.hlo_module import Program
from pallas_kernels.backend import rows_are_free
from pallas_kernels.reduce import pin

PAGES = 64
BUCKETS = {
    "decode 1": Bucket(1, 0, 0),
    "decode 8": Bucket(8, 0, 0),
    "prefill 128": Bucket(0, 128, 8),
    "mixed 8 + 128": Bucket(8, 128, 8),
}
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "vocab_size": 512}
HERE = "tests/test_verify_hlo.py"


def lowered(
    family, buckets, *, plant=None, dtype=jnp.float32, backend="xla", donate="cache", platform=None, **config
):
    """The model's step for each bucket; `plant(hidden, square, large)` gets a [64, 64] and a 2 MB argument."""
    config = {"model_type": family} | COMMON | FAMILIES[family] | config
    model = random_model(config, dtype=dtype, backend=backend, max_model_len=512)
    graph, state = nnx.split(model)
    c = model.config
    pages = jax.ShapeDtypeStruct((PAGES, c.num_kv_heads, 128, c.head_dim), dtype)
    cache = [(pages, pages)] * c.num_layers
    arguments = jax.ShapeDtypeStruct((64, 64), dtype), jax.ShapeDtypeStruct((512, 1024), jnp.float32)

    @functools.partial(jax.jit, donate_argnames=donate)
    def step(state, cache, batch, square, large):
        model = nnx.merge(graph, state)
        hidden, cache = model(batch, cache)
        last = hidden.at[batch.last_rows()].get(mode="promise_in_bounds")
        return model.logits(last), cache, plant and plant(pin(hidden), square, large)

    def batch(bucket):
        tokens, rows, seqs = (bucket.rows + bucket.tokens,), bucket.rows, bucket.seqs
        shapes = tokens, tokens, tokens, (rows, 4), (rows,), (seqs, 4), (seqs + 1,), (seqs,)
        return Batch(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes))

    lower = functools.partial(step.trace, state, cache)
    platforms = {"lowering_platforms": (platform,)} if platform else {}
    return {name: lower(batch(BUCKETS[name]), *arguments).lower(**platforms) for name in buckets}


def several_steps(family, names, *, dtype=jnp.float32, backend="xla", donate=(1, 2), platform=None, **config):
    """The programs of several decode steps, such as "8 sampled" or "8 greedy" for eight rows."""
    config = {"model_type": family} | COMMON | FAMILIES[family] | config
    model = random_model(config, dtype=dtype, backend=backend, max_model_len=512)
    graph, state = nnx.split(model)
    weights, tree = jax.tree.flatten(state)
    c = model.config
    pages = jax.ShapeDtypeStruct((PAGES, c.num_kv_heads, 128, c.head_dim), dtype)
    cache = [(pages, pages)] * c.num_layers
    platforms = {"lowering_platforms": (platform,)} if platform else {}
    programs = {}
    for name in names:
        size, kind = int(name.split()[0]), name.split()[1]
        ints = jax.ShapeDtypeStruct((size,), jnp.int32)
        rows = _sampling_rows(size) if kind == "sampled" else None
        told = ints, _batch(Bucket(size, 0, 0), 4), ints, rows, ints
        steps = functools.partial(_decode, graph, tree, backend, layout=layout_of(told), steps=4)
        traced = jax.jit(steps, donate_argnums=donate).trace(weights, cache, ints, pack(told))
        programs[name] = traced.lower(**platforms)
    return programs


def compiled(*args, **kwargs):
    return {name: program.compile() for name, program in lowered(*args, **kwargs).items()}


def text(programs):
    """Unoptimised HLO, with the source of every op."""
    return {name: program.as_text("hlo", debug_info=True) for name, program in programs.items()}


def said(report: Report) -> str:
    return "\n".join(f"{name}: {finding}" for name, finding in report.findings)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_steps_of_the_xla_backend_are_clean(family):
    report = lint(compiled(family, BUCKETS), "xla")
    assert report.ok, said(report)
    assert all(len(p.ops) > 500 and any(op.opcode == "dot" for op in p.ops) for p in report.programs.values())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_no_rounding_is_left_to_xla(family):
    report = lint(text(lowered(family, ["decode 8", "prefill 128"], dtype=jnp.bfloat16)), "xla")
    assert report.ok, said(report)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_several_steps_are_clean(family):
    """Their cache goes round a loop, and is written in place all the same."""
    names = ["1 greedy", "1 sampled", "8 greedy", "8 sampled"]
    programs = {name: program.compile() for name, program in several_steps(family, names).items()}
    report = lint(programs, "xla")
    assert report.ok, said(report)
    for program in report.programs.values():
        assert any(op.opcode == "while" for op in program.ops)
        assert sum(op.source.startswith("cache") and op.opcode == "parameter" for op in program.ops) == 4
    kept = several_steps(family, ["8 greedy"], donate=2)["8 greedy"].compile()
    found = [str(f) for _, f in lint(programs | {"8 greedy": kept}, "xla").findings]
    assert sum("not written in the place" in why for why in found) == 4


@pytest.fixture
def fixed_tiles(monkeypatch):
    """As on a device whose dots are not proven free of the row count."""
    jax.clear_caches()
    for module in ("pallas_kernels.matmul.xla", "pallas_kernels.attention.xla", "jaxdet.verify.hlo"):
        monkeypatch.setattr(f"{module}.rows_are_free", lambda: False)
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("fixed_tiles")
def test_tiles_of_fixed_shape_are_clean():
    report = lint(compiled("llama", BUCKETS, num_hidden_layers=1), "xla")
    assert report.ok, said(report)
    plant = lambda h, square, _: jnp.dot(h, square, precision="highest")  # noqa: E731
    report = lint(
        text(lowered("llama", ["decode 1", "prefill 128"], plant=plant, num_hidden_layers=1)), "xla"
    )
    assert {name for name, _ in report.findings} == {"decode 1", "prefill 128"}
    assert all("lacks" in finding.why and HERE in finding.op.source for _, finding in report.findings)


PLANTS = {
    "jnp.sum": (lambda h, square, large: jnp.sum(h, axis=1), "reduces floats"),
    "x.mean()": (lambda h, square, large: h.mean(), "reduces floats"),
    "cumsum": (lambda h, square, large: jnp.cumsum(h, axis=1), "order of XLA's choice"),
    "scatter-add": (
        lambda h, square, large: square.at[jnp.zeros(len(h), jnp.int32)].add(h),
        "reduces floats",
    ),
    "jnp.dot": (lambda h, square, large: jnp.dot(h, square), "states no precision"),
    "precise dot": (
        lambda h, square, large: jnp.dot(h, square[:, :9], precision="highest"),
        "depend on the rows",
    ),
    "product and sum": (lambda h, square, large: h * square[0] + square[1], "contract"),
    "2 MB transpose": (lambda h, square, large: large.T, "copies 2.0 MB"),
    "2 MB slice": (lambda h, square, large: lax.rev(large, (0,)), "copies 2.0 MB"),
    "2 MB cast": (lambda h, square, large: large.astype(jnp.bfloat16), "copies 1.0 MB"),
}


def assert_names(report: Report, why: str) -> None:
    """What is planted is named for `why`, by its line or, where XLA forgets that, by its operation; nothing else is."""
    found = [finding.op.source for _, finding in report.findings if why in finding.why]
    assert found and all(HERE in source or " at " not in source for source in found), said(report)
    assert "jaxdet/" not in said(report) and "pallas_kernels/" not in said(report)


@pytest.mark.parametrize("name", PLANTS)
def test_names_what_is_planted(name):
    plant, why = PLANTS[name]
    if name == "precise dot" and not rows_are_free():
        pytest.skip(
            "where every dot has fixed rows, it is compared with other programs' dots: see the test of those"
        )
    assert_names(lint(compiled("llama", ["decode 8"], plant=plant, num_hidden_layers=1), "xla"), why)


def test_names_a_cache_that_is_not_written_in_place():
    found = [str(f) for _, f in lint(compiled("llama", ["decode 8"], donate=()), "xla").findings]
    assert sum("not written in the place" in why for why in found) == 4  # two layers' keys and values


def test_names_a_cache_that_is_copied_because_the_old_one_is_still_read():
    @functools.partial(jax.jit, donate_argnums=0)
    def write(cache, at):
        new = cache.at[at].set(1.0)
        return new, new[0] + pin(cache[at])

    page, at = jax.ShapeDtypeStruct((PAGES, 2, 128, 16), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    found = list(copies(Program(write.lower(page, at).compile().as_text())))
    assert {finding.op.opcode for finding in found} == {"copy"}


def test_names_a_dot_that_one_bucket_alone_has():
    plant = lambda h, square, _: jnp.dot(h[:, :48], square[:48], precision="highest")  # noqa: E731
    programs = compiled("llama", ["decode 1", "prefill 128"], num_hidden_layers=1) | compiled(
        "llama", ["decode 8"], plant=plant, num_hidden_layers=1
    )
    ((name, finding),) = lint(programs, "xla").findings
    assert name == "decode 8" and "decode 1, prefill 128 lacks" in finding.why and HERE in finding.op.source


MOSAIC = {"dtype": jnp.bfloat16, "backend": "mosaic_gpu", "platform": "cuda"} | WIDE


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_steps_of_the_gpu_backend_are_clean(family):
    report = lint(text(lowered(family, ["decode 8", "prefill 128"], **MOSAIC)), "mosaic_gpu")
    assert report.ok, said(report)
    for program in report.programs.values():
        assert sum(op.target.startswith("mosaic_gpu") for op in program.ops) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_several_steps_of_the_gpu_backend_are_clean(family):
    report = lint(text(several_steps(family, ["8 greedy", "8 sampled"], **MOSAIC)), "mosaic_gpu")
    assert report.ok, said(report)
    assert all("while" in {op.opcode for op in program.ops} for program in report.programs.values())


GPU_PLANTS = {
    "jnp.sum": PLANTS["jnp.sum"],
    "x.mean()": PLANTS["x.mean()"],
    "jnp.dot": (lambda h, square, large: h[:, :64] @ square, "order of XLA's choice"),
    "product and sum": (lambda h, square, large: h[:, :64] * square[0] + square[1], "contract"),
    "two roundings": (lambda h, square, large: jnp.exp(h) / 3, "leave out that rounding"),
}


@pytest.mark.parametrize("name", GPU_PLANTS)
def test_names_what_is_planted_beside_the_gpu_kernels(name):
    plant, why = GPU_PLANTS[name]
    assert_names(
        lint(text(lowered("llama", ["decode 8"], plant=plant, num_hidden_layers=1, **MOSAIC)), "mosaic_gpu"),
        why,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_the_gpu_runs_is_clean(family):
    config = WIDE | {"head_dim": 128, "hidden_size": 1024}
    report = lint(compiled(family, BUCKETS, dtype=jnp.bfloat16, backend="mosaic_gpu", **config), "mosaic_gpu")
    assert report.ok, said(report)
    assert all(any(op.target.startswith("mosaic_gpu") for op in p.ops) for p in report.programs.values())


CUBLAS = """HloModule jit_f, is_scheduled=true

ENTRY %main (x: f32[8,512], w: f32[512,64]) -> f32[8,64] {
  %x = f32[8,512]{1,0} parameter(0)
  %w = f32[512,64]{1,0} parameter(1)
  %gemm = (f32[8,64]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", \
metadata={op_name="jit(f)/dot_general" source_file="/a/b/f.py" source_line=3}, backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],\
"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"precision_config":{"operand_precision":["PRECISION","PRECISION"]}}}
  ROOT %y = f32[8,64]{1,0} get-tuple-element(%gemm), index=0
}
"""


@pytest.mark.parametrize("precision", ["DEFAULT", "HIGHEST"])
def test_reads_the_dots_that_cublas_computes(precision):
    program = Program(CUBLAS.replace("PRECISION", precision))
    ((op, dot),) = dots(program)
    assert op.name == "gemm"
    assert dot == (1, 8, 512, 64, ("f32", "f32", "f32"))
    report = lint({"one": CUBLAS.replace("PRECISION", precision)}, "xla")
    assert report.ok == (precision == "HIGHEST"), said(report)
    assert "no kernel of ours" in said(lint({"one": CUBLAS}, "mosaic_gpu"))


def test_the_report_names_programs_and_findings():
    console = Console(record=True, width=200)
    console.print(lint({"decode 8": CUBLAS}, "mosaic_gpu").render())
    shown = console.export_text()
    assert "decode 8" in shown and "__cublas$gemm" in shown and "NOT pinned: 1 finding" in shown
    assert not lint({}, "xla").ok


def test_refuses_what_is_no_hlo():
    with pytest.raises(ValueError, match="as_text"):
        lint({"one": "module @jit_f {}"}, "xla")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=1)


def test_every_program_that_the_engine_ran_is_clean(tiny):
    llm = LLM(tiny, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=256)
    params = SamplingParams(temperature=1, top_p=0.9, repetition_penalty=1.1, max_tokens=4, prompt_logprobs=1)
    llm.generate(["a prompt", "another one"], params, use_tqdm=False)
    report = lint_step(llm.engine.step_fn)
    assert report.ok, said(report)
    assert {name.split()[0] for name in report.programs} >= {"model", "draw", "adjust", "score"}
    for name, program in report.programs.items():
        if name.startswith("model"):
            assert sum(op.source.startswith("cache") and op.opcode == "parameter" for op in program.ops) == 2
            assert len(program.aliased) == 2


CARRIED = """HloModule jit_f, is_scheduled=true

ENTRY %main (w: f32[4096,2048], x: f32[4096,2048], n: s32[]) -> f32[2048,4096] {
  %w = f32[4096,2048]{1,0} parameter(0), metadata={op_name="state['w']"}
  %x = f32[4096,2048]{1,0} parameter(1), metadata={op_name="x"}
  %n = s32[] parameter(2), metadata={op_name="n"}
  %t = (s32[], f32[4096,2048]{1,0}, f32[4096,2048]{1,0}) tuple(%n, %w, %x)
  %c = (s32[], f32[4096,2048]{1,0}, f32[4096,2048]{1,0}) CARRIER(%t)
  %g = f32[4096,2048]{1,0} get-tuple-element(%c), index=INDEX
  ROOT %y = f32[2048,4096]{1,0} transpose(%g), dimensions={1,0}
}
"""


@pytest.mark.parametrize("carrier", ["while", "opt-barrier"])
@pytest.mark.parametrize(("index", "weight"), [(1, True), (2, False)])
def test_on_tpus_a_copy_counts_if_it_is_of_what_stays(carrier, index, weight):
    """A weight, also once a loop or a barrier has carried it; a step's own values may be moved there, not elsewhere."""
    text = CARRIED.replace("CARRIER", carrier).replace("INDEX", str(index))
    assert bool(lint({"f": text}, "mosaic_tpu").findings) == weight
    assert lint({"f": text}, "mosaic_gpu").findings


def test_the_command_lints_what_it_compiles(tiny, monkeypatch, capsys):
    """With few buckets, for time's sake; then with a plain sum in the place of a kernel's.

    Several steps in one dispatch are among them, though no engine on a CPU takes them by itself.
    """
    monkeypatch.setattr("jaxdet.engine.buckets.Buckets.rows", [8])
    monkeypatch.setattr("jaxdet.engine.buckets.Buckets.all", lambda _: [Bucket(1, 0, 0), Bucket(8, 32, 8)])
    monkeypatch.setattr(sys, "argv", ["jaxdet", "verify", str(tiny), "--hlo"])

    def run():
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, " ".join(capsys.readouterr().out.split())

    code, shown = run()
    assert code == 0 and "clean: " in shown and "decode ((8, " in shown, shown
    jax.clear_caches()
    monkeypatch.setattr("pallas_kernels.rms_norm.xla.row_sum", lambda x: jnp.sum(x, axis=1, keepdims=True))
    code, shown = run()
    jax.clear_caches()
    assert code == 1 and "reduces floats" in shown, shown
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and "leave them out, or --hlo" in capsys.readouterr().err
