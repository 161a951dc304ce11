"""Choosing a token: a pure function of a row's logits, its request's parameters, its seed and its position."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels import registry
from pallas_kernels.arrays import HostOrDevice
from pallas_kernels.gradient import with_gradient
from pallas_kernels.reduce import pin
from pallas_kernels.sample import backward


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """The sampling parameters of each row. Rows never influence one another."""

    temperature: Float[HostOrDevice, " S"]
    """0 means greedy."""
    top_k: Int[HostOrDevice, " S"]
    """0 means off."""
    top_p: Float[HostOrDevice, " S"]
    """1 means off."""
    min_p: Float[HostOrDevice, " S"]
    """0 means off."""
    seed: UInt32[HostOrDevice, "S 2"]
    """The seed's low and high 32 bits."""
    sample_index: Int[HostOrDevice, " S"]
    """Which of a request's `n` samples this is."""
    position: Int[HostOrDevice, " S"]
    """Absolute position of the token being chosen."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adjustments:
    """Single logits that change before sampling: biases, bans and penalties, in one list for all rows."""

    row: Int[HostOrDevice, " A"]
    """The number of rows and more is padding."""
    id: Int[HostOrDevice, " A"]
    """The token; no (row, id) occurs twice."""
    bias: Float[HostOrDevice, " A"]
    """Added first (−inf bans)."""
    seen: Bool[HostOrDevice, " A"]
    """Whether the id occurs in prompt or output: only then does the repetition penalty apply."""
    count: Int[HostOrDevice, " A"]
    """How often it occurs in the output."""
    repetition: Float[HostOrDevice, " A"]
    """Divides a positive logit and multiplies a negative one; 1 means off."""
    presence: Float[HostOrDevice, " A"]
    """Subtracted if the id occurs in the output; 0 means off."""
    frequency: Float[HostOrDevice, " A"]
    """Subtracted `count` times; 0 means off."""


def adjust(logits: Float[Array, "S V"], adjustments: Adjustments) -> Float[Array, "S V"]:
    """The logits after bias → repetition → frequency → presence penalties, each rounded to float32."""
    a = adjustments
    x = pin(logits.at[a.row, a.id].get(mode="fill", fill_value=0) + a.bias)
    repeated = jnp.where(x > 0, x / a.repetition, pin(x * a.repetition))
    x = pin(jnp.where(a.seen, repeated, x))
    x = x - pin(a.frequency * a.count)
    x = x - jnp.where(a.count > 0, a.presence, 0.0)
    return pin(logits.at[a.row, a.id].set(x, mode="drop"))


def restrict(logits: Float[Array, "S V"], allowed: UInt32[HostOrDevice, "S W"]) -> Float[Array, "S V"]:
    """The logits with −inf for every token i whose bit i % 32 of word i // 32 isn't set; the others keep their bits."""
    rows, vocab = logits.shape
    bits = (jnp.asarray(allowed)[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return pin(jnp.where(bits.reshape(rows, -1)[:, :vocab] == 1, logits, -jnp.inf))


def sample(
    logits: Float[Array, "S V"], rows: SamplingRows | None, *, backend: str | None = None
) -> tuple[Int[Array, " S"], Bool[Array, " S"]]:
    """One token per row, and whether the row's logits were usable (no NaN, a finite maximum).

    Order: temperature → min-p → top-k → top-p → the largest of logit + Gumbel noise. The noise is Threefry-2x32
    (Salmon et al. 2011) of (seed, sample index, position, token id), with u in the open interval (0, 1). Ties go to
    the lowest id, in every step; top-p sums in a pinned order.

    Args:
        logits: float32, adjusted if they have to be.
        rows: one entry per row; None takes every row's largest logit, as rows of temperature 0 do.
        backend: "xla", "mosaic_gpu" or "mosaic_tpu"; None is "xla".

    Raises:
        ValueError: the backend is unknown, or doesn't take the dtype or this device (named, with the remedy).
        NotImplementedError: the backend has no such kernel.
    """
    return registry.load("sample", backend).sample(logits, rows)


def token_logprobs(
    logits: Float[Array, "M V"], ids: Int[Array, " M"], *, top: int, backend: str | None = None
) -> tuple[Float[Array, " M"], Int[Array, " M"], Float[Array, "M top"], Int[Array, "M top"]]:
    """log-softmax of the raw logits at `ids`: the one definition of a logprob, for sampler, score and trainer.

    Args:
        logits: float32, as the LM head made them, before any penalty or temperature.
        ids: the tokens asked about.
        top: how many of the largest to return too.
        backend: "xla", "mosaic_gpu" or "mosaic_tpu"; None is "xla".

    Returns:
        (logprob of ids, their rank from 1, logprobs of the `top` largest, their ids); ties rank by id. Logprobs are
        natural and float32.

    Raises:
        ValueError: the backend is unknown, or doesn't take the dtype or this device (named, with the remedy).
        NotImplementedError: the backend has no such kernel.
    """
    return _token_logprobs((top, backend), logits, ids)


@with_gradient(backward.token_logprobs, saving=backward.forward)
def _token_logprobs(static, logits, ids):
    top, backend = static
    return registry.load("sample", backend).token_logprobs(logits, ids, top=top)
