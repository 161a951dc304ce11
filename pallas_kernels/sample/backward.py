"""Gradient of a token's log-probability: d logits = (one-hot − softmax) · d logprob, a chunk of rows at a time."""

import jax.numpy as jnp

from pallas_kernels.reduce import log_sum_exp, pin
from pallas_kernels.rows import over_rows


def token_logprobs(static, operands, cotangents):
    """Cotangents of (logits, ids); what is returned of the `top` largest has none."""
    logits, ids = operands

    def chunk(_, logits, ids, d_logprob):
        peak, total = log_sum_exp(logits)
        probs = pin(jnp.exp(pin(pin(logits - peak) - total)))
        chosen = jnp.arange(logits.shape[1], dtype=jnp.int32)[None] == ids[:, None]
        return None, pin((jnp.where(chosen, 1.0, 0.0) - probs) * d_logprob[:, None])

    return over_rows(chunk, None, logits, ids, cotangents[0])[1], None
