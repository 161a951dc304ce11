"""The roofline's arithmetic against cases worked out by hand, its blocks against the kernels' own; `jaxdet bench`."""

import dataclasses
import itertools
import json
import sys

import jax
import pytest
import roofline
import tpu_programs
from jax.extend.core import jaxprs_in_params

from jaxdet import bench, testing
from jaxdet.cli import main
from jaxdet.models.registry import family_of
from jaxdet.roofline import needed, sm90, tpu
from jaxdet.roofline.chips import CHIPS, chip_of
from jaxdet.roofline.kernel import Dots, Kernel
from jaxdet.roofline.step import BACKENDS, Decode, Estimate, Prefill, expect, kernels, needed_work
from jaxdet.testing import COMMON, FAMILIES, write_tiny_model
from pallas_kernels.rms_norm.mosaic_tpu import TILE
from pallas_kernels.tiles_tpu import VMEM_LIMIT

BF16 = "bfloat16"
CHIP = {chip.name: chip for chip in CHIPS}
V5E, V6E = CHIP["v5e"], CHIP["v6e"]


def config_of(raw):
    return family_of(raw).read_config(raw)


SMOLLM2, QWEN3 = config_of(testing.SMOLLM2), config_of(testing.QWEN3_8B)


def grids(program) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    """Of every Pallas call that a program traces to: its grid and the shapes of its blocks."""
    found = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                mapping = equation.params["grid_mapping"]
                blocks = [b.block_aval.shape for b in mapping.block_mappings]
                found.append((mapping.grid, blocks))
                continue
            for inner in jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(program.function)(*program.operands).jaxpr)
    return found


def test_one_matmul_by_hand():
    """3 × 4096 × 1000 in bfloat16: K makes two blocks of 2048, N is stored as 1024 columns, the rows fill a tile."""
    kernel = tpu.matmul("x", 3, 4096, 1000, BF16)
    assert kernel.flops == 2 * 3 * 4096 * 1000
    assert kernel.bytes == 2 * (3 * 4096 + 4096 * 1024 + 3 * 1000)
    assert kernel.dots == (Dots(2 * 2, 128, 2048, 512),)
    estimate = Estimate(kernel, V5E)
    assert estimate.bound == "HBM"
    assert estimate.seconds == kernel.bytes / 819e9
    assert estimate.matrix_use == (3 * 1000) / (128 * 1024)
    assert V5E.seconds(kernel)["matrix"] == 2 * 128 * 4096 * 1024 / 197e12


def test_one_large_matmul_by_hand():
    """2048 × 4096 × 6144: 2 blocks of rows fetch the weights twice, 6 of columns fetch x, whose K is cut, 6 times."""
    kernel = tpu.matmul("x", 2048, 4096, 6144, BF16, residual=True)
    assert kernel.bytes == 2 * (6 * 2048 * 4096 + 2 * 4096 * 6144 + 2 * 2048 * 6144)
    assert Estimate(kernel, V5E).matrix_use == 1
    assert Estimate(kernel, V5E).bound == "matrix"
    assert Estimate(kernel, V5E).seconds == 2 * 2048 * 4096 * 6144 / 197e12
    assert Estimate(kernel, V6E).bound == "HBM"


def test_float32_takes_six_passes():
    one, six = (tpu.matmul("x", 8, 1280, 512, dtype).dots[0].count for dtype in (BF16, "float32"))
    assert (one, six) == (1, 6)


