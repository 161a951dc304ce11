"""Sampling for the xla backend: integer noise, bisection instead of sorting, pinned sums."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.reduce import log_sum_exp, pin, row_sum

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def sample(logits, rows):
    """See `op.sample`."""
    # Not by the maximum: XLA's may lose a NaN on CPUs.
    usable = jnp.all(logits < jnp.inf, axis=1) & jnp.any(logits > -jnp.inf, axis=1)
    greedy = jnp.argmax(logits, axis=1).astype(jnp.int32)
    if rows is None:
        return greedy, usable
    return jnp.where(rows.temperature > 0, _draw(logits, rows), greedy), usable


def token_logprobs(logits, ids, *, top):
    """See `op.token_logprobs`."""
    return normalised(logits, ids, *log_sum_exp(logits), top=top)


def normalised(logits, ids, peak, total, *, top):
    """`token_logprobs` from the logits' largest and the log of the sum of exp(logit − largest), [M, 1] each."""
    normalise = lambda values: pin(pin(values - peak) - total)  # noqa: E731
    own = jnp.take_along_axis(logits, ids[:, None], axis=1)
    column = jnp.arange(logits.shape[1], dtype=jnp.int32)
    ahead = (logits > own) | ((logits == own) & (column[None] < ids[:, None]))
    rank = 1 + jnp.sum(ahead, axis=1, dtype=jnp.int32)
    best, best_ids = lax.top_k(_positive_zero(logits), top)
    return normalise(own)[:, 0], rank, normalise(best), best_ids.astype(jnp.int32)


def _draw(logits, rows):
    x = pin(logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None])
    peak = pin(jnp.max(x, axis=1, keepdims=True))
    floor = jnp.where(rows.min_p > 0, pin(peak[:, 0] + jnp.log(rows.min_p)), -jnp.inf)
    keep = (x >= floor[:, None]) & (x > -jnp.inf)
    keep = lax.cond(jnp.any(rows.top_k > 0), lambda k: _top_k(x, k, rows.top_k), lambda k: k, keep)
    keep = lax.cond(jnp.any(rows.top_p < 1), lambda k: _top_p(x, peak, k, rows.top_p), lambda k: k, keep)
    noisy = pin(x + gumbel(rows.seed, rows.sample_index, rows.position, x.shape[1]))
    return jnp.argmax(jnp.where(keep, noisy, -jnp.inf), axis=1).astype(jnp.int32)


def _positive_zero(x):
    """−0 becomes +0, its equal; XLA drops an addition of 0, and its sorts put −0 first."""
    return jnp.where(x == 0, 0.0, x)


def _ordered(x):
    """float32 → int32 with the same order; −0 counts as +0."""
    bits = lax.bitcast_convert_type(_positive_zero(x), jnp.int32)
    return jnp.where(bits < 0, bits ^ INT32_MAX, bits)


def lowest(holds, rows, low, high, steps):
    """Smallest int32 per row in [low, high] from which on the monotone `holds([rows, 1]) -> [rows, 1]` is true."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        yes = holds(middle)
        return jnp.where(yes, low, middle + 1), jnp.where(yes, middle, high)

    start = jnp.full((rows, 1), low, jnp.int32), jnp.full((rows, 1), high, jnp.int32)
    return lax.fori_loop(0, steps, halve, start)[1]


def _top_k(x, keep, k):
    wanted = jnp.where(k > 0, k, x.shape[1])[:, None]
    key = jnp.where(keep, _ordered(x), INT32_MIN)
    above = lambda t: jnp.sum(key > t, axis=1, keepdims=True, dtype=jnp.int32)  # noqa: E731
    edge = lowest(lambda t: above(t) < wanted, x.shape[0], INT32_MIN, INT32_MAX, 32)
    tied = key == edge
    rank = jnp.cumsum(tied, axis=1, dtype=jnp.int32)
    return keep & ((key > edge) | (tied & (rank <= wanted - above(edge))))


def _top_p(x, peak, keep, p):
    mass = pin(jnp.where(keep, jnp.exp(pin(x - peak)), 0.0))
    limit = pin(row_sum(mass) * p[:, None])
    key = jnp.where(keep, _ordered(x), INT32_MIN)
    # Rounding is monotone, so a sum with fewer terms is never larger and bisection is exact.
    above = lambda t: row_sum(jnp.where(key > t, mass, 0.0))  # noqa: E731
    edge = lowest(lambda t: above(t) < limit, x.shape[0], INT32_MIN, INT32_MAX, 32)
    tied = key == edge
    before = pin(mass * (jnp.cumsum(tied, axis=1, dtype=jnp.int32) - 1))
    kept = keep & ((key > edge) | (tied & (above(edge) + before < limit)))
    return jnp.where((p < 1)[:, None], kept, keep)


def threefry2x32(key, counter):
    """Threefry-2x32 with 20 rounds; `key` and `counter` are pairs of uint32 arrays that broadcast."""
    k0, k1 = key
    schedule = (k0, k1, k0 ^ k1 ^ jnp.uint32(0x1BD11BDA))
    x, y = counter[0] + k0, counter[1] + k1
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = ((y << turn) | (y >> (32 - turn))) ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


def gumbel(seed, sample_index, position, vocab):
    """Gumbel noise [S, vocab], a function of (seed, sample index, position, token id) alone."""
    row = threefry2x32(
        (seed[:, :1], seed[:, 1:]),
        (sample_index[:, None].astype(jnp.uint32), position[:, None].astype(jnp.uint32)),
    )
    bits, _ = threefry2x32(row, (jnp.arange(vocab, dtype=jnp.uint32)[None], jnp.uint32(0)))
    # 23 bits and a half: exact in float32, never 0 or 1.
    uniform = pin(((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23)
    return pin(-jnp.log(-jnp.log(uniform)))
