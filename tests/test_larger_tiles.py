"""Larger tiles of the xla backend: proven on the device before they are used, and only those.

Here with small tiles, and as on a device whose dots are not free of the row count.
"""

import concurrent.futures
import functools
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxdet.engine import larger_tiles, lowered_cache, lowering
from jaxdet.engine.buckets import Bucket, Buckets
from jaxdet.engine.engine import Engine
from jaxdet.engine.larger_tiles import Trial, described, prove, trials
from jaxdet.engine.step import Step
from jaxdet.sampling_params import SamplingParams
from jaxdet.testing import COMMON, FAMILIES, random_model
from jaxdet.verify.hlo import dots, lint, lint_step
from jaxdet.verify.hlo_module import Program
from pallas_kernels import backend
from pallas_kernels.attention import xla as attention
from pallas_kernels.matmul import xla as matmul
from pallas_kernels.numerics import ROW_TILE
from pallas_kernels.proven import ATTENTION_GROUP, ATTENTION_TILE, BASE, Attention, Dot, Tiles, with_tiles
from pallas_kernels.reduce import pin

SIZES = 16, 32, 64
HEADS = Attention(4, 2, 16, "float32", None, None)


@pytest.fixture(autouse=True)
def fixed_tiles(monkeypatch):
    jax.clear_caches()
    for module in ("pallas_kernels.matmul.xla", "pallas_kernels.attention.xla", "jaxdet.verify.hlo"):
        monkeypatch.setattr(f"{module}.rows_are_free", lambda: False)
    monkeypatch.setattr(larger_tiles, "larger_row_tiles", lambda dtype: SIZES)
    yield
    jax.clear_caches()


def shapes_of(function, *arguments, tiles=BASE):
    """(batch, rows) of every dot."""
    text = jax.jit(with_tiles(tiles, function)).lower(*arguments).as_text("hlo", debug_info=True)
    return [dot[:2] for _, dot in dots(Program(text))]


def as_tiles(k, n, *rows, dtype="float32"):
    return Tiles(tuple(Dot(k, n, dtype, size) for size in rows))


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (1, [8]),
        (9, [16]),
        (17, [16, 8]),
        (57, [64]),
        (64, [64]),
        (90, [64, 16]),
        (128, [64]),
        (215, [64, 16, 8]),
    ],
)
def test_tiles_cover_all_rows_and_pad_less_than_a_base_tile(rows, sizes):
    """Products of small integers are exact, whatever the order."""
    rng = np.random.default_rng(rows)
    x, w = (jnp.asarray(rng.integers(-8, 9, shape), jnp.float32) for shape in ((rows, 24), (24, 40)))
    tiles = as_tiles(24, 40, 16, 64)
    product = functools.partial(matmul.dot, n=40)
    assert shapes_of(product, x, w, tiles=tiles) == [(1, size) for size in sizes]
    assert shapes_of(product, x, w) == [(1, ROW_TILE)]
    np.testing.assert_array_equal(jax.jit(with_tiles(tiles, product))(x, w), np.asarray(x) @ np.asarray(w))
    for other in (as_tiles(24, 48, 16), as_tiles(24, 40, 16, dtype="bfloat16")):
        assert shapes_of(product, x, w, tiles=other) == [(1, ROW_TILE)]


@pytest.mark.parametrize("sequences", [1, 2, 3])
def test_prompts_that_fill_larger_tiles_go_in_them(sequences):
    q = jnp.zeros((256, 4, 16))
    pages, table = jnp.zeros((4, 2, 128, 16)), jnp.zeros((sequences, 2), jnp.int32)
    starts, lens = jnp.zeros(sequences + 1, jnp.int32), jnp.zeros(sequences, jnp.int32)
    settings = {"scale": 1.0, "window": None, "soft_cap": None, "max_query_len": 256}
    call = functools.partial(attention.attention, **settings)
    base, larger = (2, ROW_TILE * 2), (2 * ATTENTION_GROUP, ATTENTION_TILE * 2)
    found = shapes_of(call, q, pages, pages, table, starts, lens, tiles=Tiles(attention=(HEADS,)))
    assert set(found) == {larger if sequences < 3 else base}
    windowed = Tiles(attention=(HEADS._replace(window=7),))
    assert set(shapes_of(call, q, pages, pages, table, starts, lens, tiles=windowed)) == {base}


