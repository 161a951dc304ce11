"""Log-probabilities of given tokens, differentiable, through the very kernels that sampled them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdet.models.layers import DecoderLM, head_logits, new_cache
from jaxdet.rl.packing import MicroBatch
from pallas_kernels.arrays import round_up
from pallas_kernels.gradient import (
    Trained,
    cotangent,
    sum_so_far,
    value_of,
    with_gradient,
)
from pallas_kernels.numerics import GRADIENT_ROWS, PAGE_SIZE
from pallas_kernels.rows import over_rows
from pallas_kernels.sample.op import token_logprobs

HEAD_ROWS = {"xla": 512, "mosaic_gpu": 2048, "mosaic_tpu": 512}
"""Most rows of logits alive at once: each block of them reads the whole LM head, and reads and writes the float32 sum
of its gradient, which takes Hopper longer than the product of 512 rows."""


def logprobs(model: DecoderLM, micro: MicroBatch, *, remat: bool = False) -> Float[Array, " T"]:
    """log p(target | tokens up to here) at every token of a micro-batch; bit-equal to what the sampler reported.

    Differentiable with respect to the model's parameters (`nnx.grad`, or `jax.grad` over its state); see
    `jaxdet.rl.accumulate` for sums in float32 whose bits do not depend on the micro-batch's size.

    Args:
        model: with the sampler's weights, dtype and backend.
        micro: what `pack` made.
        remat: keep each layer's input only, and compute the rest again in the backward pass; to the same bits.

    Returns:
        float32, natural, of the raw distribution (temperature 1, no top-p); 0 where no token follows.
    """
    c = model.config
    cache = new_cache(c, model.dtype, micro.num_pages, PAGE_SIZE)
    hidden, _ = model(micro.batch, cache, remat=remat)
    values = _head_logprobs((c, model.backend), model.head[...], hidden, jnp.asarray(micro.targets))
    return jnp.where(micro.scored, values, 0.0)


def _block(static, head, hidden, targets):
    config, backend = static
    logits = head_logits(head, hidden, config, backend)
    return token_logprobs(logits, targets, top=1, backend=backend)[0]


def _head_backward(static, operands, d_logprob):
    head, hidden, targets = operands

    def chunk(sum, hidden, targets, d_logprob):
        def block(gradient, hidden):
            return _block(static, Trained(value_of(head), gradient), hidden, targets)

        return jax.vjp(block, sum, hidden)[1](d_logprob)

    total, d_hidden = over_rows(
        chunk, sum_so_far(head), hidden, targets, d_logprob, size=_block_size(hidden, static[1])
    )
    return cotangent(head, total), d_hidden, None


@with_gradient(_head_backward)
def _head_logprobs(static, head, hidden, targets):
    def block(_, *rows):
        return None, _block(static, value_of(head), *rows)

    return over_rows(block, None, hidden, targets, size=_block_size(hidden, static[1]))[1]


def _block_size(hidden, backend) -> int:
    """Rows of equal blocks, as few blocks as may be."""
    rows = hidden.shape[0]
    blocks = -(-rows // HEAD_ROWS[backend])
    return round_up(-(-rows // blocks), GRADIENT_ROWS)
