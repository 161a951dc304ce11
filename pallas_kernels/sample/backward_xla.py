"""The gradient of a log-probability in XLA, a chunk of rows at a time; saves nothing, and computes both sums again."""

import jax.numpy as jnp

from pallas_kernels.reduce import log_sum_exp, pin
from pallas_kernels.rows import over_rows


def forward(kernel, logits, ids, *, top):
    """(the kernel's results, nothing else)."""
    return kernel.token_logprobs(logits, ids, top=top), None


def token_logprobs(logits, ids, _saved, d_logprob):
    """d logits = (one-hot − softmax) · d logprob, in float32."""

    def chunk(_, logits, ids, d_logprob):
        peak, total = log_sum_exp(logits)
        probs = pin(jnp.exp(pin(pin(logits - peak) - total)))
        chosen = jnp.arange(logits.shape[1], dtype=jnp.int32)[None] == ids[:, None]
        return None, pin((jnp.where(chosen, 1.0, 0.0) - probs) * d_logprob[:, None])

    return over_rows(chunk, None, logits, ids, d_logprob)[1]
