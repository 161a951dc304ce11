"""The edge of top-k on Hopper: one launch, a CTA a row, that reads a few of the logits.

The reading that finds the largest logit leaves that of every group of PIECE ids, too. The `wanted` groups with the
largest maxima hold an element each that isn't below the `wanted`-th of these maxima. So that is a bound: the edge isn't
below it, and only groups whose maximum isn't below it hold anything from the edge on. They are about `wanted` groups,
more if many maxima are tied, and all of them if more elements are wanted than there are groups; nothing else is read.

Edges are found by narrowing a range of keys, the ordered bits of x, and the last id kept of those tied at the edge by
narrowing a range of ids. Counts are integers, whose sums have no order.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import interpreting, pl, plgpu
from pallas_kernels.sample.chunks_sm90 import PIECE, full, groups_of, launch, piece, vector
from pallas_kernels.sample.int32 import HIGHEST, from_key, to_key
from pallas_kernels.sample.xla import INT32_MAX

TOGETHER = 8
"""Groups that are in flight at a time."""


def edge(logits, groups, scale, floor, wanted):
    """(x, the last id kept at it) of each row's `wanted` largest that aren't below `floor`, which is finite.

    (−inf, −1) if none are wanted, and −inf if there are fewer. `groups` is the largest logit of each group.
    """
    operands = logits, groups, scale, to_key(floor), wanted.astype(jnp.int32)
    return tuple(_kernel(logits.shape, interpreting())(*operands))


def _narrow(over, value, threshold, low, high, wanted):
    """The highest key up to `high` from which on `wanted` or more values lie; `low` if there is none above it.

    A key from which on exactly `wanted` lie is as good as the highest, and ends the search.

    Args:
        over: `over(visit, state)` folds `visit([(x, ids)], state)` over all that may count.
        value: (x, ids) → the values.
        threshold: key → the lowest value that isn't below it.
    """

    def step(state):
        low, high, found = state
        width = lax.shift_right_logical(high - low, jnp.int32(2)) + 1
        keys = [low + width, low + 2 * width, low + 3 * width]
        edges = [threshold(key) for key in keys]

        def visit(pieces, counts):
            for x, ids in pieces:
                this = value(x, ids)
                counts = tuple(n + jnp.where(this >= e, 1, 0) for n, e in zip(counts, edges, strict=True))
            return counts

        counts = [jnp.sum(n) for n in over(visit, (full(0, jnp.int32),) * len(keys))]
        for key, count in zip(keys, counts, strict=True):
            low, found = jnp.where(count >= wanted, key, low), jnp.where(count >= wanted, count, found)
            high = jnp.where(count < wanted, jnp.minimum(high, key - 1), high)
        return low, high, found

    unfinished = lambda state: (state[0] < state[1]) & (state[2] != wanted)  # noqa: E731
    return lax.while_loop(unfinished, step, (low, high, jnp.int32(-1)))[0]


def _least(over, value, edge, empty):
    """(how many values aren't below `edge`, the least of them)."""

    def visit(pieces, state):
        count, least = state
        for x, ids in pieces:
            this = value(x, ids)
            inside = this >= edge
            count = count + jnp.where(inside, 1, 0)
            least = jnp.minimum(least, jnp.where(inside, this, empty))
        return count, least

    count, least = over(visit, (full(0, jnp.int32), full(empty, empty.dtype)))
    return jnp.sum(count), jnp.min(least)


@functools.cache
def _kernel(shape, _interpreting):
    vocab, groups = shape[1], groups_of(shape[1])

    def sample_edge(x_g, groups_g, scale_g, floor_g, wanted_g, edge_o, cut_o, listed_s):
        row, wanted = lax.axis_index("row"), wanted_g[lax.axis_index("row")]

        @pl.when(wanted <= 0)
        def _():
            edge_o[row], cut_o[row] = jnp.float32(-jnp.inf), jnp.int32(-1)

        @pl.when(wanted > 0)
        def _():
            scale, floor = vector(scale_g[row]), floor_g[row]
            peaks, highest = [], full(floor - 1, jnp.int32)
            for start in range(0, groups_g.shape[1], PIECE):
                peak, group = piece(groups_g, row, start)
                peak = jnp.where(group < groups, peak * scale, -jnp.inf)
                peaks.append((peak, group))  # the largest x, too: rounding keeps the order of logits
                highest = jnp.maximum(highest, to_key(peak))
            highest = jnp.minimum(jnp.max(highest), HIGHEST)  # a NaN's key is higher

            x_of, float_of = lambda x, ids: x, lambda key: from_key(vector(key))
            everywhere = lambda visit, state: visit(peaks, state)  # noqa: E731
            bound = _narrow(everywhere, x_of, float_of, floor - 1, highest, wanted)
            least = jnp.max(float_of(jnp.maximum(bound, floor)))

            def append(i, count):
                """Writes down every group and goes on to the next place where it was one to read."""
                near = [(i * TOGETHER + j, groups_g[row, i * TOGETHER + j]) for j in range(TOGETHER)]
                for group, peak in near:
                    listed_s[count] = group
                    count = count + jnp.where((peak * scale_g[row] >= least) & (group < groups), 1, 0)
                return count

            count = lax.fori_loop(0, pl.cdiv(groups, TOGETHER), append, jnp.int32(0))
            for j in range(TOGETHER):
                listed_s[count + j] = jnp.int32(groups)  # past the row's end, where x is −inf
            plgpu.commit_smem()  # no thread reads while another still writes

            def over(visit, state):
                def several(i, state):
                    found = []
                    for j in range(TOGETHER):
                        x, ids = piece(x_g, row, listed_s[i * TOGETHER + j] * PIECE)
                        found.append((x * scale, ids))
                    return visit(found, state)

                return lax.fori_loop(0, pl.cdiv(count, jnp.int32(TOGETHER)), several, state)

            key = _narrow(over, x_of, float_of, bound, highest, wanted)
            kept, edge = _least(over, x_of, float_of(key), jnp.float32(jnp.inf))
            edge_o[row] = jnp.where(key < floor, -jnp.inf, edge)

            def last():
                """The id of the last that is kept of those tied at the edge."""
                tied = lambda x, ids: jnp.where(x == vector(edge), ids, -1)  # noqa: E731
                dropped = kept - wanted
                first = _narrow(over, tied, vector, jnp.int32(0), jnp.int32(vocab - 1), dropped + 1)
                return _least(over, tied, vector(first), jnp.int32(INT32_MAX))[1]

            tie = (key >= floor) & (kept > wanted)
            cut_o[row] = lax.cond(tie, last, lambda: jnp.int32(INT32_MAX))

    out_type = jax.ShapeDtypeStruct(shape[:1], jnp.float32), jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    scratch = [plgpu.SMEM((groups + TOGETHER,), jnp.int32)]
    return launch(sample_edge, shape, out_type, scratch, per_row=True)