def test_one_decode_attention_by_hand():
    """4 sequences of 300 keys, 32 query and 8 KV heads of 128: 3 pages each, groups of 4 in sub-tiles of 64 rows."""
    kernel = tpu.decode(QWEN3, 4, 300, None, BF16)
    page = 2 * 8 * 128 * 128 * 2
    assert kernel.bytes == 4 * 3 * page + 2 * (4 * 8 * 16 * 128) * 2  # queries and outputs lie in 16 rows
    assert kernel.flops == 4 * 4 * 300 * 32 * 128
    assert kernel.dots == (Dots(4 * 3 * 8, 64, 128, 128),) * 2
    assert Estimate(kernel, V5E).matrix_use == kernel.flops / (4 * 4 * 3 * 8 * 64 * 128 * 128)
    assert Estimate(kernel, V6E).matrix_use == Estimate(kernel, V5E).matrix_use / 4  # half of each edge
    assert Estimate(kernel, V5E).bound == "HBM"
    windowed = tpu.decode(QWEN3, 4, 300, 100, BF16)  # keys 200 … 299, pages 1 and 2
    assert kernel.bytes - windowed.bytes == 4 * page
    assert windowed.flops == 4 * 4 * 100 * 32 * 128


def test_prefill_attention_meets_the_pages_that_it_sees():
    """256 tokens, 16 a sub-tile, 8 sub-tiles a tile: tiles fetch 1 + 2 pages, sub-tiles meet 8 · 1 + 8 · 2."""
    kernel = tpu.prefill(QWEN3, 256, None, BF16)
    assert tpu.prefill_tile(QWEN3, 256) == (8, 16, 64)
    assert kernel.dots[0].count == (8 + 16) * 8
    assert kernel.bytes == 3 * (2 * 8 * 128 * 128 * 2) + 6 * (256 * 32 * 128 * 2)
    assert kernel.flops == 4 * 32 * 128 * (256 * 257 // 2)
    assert tpu.prefill(QWEN3, 256, 256, BF16) == kernel
    assert tpu.prefill(QWEN3, 256, 1, BF16).dots[0].count == 16 * 8


@pytest.mark.parametrize(("rows", "padded"), [(1, 128), (128, 128), (129, 256), (300, 384), (1025, 2048)])
def test_rows_are_padded_to_tiles(rows, padded):
    (dots,) = tpu.matmul("x", rows, 256, 256, BF16).dots
    assert dots.count * dots.rows * dots.n == padded * 256
    assert Estimate(tpu.matmul("x", rows, 256, 256, BF16), V5E).matrix_use == rows / padded


def test_a_dot_is_padded_to_the_matrix_units_edge():
    kernel = Kernel(name="x", bytes=0, dots=(Dots(3, 5, 130, 100),))
    assert V5E.matrix_flops(kernel) == 3 * 2 * 8 * 256 * 128
    assert V6E.matrix_flops(kernel) == 3 * 2 * 8 * 256 * 256


def test_a_kernel_on_one_of_two_cores_takes_twice_as_long():
    kernel = tpu.decode(QWEN3, 4, 300, None, BF16)
    both = dataclasses.replace(kernel, one_core=False)
    for chip, ratio in ((CHIP["v5p"], 2), (V5E, 1)):
        assert Estimate(kernel, chip).seconds == pytest.approx(ratio * Estimate(both, chip).seconds)


MATMULS = [(1, 576, 960, 1), (64, 12288, 4096, 1), (300, 4096, 1024, 1), (2048, 4096, 6144, 1)]
MATMULS += [(3, 576, 1536, 2), (2048, 4096, 12288, 2), (130, 576, 200, 1)]


@pytest.mark.parametrize(("rows", "k", "n", "halves"), MATMULS)
def test_matmul_blocks_are_the_kernels_own(rows, k, n, halves):
    make = tpu_programs.gated_program if halves == 2 else tpu_programs.matmul_program
    ((grid, blocks),) = grids(make(rows, k, n))
    mine, block, _ = tpu.matmul_blocks(rows, k, n, BF16, halves)
    assert grid == mine
    assert blocks[1] == (halves, block[1], tpu.block_k(k, BF16))
    assert blocks[-1] == block


@pytest.mark.parametrize("config", [SMOLLM2, QWEN3], ids=["SmolLM2", "Qwen3"])
@pytest.mark.parametrize("tokens", [40, 1024])
def test_attention_tiles_are_the_kernels_own(config, tokens):
    heads, kv, dim = config.num_q_heads, config.num_kv_heads, config.head_dim
    subs, queries, rows = tpu.prefill_tile(config, tokens)
    (((tiles,), blocks),) = grids(tpu_programs.attention_program(tokens, heads, kv, dim))
    assert tiles == tokens // (subs * queries) + 8  # the program has 8 sequences
    assert blocks[0][:3] == (1, subs, kv) and blocks[1] == (rows, 128)
    (((tiles,), blocks),) = grids(tpu_programs.attention_program(tokens, heads, kv, dim, decode=True))
    assert (tiles, blocks[0]) == (tokens, (1, 1, kv, 16, dim))


def test_other_blocks_are_the_kernels_own():
    (((steps,), blocks),) = grids(tpu_programs.norm_program(300, 576))
    assert (steps, blocks[0]) == (3, (128, 576)) and TILE == 16
    (((steps,), blocks),) = grids(tpu_programs.rope_program(300, 32, 8, 128))
    assert (steps, blocks[0]) == (10, (32, 48 * 128))
    assert tpu.rope_cache(QWEN3, 300, BF16, scattered=True).blocks == "32 tokens, groups of 16 keys"
    (((steps,), blocks),) = grids(tpu_programs.sample_program(12, 49152 + 5))
    assert (steps, blocks[0]) == (2, (8, 49 * 1024))
    assert tpu.sample(12, 49152 + 5).blocks == f"8 × {49 * 1024}"


MOVES = {"broadcast_in_dim", "convert_element_type", "iota", "get", "swap", "jit", "bitcast_convert_type"}


def swept(program) -> int:
    """Elementwise operations on whole chunks of rows in a Pallas call, as often as its loops run them; one block's."""

    def visit(jaxpr) -> int:
        count = 0
        for equation in jaxpr.eqns:
            name, params = equation.primitive.name, equation.params
            inner = sum(visit(part) for part in jaxprs_in_params(params))
            count += inner * (params["length"] if name == "scan" else 1)
            whole = any(getattr(x.aval, "shape", None) == (8, 1024) for x in equation.outvars)
            if whole and not inner and name not in MOVES:
                count += 8 * 1024
        return count

    return visit(jax.make_jaxpr(program.function)(*program.operands).jaxpr)


@pytest.mark.parametrize("vocab", [3000, 49152])
def test_sampling_is_counted_as_the_kernels_compute_it(vocab):
    """Against the operations of their own programs: two halvings too few for both edges are more than two percent."""
    drawn = swept(tpu_programs.sample_program(8, vocab))
    assert tpu.draw(8, vocab).vector == pytest.approx(drawn, rel=0.02)
    logprobs = swept(tpu_programs.logprobs_program(8, vocab))
    assert tpu.token_logprobs(8, vocab)[0].vector == pytest.approx(logprobs, rel=0.2)


def test_one_drawn_token_by_hand():
    """3 × 1000: one block of 8 × 1024, 11 halvings for ids; parameters, keys and results are [8, 128] each."""
    kernel = tpu.draw(3, 1000)
    assert kernel.bytes == 4 * 3 * 1000 + 2 * 3 * (4 * 8 * 128)
    edge = 3 * 33 + 6 * 11 + 7
    assert kernel.vector == (6 + 6 + 2 * edge + 3 + 5 + 123) * 8 * 1024
    assert Estimate(kernel, V5E).bound == "vector"
    own, top = tpu.token_logprobs(3, 1000)
    assert own.bytes == kernel.bytes and own.vector == 22 * 8 * 1024
    assert top.bytes == 3 * (4 * 3 * 1000)
    assert tpu.draw(9, 1000).vector == 2 * kernel.vector


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_a_step_draws_and_looks_up_what_was_asked_for(chip):
    plain, drawn, logprobs = (
        expect(SMOLLM2, work, chip)
        for work in (Decode(8, 100), Decode(8, 100, drawn=True), Decode(8, 100, logprobs=True))
    )
    names = [{e.kernel.name for e in step.estimates} for step in (plain, drawn, logprobs)]
    assert names[1] - names[0] == {"sample, drawn"} and names[0] - names[1] == {"sample, greedy"}
    assert "token_logprobs" in names[2] - names[0] and names[0] < names[2]
    assert plain.seconds < min(drawn.seconds, logprobs.seconds)
    assert needed_work(SMOLLM2, logprobs.work, BF16) > needed_work(SMOLLM2, plain.work, BF16)
    assert [str(step.work) for step in (plain, drawn, logprobs)] == [
        "decode 8",
        "decode 8, drawn",
        "decode 8, logprobs",
    ]


def test_hopper_tiles_are_the_tuning_tables():
    kernel = sm90.matmul("x", 64, 4096, 6144, BF16)
    (dots,) = kernel.dots
    assert dots == Dots(6144 // dots.n, 64, 4096, dots.n)
    assert kernel.bytes == 2 * (64 * 4096 + 4096 * 6144 + 64 * 6144)
    decode = sm90.decode(QWEN3, 2, 300, None, BF16)  # 300 keys: 3 blocks of 128, of which 320 keys are loaded
    assert decode.dots == (Dots(2 * 8 * 3, 64, 128, 128),) * 2
    assert decode.bytes == 2 * (2 * 2 * 320 * 8 * 128 + 2 * 2 * 32 * 128)
    prefill = sm90.prefill(QWEN3, 256, None, BF16)  # four times 64 rows meet 1, 1, 2 and 2 blocks
    assert prefill.dots[0].count == 32 * 6


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("config", [SMOLLM2, QWEN3], ids=["SmolLM2", "Qwen3"])
def test_a_step_is_the_sum_of_its_kernels_and_grows_with_the_batch(chip, config):
    steps = [expect(config, Decode(rows, 1024), chip) for rows in (1, 2, 8, 64, 128, 129, 256, 1000)]
    for a, b in itertools.pairwise(steps):
        assert a.seconds < b.seconds and a.resident < b.resident
    rates = [step.tokens_per_second for step in steps if step.work.rows in (1, 2, 8, 64, 128)]
    assert rates == sorted(rates)
    asked = [Decode(64, 1024, drawn=True), Decode(64, 1024, logprobs=True), Prefill(2048)]
    for step in (*steps, *(expect(config, work, chip) for work in asked)):
        parts = [e.kernel.calls * max(chip.seconds(e.kernel).values()) for e in step.estimates]
        assert step.seconds == pytest.approx(sum(parts), rel=1e-12)
        assert sum(step.shares.values()) == pytest.approx(1)
        assert step.tokens_per_second == step.work.tokens / step.seconds
        # Blocks move and multiply no less than what is needed.
        moved, operations = needed_work(config, step.work, BF16)
        assert sum(e.kernel.calls * e.kernel.bytes for e in step.estimates) >= moved
        assert sum(e.kernel.calls * e.kernel.flops for e in step.estimates) == operations
        assert all(e.matrix_use is None or 0 < e.matrix_use <= 1 for e in step.estimates)
    assert expect(config, Prefill(1024), chip).seconds < expect(config, Prefill(2048), chip).seconds


def test_a_decode_step_reads_every_weight_once():
    moved, operations = needed_work(QWEN3, Decode(1, 1), BF16)
    layer = 4096 * (4096 + 2048) + 4096 * 4096 + 3 * 4096 * 12288
    products = 36 * layer + 4096 * 151936
    attention = 4 * 36 * 32 * 128
    assert operations == 2 * products + attention
    assert 2 * products < moved < 2.002 * products


def test_layers_with_windows_are_counted_apart():
    config = config_of({"model_type": "gemma3_text"} | COMMON | FAMILIES["gemma3_text"])
    calls = {k.name: k.calls for k in kernels(config, Decode(1, 200), needed, BF16)}
    assert calls["attention"] == calls["attention, window 70"] == 1
    assert (calls["rms_norm"], calls["add"]) == (8, 4)


def test_the_page_is_up_to_date():
    assert roofline.PAGE.read_text() == roofline.page(), "run python benchmarks/roofline.py"


def test_chips():
    assert chip_of("TPU v5 lite") is V5E and chip_of("cpu") is None
    assert all(chip.vmem >= VMEM_LIMIT for chip in CHIPS if chip.platform == "tpu")
    assert {chip.backend for chip in CHIPS} == set(BACKENDS)
    assert not expect(QWEN3, Decode(1, 1024), V5E).fits and expect(QWEN3, Decode(1, 1024), V6E).fits


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return write_tiny_model(folder / "tiny", max_position_embeddings=160), write_tiny_model(
        folder / "short", max_position_embeddings=64
    )


@pytest.fixture
def jaxdet(monkeypatch, capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["jaxdet", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_bench_measures_what_is_there(jaxdet, tiny, monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 1)
    code, out, err = jaxdet("bench", tiny[0], "--batch", 2, "--json")
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    steps = ["decode 2", "decode 2, drawn", "decode 2, logprobs"]
    assert [row["workload"] for row in rows] == [*steps, "prefill 159"]
    for row in rows:
        assert row["measured_ms"] > 0 and row["bytes_per_second"] > 0 and row["flops_per_second"] > 0
        assert "expected_ms" not in row  # no limits are known of a CPU
        tokens = int(row["workload"].split()[1].strip(","))
        assert row["tokens_per_second"] * row["measured_ms"] == pytest.approx(1000 * tokens)


def test_bench_without_the_device_says_what_is_expected(jaxdet, tiny):
    code, out, err = jaxdet("bench", tiny[0], "--device", "tpu")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "no TPU is here to measure: every figure is expected, not measured"
    assert "expected ms" in out and "measured ms" not in out
    code, out, err = jaxdet("bench", tiny[0], "--device", "tpu", "--json")
    assert (code, err.count("\n")) == (0, 1)
    rows = [json.loads(line) for line in out.splitlines()]
    assert {row["device"] for row in rows} == {"v5e", "v5p", "v6e", "7x"}
    for chip in ("v5e", "v5p", "v6e", "7x"):
        shown = {row["workload"]: row["expected_ms"] for row in rows if row["device"] == chip}
        assert shown["decode 8"] < min(shown["decode 8, drawn"], shown["decode 8, logprobs"])
    assert all(row["measured_ms"] is None and row["expected_is"] == "expected, not measured" for row in rows)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("TINY", "--batch", 0), "batch=0"),
        (("./gone",), "gone"),
        (("SHORT",), "takes 64; use another"),
        (("TINY", "--device", "gpu"), "head_dim=16"),
    ],
)
def test_bench_errors_are_one_line(jaxdet, tiny, arguments, says):
    code, out, err = jaxdet("bench", *({"TINY": tiny[0], "SHORT": tiny[1]}.get(a, a) for a in arguments))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("jaxdet: ") and says in err


def test_measured_stands_beside_expected(tiny, monkeypatch):
    """On a chip that is known: here this machine passes for one."""
    monkeypatch.setattr(bench, "_decode_seconds", lambda llm, work, rng: 3.0 if work.drawn else 1.0)
    monkeypatch.setattr(bench, "_prefill_seconds", lambda llm, tokens, rng: 2.0)
    fast = dataclasses.replace(V5E, backend="xla", kinds=(jax.devices()[0].device_kind,))
    monkeypatch.setattr(bench, "chip_of", lambda kind: fast if kind in fast.kinds else None)
    monkeypatch.setitem(BACKENDS, "xla", tpu)
    rows = bench.measure(str(tiny[0]), [1])
    assert [row["measured_ms"] for row in rows] == [1000, 3000, 1000, 2000]
    assert rows[0]["expected_ms"] < rows[1]["expected_ms"]
    assert all(0 < row["expected_ms"] < 1 for row in rows)
    headings = [str(column.header) for column in bench.render(rows).columns]
    assert {"measured ms", "expected ms", "measured / expected"} <= set(headings)
