"""Root-mean-square normalisation (Zhang & Sennrich 2019) with a pinned row sum."""

from jaxtyping import Array, Float

from pallas_kernels import registry


def rms_norm(
    x: Float[Array, "M H"], weight: Float[Array, " H"], *, eps: float, backend: str | None = None
) -> Float[Array, "M H"]:
    """y = x · 1/√((Σx² + H·eps) / H) · weight, in float32, rounded once to x's dtype.

    Args:
        x: rows; float32, bfloat16 or float16.
        weight: float32 (Gemma's 1 + w is added at load).
        eps: added to the mean of squares.
    """
    return registry.load("rms_norm", backend).rms_norm(x, weight, eps=eps)
