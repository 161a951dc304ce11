"""The Hopper gradient kernels of the matmul without a GPU: interpreted on small shapes, lowered for CUDA on real ones.

The interpreter has its own order inside a step of 64 rows; that steps follow one another from the sum so far, wherever
micro-batches are cut, is the kernel's.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdet.rl import GradientSums, accumulate, pack
from jaxdet.testing import COMMON, FAMILIES, random_model
from pallas_kernels.compat import gpu_interpreter
from pallas_kernels.gradient import Trained
from pallas_kernels.matmul import backward_sm90 as backward
from pallas_kernels.matmul import mosaic_gpu_sm90 as kernel
from pallas_kernels.matmul.activation_sm90 import before_activation
from pallas_kernels.matmul.backward_sm90 import Tile
from pallas_kernels.matmul.live_sm90 import live_chunks
from pallas_kernels.matmul.op import gated_matmul, matmul

K, N = 192, 128


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def bits(x):
    return np.asarray(x).view(f"u{x.dtype.itemsize}")


def error(found, exact):
    return np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact)


def wide(*arrays):
    return [np.asarray(x, np.float64) for x in arrays]


@pytest.fixture
def one_cta(gpu_of):
    """Which computes all tiles, one after the other."""
    gpu_of(1, backward, backward._weight_kernel)


@pytest.mark.interpret
@pytest.mark.parametrize(
    "tile",
    [
        Tile(),
        pytest.param(Tile(wide=64), marks=pytest.mark.slow),
        pytest.param(Tile(groups=1, wide=64), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_weight_gradient_has_the_same_bits_however_rows_are_cut(tile, one_cta):
    k, n = 256, 256
    x, dy, start = normal(0, 192, k), normal(1, 192, n), normal(2, k, n, dtype=jnp.float32)

    call = jax.jit(functools.partial(backward.weight_gradient, tile=tile))

    def total(*cuts, x=x, dy=dy):
        sums = kernel.pack(start)
        with gpu_interpreter():
            for first, last in zip((0, *cuts), (*cuts, len(x)), strict=True):
                sums = call(sums, x[first:last], dy[first:last])
        return kernel.unpack(sums, k, n)

    whole = total()
    np.testing.assert_array_equal(bits(total(64, 128)), bits(whole))
    swapped = np.r_[64:192, 0:64]
    assert (bits(total(x=x[swapped], dy=dy[swapped])) != bits(whole)).any(), "it would see another order"
    exact_x, exact_dy, exact = wide(x, dy, start)
    assert error(whole, exact + exact_x.T @ exact_dy) < 1e-6


@pytest.mark.interpret
def test_live_chunks_are_found():
    """One value is enough, NaN or in the last column; a chunk of 16 pieces and more is read to its end."""
    dy = jnp.zeros((6 * 64, 1152), jnp.bfloat16)
    with gpu_interpreter():
        none, some = (
            live_chunks(x) for x in (dy, dy.at[70, 3].set(1).at[191 + 64, -1].set(-1).at[-1, -1].set(jnp.nan))
        )
    assert none.shape == (16, 128)
    np.testing.assert_array_equal(none[:, :6].any(axis=0), np.zeros(6, bool))
    np.testing.assert_array_equal(np.flatnonzero(some[:, :6].any(axis=0)), [1, 3, 5])


@pytest.mark.interpret
def test_weight_gradient_of_dead_chunks_and_odd_sizes():
    """64 rows without a gradient add nothing, NaN or not; 200 rows, 100 k and 70 columns fill no tile."""
    x, dy, start = normal(0, 200, 100), normal(1, 200, 70), kernel.pack(jnp.zeros((100, 70), jnp.float32))
    dead = np.r_[64:128, 192:200]
    dy = dy.at[dead].set(0)
    poisoned = x.at[dead].set(jnp.nan)
    with gpu_interpreter():
        call = jax.jit(backward.weight_gradient)
        clean, found = (kernel.unpack(call(start, rows, dy), 100, 70) for rows in (x, poisoned))
        hit = call(start, x.at[4].set(jnp.nan), dy)
        kept = call(start + 1, jnp.full_like(x, jnp.nan), jnp.zeros_like(dy))
    np.testing.assert_array_equal(bits(found), bits(clean))
    np.testing.assert_array_equal(bits(kept), bits(start + 1))
    assert np.isnan(hit).any(), "a NaN in a row with a gradient is seen"
    exact_x, exact_dy = wide(x, dy)
    assert error(clean, exact_x.T @ exact_dy) < 1e-6


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("tile", "k"), [(Tile(), K), pytest.param(Tile(groups=1, wide=64), 100, marks=pytest.mark.slow)], ids=repr
)
def test_input_gradient_of_a_row_depends_on_itself_alone(tile, k):
    dy, w = normal(0, 130, N), normal(1, k, N)

    def run(dy):
        with gpu_interpreter():
            return backward.input_gradient(dy, kernel.pack(w), k, tile=tile)

    full = run(dy)
    hostile = run(dy.at[::2].set(jnp.nan))
    np.testing.assert_array_equal(bits(hostile)[1::2], bits(full)[1::2])
    assert (bits(hostile)[::2] != bits(full)[::2]).any(), "the comparison sees the hostile rows"
    exact_dy, exact_w = wide(dy, w)
    assert error(full, exact_dy @ exact_w.T) < 3e-3


@pytest.mark.interpret
@pytest.mark.parametrize("rows", [8, pytest.param(130, marks=pytest.mark.slow)])
def test_gate_and_up_are_saved_beside_the_same_bits(rows):
    """The result's bits are those of the kernel that saves nothing; what is saved is the plain product's."""
    x, w = normal(0, rows, K), kernel.pack_gated(normal(1, K, N) / 8, normal(2, K, N) / 8)
    options = {"n": N, "activation": "silu"}
    with gpu_interpreter():
        plain = kernel.gated_matmul(x, w, **options)
        y, inner = kernel.gated_matmul_saving(x, w, **options)
        product = kernel.matmul(x, w, n=2 * N)
    np.testing.assert_array_equal(bits(y), bits(plain))
    np.testing.assert_array_equal(bits(inner), bits(product))
    assert y.size == rows * N
    assert (bits(inner) != bits(product)[:, ::-1]).any(), "the comparison sees other columns"


@pytest.mark.interpret
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activations_gradient_is_close_to_float64_and_a_rows_own(activation):
    inner, dy = normal(0, 64, 128) * 4, normal(1, 64, 64)
    inner = inner.at[0].set(jnp.linspace(-100, 100, 128, dtype=inner.dtype))
    dy = dy.at[2].set(0)
    with gpu_interpreter():
        found = before_activation(inner, dy, activation)
        hostile = before_activation(inner.at[::2].set(jnp.nan), dy, activation)
    np.testing.assert_array_equal(bits(hostile)[1::2], bits(found)[1::2])
    assert np.isnan(hostile[::2]).any(axis=1).sum() == 31, "the comparison sees the hostile rows"
    assert (hostile[2] == 0).all(), "a row without a gradient has none before the activation"
    act = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}[activation]
    with jax.enable_x64(True):
        gate, up = (
            np.asarray(inner, np.float64).reshape(64, 2, 2, 32).transpose(2, 0, 1, 3).reshape(2, 64, 64)
        )
        exact = jax.vjp(lambda g, u: act(g) * u, gate, up)[1](np.asarray(dy, np.float64))
    found = np.asarray(found, np.float64).reshape(64, 2, 2, 32).transpose(2, 0, 1, 3).reshape(2, 64, 64)
    for got, want in zip(found, exact, strict=True):
        np.testing.assert_allclose(got, want, rtol=2**-8, atol=1e-5)


@pytest.mark.slow
@pytest.mark.interpret
def test_gradients_of_the_ops_are_close_to_float64():
    """Plain and gated through `jax.grad`, beside autodiff in float64: 70 rows, 80 k, 96 columns."""
    x, w, up, c = normal(0, 70, 80), normal(1, 80, 96) / 8, normal(2, 80, 96) / 8, normal(3, 70, 96)
    start = jnp.zeros((80, 96), jnp.float32)

    def ours(f, x, value, gradient):
        loss = lambda x, g: jnp.sum(f(x, Trained(value, g)) * c.astype(jnp.float32))  # noqa: E731
        with gpu_interpreter():
            return jax.grad(loss, (0, 1))(x, gradient)

    options = {"n": 96, "out_dtype": jnp.float32, "backend": "mosaic_gpu"}
    plain = ours(functools.partial(matmul, **options), x, kernel.pack(w), kernel.pack(start))
    gated = ours(
        functools.partial(gated_matmul, activation="silu", **options),
        x,
        kernel.pack_gated(w, up),
        kernel.pack_gated(start, start),
    )
    with jax.enable_x64(True):
        x, w, up, c = map(jnp.asarray, wide(x, w, up, c))
        dx, dw = jax.grad(lambda x, w: jnp.sum((x @ w) * c), (0, 1))(x, w)
        both = jax.grad(lambda x, w, u: jnp.sum(jax.nn.silu(x @ w) * (x @ u) * c), (0, 1, 2))(x, w, up)
        expected = [np.asarray(g) for g in (dx, dw, *both)]
    found = plain[0], kernel.unpack(plain[1], 80, 96), gated[0], *kernel.unpack_gated(gated[1], 80, 96)
    for got, want in zip(found, expected, strict=True):
        assert error(got, want) < 4e-3


TILES = [
    Tile(),
    Tile(wide=192),
    Tile(groups=1, prefetch=0),
    Tile(groups=3, wide=192),
    Tile(groups=2, wide=128),
]


@pytest.mark.parametrize("tile", TILES, ids=repr)
@pytest.mark.parametrize(("k", "n"), [(4096, 6144), pytest.param(576, 1536, marks=pytest.mark.slow)])
def test_every_tile_lowers_for_cuda(tile, k, n):
    struct = jax.ShapeDtypeStruct
    packed = -(-k // 64), n, 64
    x, dy = struct((1024, k), jnp.bfloat16), struct((1024, n), jnp.bfloat16)
    saving = functools.partial(kernel.gated_matmul_saving, n=n // 2, activation="silu")
    through = functools.partial(before_activation, activation="gelu_tanh")
    for f, arguments in (
        (saving, (x, struct(packed, jnp.bfloat16))),
        (through, (dy, struct((1024, n // 2), jnp.bfloat16))),
        (lambda dy, w: backward.input_gradient(dy, w, k, tile=tile), (dy, struct(packed, jnp.bfloat16))),
        (functools.partial(backward.weight_gradient, tile=tile), (struct(packed, jnp.float32), x, dy)),
    ):
        jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("remat", [False, True])
def test_the_first_pass_under_checkpoint_saves_nothing(remat):
    def loss(x, gradient, packed):
        f = lambda x, g: gated_matmul(  # noqa: E731
            x, Trained(packed, g), n=64, activation="silu", backend="mosaic_gpu"
        )
        return jnp.sum((jax.checkpoint(f) if remat else f)(x, gradient).astype(jnp.float32) ** 2)

    struct = jax.ShapeDtypeStruct
    packed = 2, 128, 64
    arguments = struct((64, 128), jnp.bfloat16), struct(packed, jnp.float32), struct(packed, jnp.bfloat16)
    lowered = jax.jit(jax.grad(loss, (0, 1))).trace(*arguments).lower(lowering_platforms=("cuda",))
    found = re.findall(r"matmul_128x128_mosaic_gpu.* -> (.*)", lowered.as_text())
    saving = "(tensor<64x64xbf16>, tensor<64x128xbf16>)"
    assert found == (["tensor<64x64xbf16>", saving] if remat else [saving])


@pytest.mark.parametrize("gated", [False, True])
def test_products_lower_for_cuda_with_64_bit_numbers_on(gated):
    """`jax_enable_x64` is the user's: the kernels count in int32 all the same."""
    x, packed = (
        jax.ShapeDtypeStruct((256, 192), jnp.bfloat16),
        jax.ShapeDtypeStruct((3, 256, 64), jnp.bfloat16),
    )

    def f(x, packed):
        if gated:
            return gated_matmul(x, packed, n=128, activation="silu", backend="mosaic_gpu")
        return matmul(x, packed, n=256, backend="mosaic_gpu")

    def step(x, packed):
        y, pull = jax.vjp(f, x, packed)
        return pull(y)

    with jax.enable_x64(True):
        program = jax.jit(step).trace(x, packed).lower(lowering_platforms=("cuda",)).as_text()
    assert all(f"{name}_" in program for name in ("matmul", "dw", "dx"))


@pytest.mark.slow
def test_a_trainers_step_lowers_for_cuda_with_every_kernel():
    """Rematerialised, with the sums donated: no gradient is XLA's that has a kernel."""
    config = {"model_type": "qwen3"} | COMMON | FAMILIES["qwen3"] | {"head_dim": 64, "num_hidden_layers": 1}
    model = random_model(config, dtype=jnp.bfloat16, backend="mosaic_gpu", max_model_len=256)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    micro, _ = pack([[1] * 130, [2] * 5], 256)[0]

    def step(sums, params, micro):
        trained = nnx.merge(graph, params, rest)
        return accumulate(trained, sums, micro, lambda values, _: (jnp.sum(values), None), remat=True)[0]

    traced = jax.jit(step, donate_argnums=0).trace(GradientSums.zeros(params), params, micro)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    least_of = {
        "dw_": 5,
        "dx_": 5,
        "before_": 1,
        "attention_dq": 1,
        "attention_dkv": 1,
        "rms_norm_gradient": 1,
    }
    for name, least in least_of.items():
        assert len(set(re.findall(rf"{name}\w*_mosaic_gpu", program))) >= least, name
