"""How far a trainer's log-probabilities are from the sampler's: the check that any RL loop should make."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from jaxdet.outputs import CompletionOutput, RequestOutput

EDGES = np.array([0.0, *(10.0**e for e in range(-8, 2)), np.inf])
"""Of the histogram: decades of |Δ|."""
BAR = 40
"""Characters of the histogram's longest bar."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Δ is the trainer's logprob less the sampler's, of the same token; in nats."""

    compared: int
    """Tokens."""
    differing: int
    """Tokens with Δ ≠ 0."""
    max_abs: float
    """Largest |Δ|."""
    mean_abs: float
    """Mean |Δ| over all tokens, those that are equal included."""
    kl: float
    """Estimate of KL(sampler ‖ trainer) per token: the mean of exp(Δ) − 1 − Δ, 0.0 if none differ.

    It is k3 of "Approximating KL divergence" (Schulman 2020, http://joschu.net/blog/kl-approx.html)."""
    edges: Float[np.ndarray, " bins+1"]
    """float64, ascending from 0 to inf."""
    counts: Int[np.ndarray, " bins"]
    """Tokens with edges[i] < |Δ| ≤ edges[i + 1]; those that are equal are in none."""

    def __str__(self) -> str:
        """The figures and the histogram, for a terminal."""
        equal = self.compared - self.differing
        lines = [
            f"{self.compared:,} tokens compared, {self.differing:,} differ; "
            f"max |Δ| {self.max_abs:.3g}, mean |Δ| {self.mean_abs:.3g}, KL {self.kl:.3g} a token"
        ]
        rows = [("equal", equal)]
        for low, high, count in zip(self.edges, self.edges[1:], self.counts, strict=False):
            name = f"≤ {high:.0e}" if np.isfinite(high) else f"> {low:.0e}"
            rows.append((name, int(count)))
        most = max(count for _, count in rows)
        lines += [
            f"{name:>8} {count:>12,} {'█' * round(BAR * count / most)}".rstrip() for name, count in rows
        ]
        return "\n".join(lines)


def compare(
    sampled: Sequence[RequestOutput | CompletionOutput | ArrayLike], trained: Sequence[ArrayLike]
) -> Comparison:
    """Compares logprobs token by token, in float64.

    Args:
        sampled: what `LLM.generate` gave with `logprobs=0`, its completions, or their tokens' logprobs.
        trained: one entry per completion: the trainer's logprobs of the same tokens, [output], natural, of the same
            distribution.

    Raises:
        ValueError: the two have different lengths, a value is not finite, or a completion has no logprobs.
    """
    completions: list[CompletionOutput | ArrayLike] = []
    for one in sampled:
        completions += one.outputs if isinstance(one, RequestOutput) else [one]
    if len(completions) != len(trained) or not completions:
        raise ValueError(
            f"sampled has {len(completions)} completions and trained {len(trained)}; give the same, 1 or more"
        )
    every = []
    for i, (one, other) in enumerate(zip(completions, trained, strict=True)):
        a = np.asarray(sampled_logprobs(one) if isinstance(one, CompletionOutput) else one, np.float64)
        b = np.asarray(other, np.float64)
        if a.shape != b.shape or a.ndim != 1:
            raise ValueError(
                f"completion {i}: sampled has shape {a.shape} and trained {b.shape}; give one logprob per output token"
            )
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ValueError(
                f"completion {i} has a logprob that is not finite; compare those of sampled tokens only"
            )
        every.append(b - a)
    delta = np.concatenate(every)
    if not delta.size:
        raise ValueError("sampled holds no token; give at least one")
    size = np.abs(delta)
    counts = np.histogram(-size[size > 0], -EDGES[::-1])[0][::-1]  # negated: numpy's bins are closed below
    return Comparison(
        compared=delta.size,
        differing=int(np.count_nonzero(delta)),
        max_abs=float(size.max()),
        mean_abs=float(size.mean()),
        kl=float(np.mean(np.expm1(delta) - delta)),
        edges=EDGES.copy(),
        counts=counts,
    )


def sampled_logprobs(completion: CompletionOutput) -> Float[np.ndarray, " output"]:
    """The sampler's float32 logprob of every output token; the request must have had `logprobs=0` or more.

    Raises:
        ValueError: it had none.
    """
    if completion.logprobs is None:
        raise ValueError("completion has no logprobs; sample with SamplingParams(logprobs=0)")
    chosen = zip(completion.token_ids, completion.logprobs, strict=True)
    return np.asarray([entry[token].logprob for token, entry in chosen], np.float32)
