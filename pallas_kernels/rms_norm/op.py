"""Root-mean-square normalisation (Zhang & Sennrich 2019) with a pinned row sum."""

from jaxtyping import Array, Float

from pallas_kernels import registry
from pallas_kernels.gradient import Trained, value_of, with_gradient
from pallas_kernels.rms_norm import backward


def rms_norm(
    x: Float[Array, "M H"], weight: Float[Array, " H"] | Trained, *, eps: float, backend: str | None = None
) -> Float[Array, "M H"]:
    """y = x · 1/√((Σx² + H·eps) / H) · weight, in float32, rounded once to x's dtype.

    Args:
        x: rows; float32, bfloat16 or float16.
        weight: float32 (Gemma's 1 + w is added at load).
        eps: added to the mean of squares.
        backend: "xla", "mosaic_gpu" or "mosaic_tpu"; None is "xla".

    Raises:
        ValueError: the backend is unknown, or doesn't take the dtype or this device (named, with the remedy).
        NotImplementedError: the backend has no such kernel.
    """
    return _rms_norm((eps, backend), x, weight)


@with_gradient(backward.rms_norm)
def _rms_norm(static, x, weight):
    eps, backend = static
    return registry.load("rms_norm", backend).rms_norm(x, value_of(weight), eps=eps)
