"""Sampling on TPUs: ROWS rows of logits at a time, whole, in vector memory, swept in chunks of `WIDE_REDUCE_LANES`.

The arithmetic is the xla backend's: x = logit / temperature, the same integer noise, edges of top-k and top-p found by
bisection over the ordered bits of x, ties cut at an id found by bisection over ids. A sum runs over chunks ascending,
lane by lane; then the upper half of the lanes is added to the lower half until one is left. Rows share registers and
nothing else; whether a block of rows needs a sweep touches no row's bits.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.arrays import round_up
from pallas_kernels.compat import pl, pltpu
from pallas_kernels.numerics import WIDE_REDUCE_LANES
from pallas_kernels.reduce import pin
from pallas_kernels.sample.int32 import HIGHEST, LOWEST, from_key, gumbel, noise_keys
from pallas_kernels.sample.xla import INT32_MAX, lowest
from pallas_kernels.tiles_tpu import LANES, VMEM_LIMIT

ROWS = 8
"""Sublanes of a float32 tile."""

MOST_TOKENS = 2**18
"""Rows of this length still fit vector memory."""

EVERYTHING = 2.0**24
"""More than any number of tokens, and exact in float32."""


def sample(logits, rows):
    """See `op.sample`; up to 2¹⁸ tokens."""
    if rows is None:
        greedy, peak, _ = _launch(_greedy, logits)
        return greedy, jnp.isfinite(lax.bitcast_convert_type(peak, jnp.float32))
    drawn = rows.temperature > 0
    temperature = jnp.where(drawn, rows.temperature, 1.0)
    numbers = _columns(temperature, rows.top_k.astype(jnp.float32), rows.top_p, rows.min_p)
    keys = _columns(*noise_keys(rows))
    wanted = drawn, drawn & (rows.top_k > 0), drawn & (rows.top_p < 1)
    greedy, peak, token = _launch(_sample, logits, numbers, keys, wanted=wanted)
    return jnp.where(drawn, token, greedy), jnp.isfinite(lax.bitcast_convert_type(peak, jnp.float32))


def token_logprobs(logits, ids, *, top):
    """See `op.token_logprobs`; up to 2¹⁸ tokens."""
    own = jnp.take_along_axis(logits, ids[:, None], axis=1)[:, 0]
    rank, peak, total = _launch(_logprobs, logits, _columns(own), _columns(ids.astype(jnp.int32)))
    peak, total = (lax.bitcast_convert_type(x, jnp.float32) for x in (peak, total))
    best, best_ids = lax.top_k(jnp.where(logits == 0, 0.0, logits), top)  # −0 and +0 are a tie
    best = pin(pin(best - peak[:, None]) - total[:, None])
    return pin(pin(own - peak) - total), rank, best, best_ids.astype(jnp.int32)


def _columns(*values):
    """[rows] arrays side by side, as the columns of one [rows, 128]."""
    return jnp.pad(jnp.stack(values, axis=1), ((0, 0), (0, LANES - len(values))))


def _launch(body, logits, *columns, wanted=()):
    """Runs `body` over blocks of ROWS rows; returns its results, one int32 a row each.

    Args:
        columns: [rows, 128] operands.
        wanted: bool [rows] arrays; `body` learns of each whether any row of its block wants it.
    """
    count, vocab = logits.shape
    if vocab > MOST_TOKENS:
        raise ValueError(f"logits: {vocab} tokens; mosaic_tpu takes up to {MOST_TOKENS}; use backend='xla'")
    fill = -count % ROWS
    width, blocks = round_up(vocab, WIDE_REDUCE_LANES), (count + fill) // ROWS
    flags = [jnp.pad(w, (0, fill)).reshape(blocks, ROWS).any(axis=1).astype(jnp.int32) for w in wanted]
    column = pl.BlockSpec((ROWS, LANES), lambda i, *_: (i, 0))
    out = pl.pallas_call(
        functools.partial(body, vocab=vocab),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(flags),
            grid=(blocks,),
            in_specs=[pl.BlockSpec((ROWS, width), lambda i, *_: (i, 0)), *[column] * len(columns)],
            out_specs=column,
            scratch_shapes=[pltpu.VMEM((ROWS, width), jnp.float32)] * 2 if wanted else [],
        ),
        out_shape=jax.ShapeDtypeStruct((count + fill, LANES), jnp.int32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT),
        name=body.__name__.strip("_"),
    )(*flags, logits, *(jnp.pad(x, ((0, fill), (0, 0))) for x in columns))
    return out[:count, 0], out[:count, 1], out[:count, 2]


def _sweep(width, visit, state):
    """`visit(columns, ids, state)` over the chunks of a row, ascending."""

    def chunk(c, state):
        start = pl.multiple_of(c * WIDE_REDUCE_LANES, WIDE_REDUCE_LANES)
        ids = lax.broadcasted_iota(jnp.int32, (ROWS, WIDE_REDUCE_LANES), 1) + start
        return visit(pl.ds(start, WIDE_REDUCE_LANES), ids, state)

    return lax.fori_loop(0, width // WIDE_REDUCE_LANES, chunk, state)


def _full(value, dtype=jnp.float32):
    return jnp.full((ROWS, WIDE_REDUCE_LANES), value, dtype)


def _sum(width, term):
    """Σ term(columns, ids) per row, [ROWS, 1], in the order that this page names."""
    total = _sweep(width, lambda at, ids, total: total + term(at, ids), _full(0))
    lanes = WIDE_REDUCE_LANES
    while lanes > LANES:
        lanes //= 2
        total = total[:, :lanes] + total[:, lanes:]
    while lanes > 1:
        lanes //= 2
        total = total + pltpu.roll(total, LANES - lanes, 1)  # lane i meets lane i + lanes
    return total[:, :1]


def _count(width, holds):
    """How many tokens `holds`, as a float32: exact below 2²⁴."""
    return _sum(width, lambda at, ids: jnp.where(holds(at, ids), 1.0, 0.0))


def _best(width, value):
    """Largest value(columns, ids) of every row and the lowest id that has it; NaN never wins."""

    def visit(at, ids, state):
        best, first = state
        x = value(at, ids)
        better = x > best
        return jnp.where(better, x, best), jnp.where(better, ids, first)

    best, first = _sweep(width, visit, (_full(-jnp.inf), _full(INT32_MAX, jnp.int32)))
    peak = jnp.max(best, axis=1, keepdims=True)
    # Ids are exact in float32, whose minimum every TPU has.
    ids = jnp.where((best == peak) & (first < INT32_MAX), first.astype(jnp.float32), EVERYTHING)
    lowest = jnp.min(ids, axis=1, keepdims=True)
    return peak, jnp.where(lowest == EVERYTHING, 0.0, lowest).astype(jnp.int32)


def _largest(width, x):
    """(largest logit, NaN if there is any NaN; the lowest id that has it)."""

    def visit(at, ids, bad):
        value = x(at, ids)
        return jnp.where(value == value, bad, 1.0)

    bad = jnp.max(_sweep(width, visit, _full(0)), axis=1, keepdims=True)
    peak, first = _best(width, x)
    return jnp.where(bad > 0, jnp.nan, peak), first


def _within(logits_ref, vocab):
    """x(columns, ids): the logits, −inf past the vocabulary, where the block holds anything."""
    return lambda at, ids: jnp.where(ids < vocab, logits_ref[:, at], -jnp.inf)


def _keep(x_ref, edge, last_id):
    """Drops, as −inf, what is below the edge or tied with it and past `last_id`."""

    def visit(at, ids, _):
        x = x_ref[:, at]
        x_ref[:, at] = jnp.where((x > edge) | ((x == edge) & (ids <= last_id)), x, -jnp.inf)

    _sweep(x_ref.shape[1], visit, None)


def _top_k(x_ref, k):
    width = x_ref.shape[1]
    wanted = jnp.where(k > 0, k, EVERYTHING)
    above = lambda edge: _count(width, lambda at, _: x_ref[:, at] > edge)  # noqa: E731
    edge = from_key(lowest(lambda key: above(from_key(key)) < wanted, ROWS, LOWEST, HIGHEST, 32))
    left = wanted - above(edge)
    tied = lambda last: _count(width, lambda at, ids: (x_ref[:, at] == edge) & (ids <= last))  # noqa: E731
    _keep(x_ref, edge, lowest(lambda last: tied(last) >= left, ROWS, 0, width - 1, width.bit_length()))


def _top_p(x_ref, mass_ref, peak, p):
    width = x_ref.shape[1]

    def weigh(at, *_):
        mass_ref[:, at] = jnp.exp(x_ref[:, at] - peak)

    _sweep(width, weigh, None)
    limit = jnp.where(p < 1, _sum(width, lambda at, _: mass_ref[:, at]) * p, jnp.inf)
    # Rounding is monotone, so a sum with fewer terms is never larger and bisection is exact.
    above = lambda edge: _sum(width, lambda at, _: jnp.where(x_ref[:, at] > edge, mass_ref[:, at], 0.0))  # noqa: E731
    edge = from_key(lowest(lambda key: above(from_key(key)) < limit, ROWS, LOWEST, HIGHEST, 32))
    beyond = above(edge)
    mass, _ = _best(width, lambda at, _: jnp.where(x_ref[:, at] == edge, mass_ref[:, at], 0.0))
    before = lambda last: _count(width, lambda at, ids: (x_ref[:, at] == edge) & (ids < last))  # noqa: E731
    full = lambda last: beyond + mass * before(last) >= limit  # noqa: E731
    _keep(x_ref, edge, lowest(full, ROWS, 1, width, width.bit_length()) - 1)


def _write(out_ref, *columns):
    """int32 results side by side, one a lane."""
    lane = lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
    out = jnp.zeros((ROWS, LANES), jnp.int32)
    for index, column in enumerate(columns):
        out = jnp.where(lane == index, column, out)
    out_ref[...] = out


def _bits(x):
    return lax.bitcast_convert_type(x, jnp.int32)


def _greedy(logits_ref, out_ref, *, vocab):
    """(greedy token, bits of the largest logit)."""
    peak, greedy = _largest(logits_ref.shape[1], _within(logits_ref, vocab))
    _write(out_ref, greedy, _bits(peak))


def _sample(
    drawn_ref, by_k_ref, by_p_ref, logits_ref, numbers_ref, keys_ref, out_ref, x_ref, mass_ref, *, vocab
):
    """(greedy token, bits of the largest logit, drawn token)."""
    block, width = pl.program_id(0), x_ref.shape[1]
    logits = _within(logits_ref, vocab)
    peak, greedy = _largest(width, logits)
    _write(out_ref, greedy, _bits(peak))

    @pl.when(drawn_ref[block] != 0)
    def _():
        temperature, top_k, top_p, min_p = (numbers_ref[:, i : i + 1] for i in range(4))
        largest = peak / temperature
        floor = jnp.where(min_p > 0, largest + jnp.log(min_p), -jnp.inf)

        def scale(at, ids, _):
            x = logits(at, ids) / temperature
            x_ref[:, at] = jnp.where(x >= floor, x, -jnp.inf)

        _sweep(width, scale, None)

        @pl.when(by_k_ref[block] != 0)
        def _():
            _top_k(x_ref, top_k)

        @pl.when(by_p_ref[block] != 0)
        def _():
            _top_p(x_ref, mass_ref, largest, top_p)

        key = keys_ref[:, :1], keys_ref[:, 1:2]
        _, token = _best(width, lambda at, ids: x_ref[:, at] + gumbel(ids, key))
        _write(out_ref, greedy, _bits(peak), token)


def _logprobs(logits_ref, own_ref, ids_ref, out_ref, *, vocab):
    """(rank of the given token, bits of the largest logit, bits of log Σ exp(x − largest))."""
    width, x = logits_ref.shape[1], _within(logits_ref, vocab)
    own, own_id = own_ref[:, :1], ids_ref[:, :1]

    def ahead(at, ids):
        value = x(at, ids)
        return (value > own) | ((value == own) & (ids < own_id))

    peak, _ = _largest(width, x)
    total = _sum(width, lambda at, ids: jnp.exp(x(at, ids) - peak))
    _write(out_ref, 1 + _count(width, ahead).astype(jnp.int32), _bits(peak), _bits(jnp.log(total)))
