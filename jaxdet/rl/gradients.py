"""Gradients summed over micro-batches, to bits that depend on the sequences and their order alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxdet.models.layers import DecoderLM
from jaxdet.rl.logprobs import logprobs
from jaxdet.rl.packing import MicroBatch
from pallas_kernels.gradient import Trained
from pallas_kernels.reduce import pin


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientSums:
    """What the micro-batches so far add up to, in float32 and in the layout of the parameters."""

    weights: nnx.State
    """The tree of `llm.params`, packed alike; float32."""
    lookup: Array | None
    """The embedding's, where the LM head is the embedding too; apart, because each is summed in its own order."""

    @classmethod
    def zeros(cls, params: nnx.State) -> "GradientSums":
        """Nothing summed yet.

        Args:
            params: the tree of `llm.params`; only shapes matter.
        """
        weights = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
        return cls(weights, None if "embedding" in params else jnp.zeros_like(weights["head"][...]))

    def total(self) -> nnx.State:
        """The gradient of every parameter, float32, in the tree and layout of `llm.params`."""
        if self.lookup is None:
            return self.weights
        return _map_head(lambda head: pin(head + self.lookup), self.weights)


Objective = Callable[..., tuple[Float[Array, ""], Any]]
"""(log-probabilities [T], micro-batch, extra arrays …) -> (what to minimise, anything to report)."""


def accumulate(
    model: DecoderLM,
    sums: GradientSums,
    micro: MicroBatch,
    objective: Objective,
    *extra: Any,
    remat: bool = False,
) -> tuple[GradientSums, Any]:
    """Adds one micro-batch's gradient to the sums, and returns what `objective` reports.

    The sums' bits are the same however the sequences are cut into micro-batches, if `objective` gives a token the same
    cotangent wherever it sits: divide by counts of the whole batch, not of the micro-batch.

    Args:
        model: traced inside `jax.jit`; its parameters in the sampler's dtype and layout.
        sums: donate them.
        micro: what `pack` made.
        objective: see `Objective`.
        extra: given to `objective`, such as the sampler's logprobs [T].
        remat: see `logprobs`.

    Returns:
        The new sums, and what `objective` reported.
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(sums: GradientSums):
        in_training = jax.tree.map(Trained, params, sums.weights)
        if sums.lookup is not None:
            in_training = _map_head(lambda head: dataclasses.replace(head, lookup=sums.lookup), in_training)
        trained: Any = nnx.merge(graph, in_training, rest)
        return objective(logprobs(trained, micro, remat=remat), micro, *extra)

    return jax.grad(loss, has_aux=True)(sums)


def _map_head(change: Callable[[Any], Any], params: nnx.State) -> nnx.State:
    """`params` with the LM head's value changed."""
    is_weight = lambda x: isinstance(x, Trained)  # noqa: E731
    return jax.tree_util.tree_map_with_path(
        lambda path, x: change(x) if path[0].key == "head" else x, params, is_leaf=is_weight
    )
