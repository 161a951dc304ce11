"""The Hopper kernels under JAX's race detector: an access that isn't ordered with another makes bits depend on time.

It sees what warpgroups and copies do to memory, not what the warps of a warpgroup do to one another, nor what the CTAs
of a cluster copy for one another: there each copies for itself. Left out: what writes equal values twice on purpose
(q/k norm and cache write, the gradients of log-probabilities and of attention, in which two warpgroups clear a tile's
tail), and the gradient of weights, whose ring holds two kinds of stages, which the detector takes for one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import mosaic_gpu_sm90 as attention
from pallas_kernels.compat import gpu_interpreter, plgpu
from pallas_kernels.matmul import backward_sm90 as matmul_backward
from pallas_kernels.matmul import mosaic_gpu_sm90 as matmul
from pallas_kernels.matmul.tuning_sm90 import Tile
from pallas_kernels.rms_norm import backward_sm90 as norm_backward
from pallas_kernels.rms_norm import mosaic_gpu_sm90 as rms_norm
from pallas_kernels.sample import mosaic_gpu_sm90 as sample
from pallas_kernels.sample.op import SamplingRows

pytestmark = pytest.mark.interpret


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def found(capsys, f, *operands) -> bool:
    """Whether the detector saw a race in f(*operands)."""
    capsys.readouterr()
    with gpu_interpreter(detect_races=True):
        jax.block_until_ready(f(*operands))
    return "RACE DETECTED" in capsys.readouterr().out


def product(rows, n, tile, k=192, residual=False, bias=False, norm=False):
    options = {
        "residual": normal(2, rows, n) if residual else None,
        "bias": normal(3, n, dtype=jnp.float32) if bias else None,
        "norm": (jnp.ones(k), 1e-6) if norm else None,
    }
    return matmul.matmul(normal(0, rows, k), matmul.pack(normal(1, k, n)), n=n, tile=tile, **options)


def gated(rows, tile, call=matmul.gated_matmul):
    packed = matmul.pack_gated(normal(1, 192, 224), normal(2, 192, 224))
    return call(normal(0, rows, 192), packed, n=224, activation="silu", tile=tile)


PRODUCTS = {
    "several tiles": lambda: product(130, 448, Tile(64, 64, 128)),
    "clusters": lambda: product(250, 448, Tile(64, 64, 128, cluster=2), residual=True),
    "residual, few chunks": lambda: product(70, 448, Tile(64, 64), residual=True),
    "residual, many chunks": lambda: product(130, 448, Tile(128, 216, 64, 2), residual=True, bias=True),
    "residual, tail": lambda: product(130, 448, Tile(128, 128, 64, 2, 16, 64), residual=True),
    "norm and residual": lambda: product(3, 448, Tile(64, 64), k=1024, residual=True, norm=True),
    "gated": lambda: gated(70, Tile(64, 128)),
    "gated and saved": lambda: gated(130, Tile(128, 128, 64, 2), matmul.gated_matmul_saving),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name, capsys, gpu_of):
    """Of a GPU of few SMs: a CTA's tiles follow one another in the same shared memory."""
    gpu_of(2, matmul, matmul._kernel)
    assert not found(capsys, PRODUCTS[name])


def test_gradient_of_a_products_input(capsys):
    packed = matmul.pack(normal(1, 192, 448))
    assert not found(capsys, lambda: matmul_backward.input_gradient(normal(0, 128, 448), packed, 192))


@pytest.mark.parametrize(
    ("queries", "lens", "option"),
    [
        ((1, 1), (130, 1100), {}),
        ((1, 1), (130, 300), {"window": 100, "soft_cap": 20.0}),
        ((70, 5), (200, 300), {}),
        ((70, 5), (1100, 300), {"window": 100}),
    ],
    ids=["decode", "decode, window", "prefill", "prefill, window"],
)
def test_attention(queries, lens, option, capsys):
    pages = -(-max(lens) // 128)
    q, k, v = normal(0, sum(queries), 4, 64), *(normal(i, 2 * pages + 1, 2, 128, 64) for i in (1, 2))
    tables, starts, lens = (
        jnp.asarray(x, jnp.int32)
        for x in (1 + np.arange(2 * pages).reshape(2, pages), np.cumsum((0, *queries)), lens)
    )
    options = {"scale": 0.125, "window": None, "soft_cap": None, "max_query_len": max(queries)} | option
    assert not found(capsys, lambda: attention.attention(q, k, v, tables, starts, lens, **options))


def test_rms_norm_and_its_gradient(capsys):
    x, weight = normal(0, 70, 256), normal(1, 256, dtype=jnp.float32)
    assert not found(capsys, lambda: rms_norm.rms_norm(x, weight, eps=1e-6))
    total, dy = normal(2, 256, dtype=jnp.float32), normal(3, 192, 256)
    assert not found(capsys, lambda: norm_backward.rms_norm(normal(0, 192, 256), weight, total, dy, eps=1e-6))


def test_sampling(capsys):
    numbers = lambda dtype, *values: jnp.asarray(values, dtype)  # noqa: E731
    rows = SamplingRows(
        temperature=numbers(jnp.float32, 0, 0.7, 1, 1.3),
        top_k=numbers(jnp.int32, 0, 0, 5, 40),
        top_p=numbers(jnp.float32, 1, 0.9, 1, 0.5),
        min_p=numbers(jnp.float32, 0, 0, 0, 0.05),
        seed=jnp.ones((4, 2), jnp.uint32),
        sample_index=jnp.zeros(4, jnp.int32),
        position=jnp.arange(4, dtype=jnp.int32),
    )
    assert not found(capsys, lambda: sample.sample(normal(0, 4, 1000, dtype=jnp.float32), rows))


@pytest.mark.parametrize("ordered", [True, False])
def test_the_detector_sees_a_copy_over_what_is_read(ordered, capsys):
    """A copy over values that were read from shared memory; `commit_smem` between them orders the two."""

    def body(x_g, y_g, x_s, bar):
        total = 0.0
        for i in range(2):
            plgpu.copy_gmem_to_smem(x_g.at[i], x_s, bar)
            plgpu.barrier_wait(bar)
            total = total + x_s[...]
            if ordered:
                plgpu.commit_smem()
        y_g[...] = total

    x = normal(0, 2, 128, dtype=jnp.float32)
    scratch = plgpu.SMEM((128,), jnp.float32), plgpu.Barrier()
    call = plgpu.kernel(body, out_type=jax.ShapeDtypeStruct((128,), jnp.float32), scratch_types=scratch)
    assert found(capsys, call, x) != ordered
