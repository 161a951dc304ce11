"""From summed gradients to new master weights, in one program."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from jaxdet.rl.gradients import GradientSums
from pallas_kernels.arrays import round_up
from pallas_kernels.reduce import pin, row_sum

NORM_COLUMNS = 8192
"""Squares that one row of the norm's sum adds up."""


def global_norm(tree: Any) -> Float[Array, ""]:
    """√ Σ x² over all leaves, in one order: rows of each leaf, the rows' sums, then the leaves.

    Args:
        tree: arrays of any shape and float dtype.

    Returns:
        float32.
    """

    def squares(x: Array) -> Array:
        flat = x.astype(jnp.float32).reshape(-1)
        flat = jnp.pad(flat, (0, round_up(flat.size, NORM_COLUMNS) - flat.size)).reshape(-1, NORM_COLUMNS)
        return row_sum(row_sum(pin(flat * flat)).T)[0, 0]

    return jnp.sqrt(functools.reduce(lambda a, b: pin(a + b), map(squares, jax.tree.leaves(tree))))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def update(
    optimizer: optax.GradientTransformation,
    max_grad_norm: float,
    masters: nnx.State,
    state: optax.OptState,
    sums: GradientSums,
) -> tuple[nnx.State, optax.OptState, Float[Array, ""]]:
    """One optimizer step; `masters` and `state` are donated.

    Args:
        optimizer: elementwise, such as AdamW: masters are packed, so rows and columns mean nothing to it.
        max_grad_norm: a longer gradient is shortened to this (Pascanu et al. 2013, https://arxiv.org/abs/1211.5063,
            algorithm 1).
        masters: float32, in the layout of `llm.params`.
        state: what `optimizer.init(masters)` or the last step gave.
        sums: of all micro-batches of the step.

    Returns:
        The new masters and state, and the gradient's norm (float32) before it was shortened.
    """
    gradient = sums.total()
    norm = global_norm(gradient)
    scale = jnp.minimum(1.0, max_grad_norm / norm)
    changes, state = optimizer.update(jax.tree.map(lambda g: pin(g * scale), gradient), state, masters)
    new: Any = optax.apply_updates(masters, changes)  # type: ignore[arg-type]
    return new, state, norm
