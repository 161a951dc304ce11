"""Choosing a token: a pure function of a row's logits, its request's parameters, its seed and its position."""

import dataclasses
import functools

import jax
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels import registry
from pallas_kernels.arrays import HostOrDevice


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "sample_index",
        "position",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "adjusted_ids",
        "adjusted_bias",
        "seen",
        "output_counts",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """The sampling parameters of each row. Rows never influence one another."""

    temperature: Float[HostOrDevice, " S"]
    """0 means greedy."""
    top_k: Int[HostOrDevice, " S"]
    """0 means off."""
    top_p: Float[HostOrDevice, " S"]
    min_p: Float[HostOrDevice, " S"]
    seed: UInt32[HostOrDevice, "S 2"]
    sample_index: Int[HostOrDevice, " S"]
    """Which of a request's `n` samples this is."""
    position: Int[HostOrDevice, " S"]
    """Absolute position of the token being chosen."""
    repetition_penalty: Float[HostOrDevice, " S"]
    presence_penalty: Float[HostOrDevice, " S"]
    frequency_penalty: Float[HostOrDevice, " S"]
    adjusted_ids: Int[HostOrDevice, "S A"]
    """Distinct token ids whose logits change before sampling; padding is the vocabulary size."""
    adjusted_bias: Float[HostOrDevice, "S A"]
    """Added to those logits first (−inf bans)."""
    seen: Bool[HostOrDevice, "S A"]
    """Whether the id occurs in prompt or output (repetition penalty)."""
    output_counts: Int[HostOrDevice, "S A"]
    """How often it occurs in the output (presence and frequency penalties)."""


def sample(
    logits: Float[Array, "S V"], rows: SamplingRows, *, backend: str | None = None
) -> tuple[Int[Array, " S"], Bool[Array, " S"]]:
    """One token per row, and whether the row's logits were usable (no NaN, a finite maximum).

    Order: bias → repetition → frequency → presence penalties → temperature → min-p → top-k → top-p → the largest of
    logit + Gumbel noise. The noise is Threefry-2x32 (Salmon et al. 2011) of (seed, sample index, position, token id),
    with u in the open interval (0, 1). Ties go to the lowest id, in every step; top-p sums in a pinned order.

    Args:
        logits: float32.
        rows: one entry per row.
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

    Returns:
        (logprob of ids, their rank from 1, logprobs of the `top` largest, their ids); ties rank by id.
    """
    return registry.load("sample", backend).token_logprobs(logits, ids, top=top)
