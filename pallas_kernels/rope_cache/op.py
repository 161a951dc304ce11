"""Query/key norm, rotary position embedding (Su et al. 2021) and the write into the KV cache, as one op."""

import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import registry
from pallas_kernels.arrays import HostOrDevice
from pallas_kernels.gradient import Trained, value_of, with_gradient
from pallas_kernels.rope_cache import backward


def rope_table(inverse_frequencies: np.ndarray, length: int, scale: float = 1.0) -> np.ndarray:
    """cos and sin of every (position, frequency), float32 [length, 2 · len(inverse_frequencies)].

    Built once, on the host, in float64, and passed to the model as data: NumPy's and XLA's cosines differ.

    Args:
        inverse_frequencies: [head_dim / 2], radians per token.
        length: number of positions.
        scale: factor on both (attention factor of some rope scalings).
    """
    angle = np.arange(length, dtype=np.float64)[:, None] * np.asarray(inverse_frequencies, np.float64)[None]
    return np.concatenate([np.cos(angle) * scale, np.sin(angle) * scale], axis=1).astype(np.float32)


def rope_cache(
    qkv: Float[Array, "T C"],
    k_pages: Float[Array, "P Hkv page D"],
    v_pages: Float[Array, "P Hkv page D"],
    rope: Float[Array, "L D"],
    positions: Int[HostOrDevice, " T"],
    slots: Int[HostOrDevice, " T"],
    *,
    num_q_heads: int,
    num_kv_heads: int,
    q_norm: Float[Array, " D"] | Trained | None = None,
    k_norm: Float[Array, " D"] | Trained | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Float[Array, "T Hq D"], Float[Array, "P Hkv page D"], Float[Array, "P Hkv page D"]]:
    """Splits qkv, normalises and rotates q and k, writes k and v into their slots.

    Per head: RMSNorm over D when `q_norm`/`k_norm` are given, then (x₁c − x₂s, x₂c + x₁s) with every product rounded
    before the sum, all in float32, one rounding to qkv's dtype.

    Args:
        qkv: projections, q heads first, then k, then v: C = (num_q_heads + 2 · num_kv_heads) · D.
        k_pages, v_pages: the cache; donate them to have them written in place.
        rope: `rope_table`'s output.
        positions: absolute position of each token.
        slots: page · page_size + offset of each token; padding tokens point into the trash page.
        num_q_heads, num_kv_heads: Hq and Hkv.
        q_norm, k_norm: float32 weights of the heads' RMSNorm; None: there is none.
        eps: added to its mean of squares.
        backend: "xla", "mosaic_gpu" or "mosaic_tpu"; None is "xla".

    Returns:
        (q, k_pages, v_pages), in qkv's dtype.

    Raises:
        ValueError: the backend is unknown, or doesn't take the dtype or this device (named, with the remedy).
        NotImplementedError: the backend has no such kernel.
    """
    static = num_q_heads, num_kv_heads, eps, backend
    return _rope_cache(static, qkv, k_pages, v_pages, rope, positions, slots, q_norm, k_norm)


@with_gradient(backward.rope_cache)
def _rope_cache(static, qkv, k_pages, v_pages, rope, positions, slots, q_norm, k_norm):
    num_q_heads, num_kv_heads, eps, backend = static
    return registry.load("rope_cache", backend).rope_cache(
        qkv,
        k_pages,
        v_pages,
        rope,
        positions,
        slots,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        q_norm=value_of(q_norm),
        k_norm=value_of(k_norm),
        eps=eps,
    )
