"""RMSNorm inside a Hopper product: the bits are those of the two launches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compat import gpu_interpreter
from pallas_kernels.gradient import Trained
from pallas_kernels.matmul import mosaic_gpu_sm90 as kernel
from pallas_kernels.matmul import op, tuning_sm90
from pallas_kernels.matmul.tuning_sm90 import Tile
from pallas_kernels.rms_norm import mosaic_gpu_sm90 as rms_norm

K, N, EPS = 1024, 192, 1e-5


def _operands(rows: int):
    rng = np.random.default_rng(rows)
    x, w, residual = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((rows, K), (K, N), (rows, N))
    )
    return x, w * 0.1, residual, jnp.asarray(rng.normal(1, 0.2, size=K), jnp.float32)


def _bits(x):
    return np.asarray(x).view(f"uint{8 * x.dtype.itemsize}")


@pytest.fixture
def two_sms(gpu_of):
    """Rows are normalised once for all rounds."""
    gpu_of(2, kernel, kernel._kernel)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("rows", "tile"),
    [(1, Tile(64, 64, 128)), (3, Tile(64, 128, tail=64)), (kernel.NORMED_ROWS, Tile(64, 64, stages=3))],
)
def test_bits_are_those_of_two_launches(two_sms, rows, tile):
    """In every epilogue, also of rows that are large or NaN."""
    x, w, residual, weight = _operands(rows)
    hostile = (x * 1e30).at[1:].set(jnp.nan)
    packed, gated = kernel.pack(w), kernel.pack_gated(*jnp.split(w, 2, axis=1))
    bias = jnp.arange(N, dtype=jnp.float32)
    with gpu_interpreter():
        products = (
            functools.partial(kernel.gated_matmul, packed=gated, n=N // 2, activation="silu", tile=tile),
            functools.partial(kernel.matmul, packed=packed, n=N, residual=residual, tile=tile),
            functools.partial(kernel.matmul, packed=packed, n=N, bias=bias, out_dtype=jnp.float32, tile=tile),
        )
        for given, some in ((x, products), (hostile, products[:1])):
            apart = rms_norm.rms_norm(given, weight, eps=EPS)
            for product in some:
                want = _bits(product(apart))
                np.testing.assert_array_equal(_bits(product(given, norm=(weight, EPS))), want)
                if given is x:
                    assert (_bits(product(x)) != want).any(), "the comparison sees the norm"


@pytest.mark.interpret
def test_rows_do_not_feel_their_neighbours():
    rows = kernel.NORMED_ROWS
    x, w, residual, weight = _operands(rows)
    packed = kernel.pack(w)

    def run(x):
        with gpu_interpreter():
            y = kernel.matmul(x, packed, n=N, residual=residual[: len(x)], norm=(weight, EPS))
        return _bits(y)

    full = run(x)
    np.testing.assert_array_equal(run(x[:1]), full[:1])
    for row in range(rows):
        poisoned = jnp.full_like(x, jnp.nan).at[row].set(x[row])
        apart = run(poisoned)
        np.testing.assert_array_equal(apart[row], full[row])
        assert (apart != full).any(), "the comparison sees the poisoned rows"


@pytest.mark.parametrize(
    ("backend", "rows"),
    [("xla", 2), pytest.param("mosaic_gpu", 2, marks=pytest.mark.slow), ("xla", kernel.NORMED_ROWS + 1)],
)
@pytest.mark.interpret
def test_the_op_and_its_gradient_are_those_of_two_ops(backend, rows):
    """Inside, where the kernel takes it, and outside: values, every cotangent, and the sums of weights in training."""
    x, w, residual, weight = _operands(rows)
    plain = functools.partial(op.matmul, n=N, residual=residual, backend=backend)
    gated = functools.partial(op.gated_matmul, n=N // 2, activation="silu", backend=backend)
    packed = op.pack(w, backend), op.pack_gated(*jnp.split(w, 2, axis=1), backend)

    def results(call, packed):
        y, pull = jax.vjp(call, x, weight, packed)
        dx, *rest = pull(jnp.ones_like(y))
        summed = [Trained(w, jnp.ones(w.shape, jnp.float32)) for w in (weight, packed)]
        _, pull = jax.vjp(call, x, *summed)
        return y, dx, *rest, *(d.gradient for d in pull(jnp.ones_like(y))[1:])

    def inside(product, x, weight, packed):
        return product(x, packed, norm=(weight, EPS))

    def outside(product, x, weight, packed):
        return product(op.rms_norm(x, weight, eps=EPS, backend=backend), packed)

    with gpu_interpreter():
        for product, matrix in zip((plain, gated), packed, strict=True):
            together, apart = (
                results(functools.partial(call, product), matrix) for call in (inside, outside)
            )
            without = results(lambda x, weight, packed, product=product: product(x, packed), matrix)
            assert len(together) == 6 and all(
                (_bits(a) != _bits(b)).any() for a, b in zip(together, without, strict=True)
            ), "the comparison sees the norm"
            for got, want in zip(together, apart, strict=True):
                np.testing.assert_array_equal(_bits(got), _bits(want))


@pytest.mark.parametrize("k", [1024, 5120, kernel.NORMED_COLUMNS])
@pytest.mark.parametrize("rows", [1, kernel.NORMED_ROWS])
def test_lowers_for_cuda_in_one_launch(rows, k):
    struct = jax.ShapeDtypeStruct
    x, weight = struct((rows, k), jnp.bfloat16), struct((k,), jnp.float32)
    packed = struct((k // 64, 6144, 64), jnp.bfloat16)

    def launches(x):
        step = jax.jit(lambda x, w, p: op.matmul(x, p, n=6144, norm=(w, EPS), backend="mosaic_gpu"))
        text = step.trace(x, weight, packed).lower(lowering_platforms=("cuda",)).as_text()
        return text.count("stablehlo.custom_call @mosaic_gpu")

    assert launches(x) == 1
    assert launches(struct((kernel.NORMED_ROWS + 1, k), jnp.bfloat16)) == 2


@pytest.mark.parametrize("gpu", tuning_sm90.TABLES)
def test_every_tile_leaves_room_for_the_rows(gpu):
    """Of few rows, in matrices that a model may normalise for, gated or not."""
    struct, lowered = jax.ShapeDtypeStruct, 0
    for shape, buckets in tuning_sm90.TABLES[gpu].items():
        k, n = map(int, shape.split("x"))
        if not kernel.takes_norm(1, k) or "8" not in buckets:
            continue
        tile = Tile(*buckets["8"])
        product = functools.partial(kernel.matmul, n=n, tile=tile)
        step = jax.jit(lambda x, p, w, product=product: product(x, p, norm=(w, EPS)))
        operands = ((1, k), jnp.bfloat16), ((k // 64, n, 64), jnp.bfloat16), ((k,), jnp.float32)
        step.trace(*(struct(*a) for a in operands)).lower(lowering_platforms=("cuda",))
        lowered += 1
    assert lowered > 5


@pytest.mark.parametrize("residual", [False, True])
def test_the_widest_rows_leave_room_for_their_sums(residual):
    """In tiles whose stages fill shared memory to the last KB."""
    k, n, struct = kernel.NORMED_COLUMNS, 2048, jax.ShapeDtypeStruct
    operands = [((1, k), jnp.bfloat16), ((k // 64, n, 64), jnp.bfloat16), ((k,), jnp.float32)]
    operands += [((1, n), jnp.bfloat16)] if residual else []
    for width in (40, 56, 72, 120, 136):

        def product(x, packed, weight, *added, width=width):
            added = {"residual": added[0]} if added else {}
            return kernel.matmul(x, packed, n=n, norm=(weight, EPS), tile=Tile(64, width), **added)

        step = jax.jit(product).trace(*(struct(*a) for a in operands))
        step.lower(lowering_platforms=("cuda",))


def test_what_does_not_fit_is_refused():
    assert kernel.takes_norm(1, 1024) and kernel.takes_norm(kernel.NORMED_ROWS, kernel.NORMED_COLUMNS)
    for rows, k in (kernel.NORMED_ROWS + 1, 1024), (1, kernel.NORMED_COLUMNS + 1024), (1, 576), (1, 2560):
        assert not kernel.takes_norm(rows, k)
        with pytest.raises(
            ValueError, match=f"{rows} rows of {k} can't be normalised inside; call rms_norm first"
        ):
            kernel.matmul(
                jnp.ones((rows, k), jnp.bfloat16),
                jnp.ones((k // 64, 64, 64), jnp.bfloat16),
                n=64,
                norm=(None, EPS),
            )
    struct = jax.ShapeDtypeStruct
    product = functools.partial(kernel.matmul, n=512, tile=Tile(64, 256, 256), norm=(jnp.ones(8192), EPS))
    with pytest.raises(ValueError, match=r"shared memory for \d stages of K=8192; take a smaller tile"):
        jax.eval_shape(product, struct((1, 8192), jnp.bfloat16), struct((128, 512, 64), jnp.bfloat16))