def exact(x, y, dims):
    """A dot of one order, whatever its rows."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    if dims[0][1][0] == y.ndim - 1:
        y = jnp.swapaxes(y, -1, -2)
    return lax.fori_loop(
        0,
        y.shape[-2],
        lambda i, total: total + pin(x[..., i, None] * y[..., i, None, :]),
        jnp.zeros((*x.shape[:-1], y.shape[-1]), jnp.float32),
    )


def nudged(dot, *at, above):
    """`dot` with the value at `at` one bit off where there are more rows than `above`."""

    def call(x, w, dims):
        y = dot(x, w, dims)
        return y if y.shape[-2] <= above else y.at[at].set(jnp.nextafter(y[at], jnp.inf))

    return call


def proven(trial):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return trial.proven(pool.submit(trial.compiled))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dot_that_changes_one_bit_is_not_proven(dtype, monkeypatch):
    trial = larger_tiles._dots(48, 64, dtype, list(SIZES))
    monkeypatch.setattr(matmul, "dot_f32", exact)
    assert proven(trial) == list(trial.candidates)
    monkeypatch.setattr(matmul, "dot_f32", nudged(exact, 0, 21, above=32))
    assert proven(trial) == list(trial.candidates[:2])
    # One value a dot of 64 rows, of three; NaN where its row has one.
    first, second, third = (n for _, n in trial.differing(trial.compiled()))
    assert first == second == 0 < third <= 3
    monkeypatch.setattr(matmul, "dot_f32", nudged(exact, 0, 21, above=0))
    assert proven(trial) == []  # the base tiles' own rows are unlike in other places


def test_an_attention_that_changes_one_bit_is_not_proven(monkeypatch):
    trial = larger_tiles._attention(HEADS)
    monkeypatch.setattr(attention, "dot_f32", exact)
    assert proven(trial) == list(trial.candidates)
    monkeypatch.setattr(attention, "dot_f32", nudged(exact, 0, 0, 3, 5, above=64))
    assert proven(trial) == []


def test_the_users_search_for_nans_does_not_find_the_proofs_own():
    trial = larger_tiles._dots(24, 40, "float32", [16])
    with jax.debug_nans(True), jax.debug_infs(True):
        assert isinstance(prove(model_of(num_hidden_layers=1), [Bucket(16, 0, 0)]), Tiles)
        assert trial.differing(trial.compiled())[0][0] > 1000


def test_what_cannot_run_is_not_proven(caplog):
    def fails(seed):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    assert proven(Trial((as_tiles(24, 40, 16),), matmul.dot, fails)) == []
    assert "24 × 40 float32 in 16 rows: RESOURCE_EXHAUSTED" in caplog.text


def model_of(family="llama", **config):
    config = {"model_type": family} | COMMON | FAMILIES[family] | config
    return random_model(config, dtype=jnp.float32, backend="xla", max_model_len=512)


def test_what_no_step_fills_is_not_tried(monkeypatch):
    model, sliding = model_of(num_hidden_layers=1), model_of("gemma3_text")

    def tried(model, *buckets):
        return {described(*trial.candidates) for trial in trials(model, list(buckets))}

    layer = "64 × 64", "64 × 128", "96 × 64", "64 × 192"
    assert tried(model, Bucket(8, 0, 0)) == set()
    assert tried(model, Bucket(9, 0, 0)) == {f"{s} float32 in 16 rows" for s in (*layer, "64 × 259")}
    # Every row of a prompt goes through the layers and one through the head.
    assert tried(model, Bucket(0, 256, 4)) == {f"{shape} float32 in 16, 32, 64 rows" for shape in layer}
    square = "64 × 64 float32 in 16, 32, 64 rows"  # a head of the shape of a layer's matrix
    assert square in tried(model_of(num_hidden_layers=1, vocab_size=64), Bucket(0, 256, 4))
    attentions = {shape for shape in tried(sliding, Bucket(0, 256, 2)) if "attention" in shape}
    heads = "4 / 1 heads × 32 float32"
    assert attentions == {f"attention ({heads}{w}) in 128 queries" for w in ("", ", window 70")}
    monkeypatch.setattr(larger_tiles, "larger_row_tiles", backend.larger_row_tiles)  # a CPU's own
    assert prove(model, [Bucket(0, 4096, 1)]) == BASE


def answers(engine):
    """Tokens and logits after a prompt of two chunks and a short one."""
    ids = np.random.default_rng(0).integers(0, 250, 350).tolist()
    sequences = [engine.add(ids[:n], SamplingParams(max_tokens=3, seed=1))[0] for n in (350, 5)]
    while engine.has_work:
        engine.step()
    return [(s.output, np.stack(s.logits).tobytes()) for s in sequences]


def test_an_engine_with_larger_tiles_gives_the_same_bits_and_the_lint_knows_them(monkeypatch):
    """Two engines of one model, whose layers JAX would trace once."""
    model = model_of(num_hidden_layers=1)
    make = functools.partial(Engine, model, salt="", max_model_len=384, num_pages=8, keep_logits=True)
    make = functools.partial(make, max_num_seqs=2, max_num_batched_tokens=256)

    def linted(engine):
        report = lint_step(engine.step_fn)
        return report, {dot.rows for program in report.programs.values() for _, dot in dots(program)}

    engine = make()
    tiles = engine.step_fn.tiles
    assert tiles.dots
    found = answers(engine)
    report, rows = linted(engine)
    assert report.ok, report.findings
    assert rows >= {ROW_TILE, max(dot.rows for dot in tiles.dots)}
    for fewer in (tiles._replace(dots=tiles.dots[:-1]), tiles._replace(attention=())):
        engine.step_fn.tiles = fewer
        whys = [finding.why for _, finding in linted(engine)[0].findings]
        assert whys or fewer == tiles
        assert all("lacks" in why or "no tile was proven" in why for why in whys)

    monkeypatch.setattr(larger_tiles, "larger_row_tiles", lambda dtype: ())
    engine = make()
    assert engine.step_fn.tiles == BASE and answers(engine) == found
    report, rows = linted(engine)
    assert report.ok and rows == {ROW_TILE, 2 * ROW_TILE}  # two query heads a KV head


def test_the_lint_allows_what_was_proven_for_this_dtype_alone():
    shapes = jax.ShapeDtypeStruct((64, 24), jnp.float16), jax.ShapeDtypeStruct((24, 40), jnp.float16)
    tiles = as_tiles(24, 40, 64, dtype="float16")
    product = with_tiles(tiles, functools.partial(matmul.dot, n=40))
    text = jax.jit(product).lower(*shapes).as_text("hlo", debug_info=True)
    assert lint({"one": text, "other": text}, "xla", tiles=tiles).ok
    for others in (BASE, as_tiles(24, 40, 64, dtype="bfloat16"), as_tiles(24, 48, 64, dtype="float16")):
        findings = lint({"one": text, "other": text}, "xla", tiles=others).findings
        assert ["no tile was proven" in finding.why for _, finding in findings] == [True, True]


@pytest.mark.parametrize(("dtype", "known"), [("float16", True), ("float32", False)])
def test_the_lint_knows_columns_that_are_filled_up_for_cublas(dtype, known):
    """35 columns become 40; numbers of 32 bits are multiplied as they are."""
    shapes = (
        jax.ShapeDtypeStruct((64, 24), jnp.dtype(dtype)),
        jax.ShapeDtypeStruct((24, 40), jnp.dtype(dtype)),
    )
    product = with_tiles(as_tiles(24, 40, 64, dtype=dtype), functools.partial(matmul.dot, n=40))
    text = jax.jit(product).lower(*shapes).as_text("hlo", debug_info=True)
    findings = lint({"one": text}, "xla", tiles=as_tiles(24, 35, 64, dtype=dtype)).findings
    assert known == (not findings)


def test_tiles_are_part_of_what_is_lowered_elsewhere_and_kept():
    model, tiles = model_of(num_hidden_layers=1), Tiles((Dot(64, 64, "float32", 16),), (HEADS,))
    step = Step(model, tiles)
    programs = lowering.Programs(step, step.new_cache(2, 128), jnp.zeros(1, jnp.int32))
    sent = pickle.loads(pickle.dumps(lowering._Model.of(programs))).programs().step
    assert sent.tiles == tiles

    def key(step):
        shapes = jax.ShapeDtypeStruct((1, 259), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
        return lowered_cache._key(step._program("logprobs", *shapes, top=1))

    assert key(sent) == key(step) != key(Step(model))


def test_the_gpus_tiles(monkeypatch):
    """Whole multiples of each other, and of the base tile."""
    monkeypatch.setattr(backend.jax, "default_backend", lambda: "gpu")
    for dtype in ("float32", "bfloat16", "float16"):
        sizes = (backend.row_tile(dtype), *backend.larger_row_tiles(dtype))
        assert len(sizes) >= 5 and all(b % a == 0 and b > a for a, b in itertools.pairwise(sizes))
    filled = Buckets(256, 8192, 64).all()
    assert any(b.seqs and b.tokens >= ATTENTION_TILE * b.seqs for b in filled)
