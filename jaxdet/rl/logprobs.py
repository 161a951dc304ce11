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
"""Most rows of a block of logits: each block reads the whole LM head, and reads and writes the float32 sum
of its gradient, which takes Hopper longer than the product of 512 rows."""
KEEP_LOGITS = {"mosaic_gpu"}
"""Where the backward pass finds the logits, 4 bytes for every word at every token, unless layers are rematerialised;
elsewhere it computes them again, a block at a time."""


def logprobs(model: DecoderLM, micro: MicroBatch, *, remat: bool = False) -> Float[Array, " T"]:
    """log p(target | tokens up to here) at every token of a micro-batch; bit-equal to what the sampler reported.

    Differentiable with respect to the model's parameters (`nnx.grad`, or `jax.grad` over its state); see
    `jaxdet.rl.accumulate` for sums in float32 whose bits do not depend on the micro-batch's size.

    Args:
        model: with the sampler's weights, dtype and backend.
        micro: what `pack` made.
        remat: keep each layer's input only, and compute the rest again in the backward pass, the logits too; to the
            same bits.

    Returns:
        float32, natural, of the raw distribution (temperature 1, no top-p); 0 where no token follows.
    """
    c = model.config
    cache = new_cache(c, model.dtype, micro.num_pages, PAGE_SIZE)
    hidden, _ = model(micro.batch, cache, remat=remat)
    static = c, model.backend, model.backend in KEEP_LOGITS and not remat
    values = _head_logprobs(static, model.head[...], hidden, jnp.asarray(micro.targets))
    return jnp.where(micro.scored, values, 0.0)


def _head_backward(static, operands, kept, d_logprob):
    (config, backend, _), (head, hidden, targets) = static, operands

    def block(sum, hidden, targets, d_logprob, kept=None):
        def logits_of(gradient, hidden):
            return head_logits(Trained(value_of(head), gradient), hidden, config, backend)

        logits, pull = jax.vjp(logits_of, sum, hidden)  # no product if nobody reads its result
        logits = logits if kept is None else kept
        (d_logits,) = jax.vjp(lambda x: _of_targets(x, targets, backend), logits)[1](d_logprob)
        return pull(d_logits)

    total, size, rows = sum_so_far(head), _block_size(hidden, backend), (hidden, targets, d_logprob)
    if kept is None:
        total, d_hidden = over_rows(block, total, *rows, size=size)
    else:
        parts = []
        for logits, *few in zip(kept, *(_blocks(x, size) for x in rows), strict=True):
            total, part = block(total, *few, kept=logits)
            parts.append(part)
        d_hidden = jnp.concatenate(parts)
    return cotangent(head, total), d_hidden, None


def _head_saving(static, head, hidden, targets):
    """Logprobs, and the logits of every block if they are kept."""
    (config, backend, keep), size = static, _block_size(hidden, static[1])
    if not keep:
        return _values(static, head, hidden, targets), None
    logits = [head_logits(value_of(head), part, config, backend) for part in _blocks(hidden, size)]
    pairs = zip(logits, _blocks(targets, size), strict=True)
    return jnp.concatenate([_of_targets(*pair, backend) for pair in pairs]), logits


def _values(static, head, hidden, targets):
    config, backend, _ = static

    def block(_, hidden, targets):
        logits = head_logits(value_of(head), hidden, config, backend)
        return None, _of_targets(logits, targets, backend)

    return over_rows(block, None, hidden, targets, size=_block_size(hidden, backend))[1]


_head_logprobs = with_gradient(_head_backward, _head_saving)(_values)


def _of_targets(logits, targets, backend):
    return token_logprobs(logits, targets, top=1, backend=backend)[0]


def _blocks(x, size: int) -> list:
    """Not a scan: it would copy each block's logits in and out."""
    return [x[first : first + size] for first in range(0, x.shape[0], size)]


def _block_size(hidden, backend) -> int:
    """Rows of equal blocks, as few blocks as may be."""
    rows = hidden.shape[0]
    blocks = -(-rows // HEAD_ROWS[backend])
    return round_up(-(-rows // blocks), GRADIENT_ROWS)
