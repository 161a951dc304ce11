"""The edge of top-k on Hopper, found by narrowing the ordered bits of x, four bits a launch.

Each launch counts the elements above 15 thresholds, chunk by chunk, and the next one reads those counts: what lies
above the range that is left was counted before, so most pieces soon hold nothing to count.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import interpreting, pl, plgpu
from pallas_kernels.sample.chunks_sm90 import CHUNK, chunks_of, full, launch, sweep, vector
from pallas_kernels.sample.int32 import HIGHEST, LOWEST, from_key
from pallas_kernels.sample.xla import INT32_MAX

SLOTS, STEPS = 16, 8
ABOVE, TIED = 0, 1


def edge(logits, scale, floor, wanted):
    """(x, the last id kept at it) of each row's `wanted` largest that aren't below `floor`, which is finite.

    (−inf, −1) if none are wanted, and −inf if there are fewer.
    """
    count = logits.shape[0]
    narrow, last, cut = (
        _kernel(logits.shape, step, interpreting=interpreting()) for step in ("narrow", "last", "cut")
    )
    operands = logits, scale, floor, wanted.astype(jnp.float32)

    def step(i, state):
        return tuple(narrow(*operands, jnp.full(1, i, jnp.int32), *state))

    # Rows without an edge leave these launches at once; a branch around them would make the host wait for it.
    low, high = jnp.full(count, LOWEST, jnp.int32), jnp.full(count, HIGHEST, jnp.int32)
    state = low, high, jnp.zeros(count), jnp.zeros((count, SLOTS, _width(logits.shape)))
    state = lax.fori_loop(0, STEPS, step, state)
    low, _, base, sums = last(*operands, jnp.full(1, STEPS, jnp.int32), *state)
    return tuple(cut(*operands, low, base, sums))


@functools.cache
def _kernel(shape, step, interpreting):
    return _cut(shape) if step == "cut" else _narrow(shape, step == "last")


def _width(shape):
    """Columns of the table of counts: as many as there are chunks, in whole warps."""
    return -(-chunks_of(shape[1]) // 32) * 32


def _totals(sums_g, row, chunks, totals_s):
    """Sums of the 16 slots over the chunks, into shared memory."""
    width = sums_g.shape[2]
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((4, width), (width // 32,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
    )
    sums = plgpu.load(sums_g.at[row], layout=layout, optimized=False)
    chunk = plgpu.broadcasted_iota(jnp.int32, (SLOTS, width), 1, layout=layout)
    totals_s[...] = jnp.sum(jnp.where(chunk < chunks, sums, 0.0), axis=1)
    plgpu.commit_smem()


def _narrow(shape, last):
    """Reads the counts above the last launch's thresholds, narrows [low, high], counts above new thresholds.

    `base` is the count above high; a launch counts only elements whose keys lie in [low, high]. The last one counts
    those above the edge and those at it.
    """
    chunks = chunks_of(shape[1])

    def sample_narrow(x_g, scale_g, floor_g, wanted_g, step_g, *rest):
        low_g, high_g, base_g, sums_g, low_o, high_o, base_o, sums_o, totals_s = rest
        row, chunk = lax.axis_index("row"), lax.axis_index("chunk")
        wanted = wanted_g[row]

        @pl.when(wanted > 0)
        def _():
            def after(low, high, base):
                _totals(sums_g, row, chunks, totals_s)
                width = lax.shift_right_logical(high - low, jnp.int32(4)) + 1
                new_low, new_high, new_base = low, high, base
                for j in range(SLOTS - 1):
                    new_low = jnp.where(base + totals_s[j] < wanted, new_low, low + (j + 1) * width)
                for j in reversed(range(SLOTS - 1)):
                    threshold = low + (j + 1) * width - 1
                    holds = (base + totals_s[j] < wanted) & (threshold < high)
                    new_high = jnp.where(holds, threshold, new_high)
                    new_base = jnp.where(holds, base + totals_s[j], new_base)
                return new_low, new_high, new_base

            state = low_g[row], high_g[row], base_g[row]
            low, high, base = lax.cond(step_g[0] > 0, after, lambda *same: same, *state)

            @pl.when(chunk == 0)
            def _():
                low_o[row], high_o[row], base_o[row] = low, high, base

            width = lax.shift_right_logical(high - low, jnp.int32(4)) + 1
            edges = [from_key(vector(low + (j + 1) * width - 1)) for j in range(1 if last else SLOTS - 1)]
            bottom, top = from_key(vector(low)), from_key(vector(high))
            scale, floor = vector(scale_g[row]), vector(floor_g[row])

            def visit(pieces, counts):
                values, found = [], full(0)
                for logit, _ in pieces:
                    x = logit * scale
                    inside = (x >= floor) & (x >= bottom) & (x <= top)
                    values.append(jnp.where(inside, x, jnp.nan))  # neither above an edge nor at it
                    found = jnp.where(inside, 1.0, found)

                def add(*counts):
                    for x in values:
                        holds = [x > edge for edge in edges] + ([x == edges[0]] if last else [])
                        counts = tuple(n + jnp.where(h, 1.0, 0.0) for n, h in zip(counts, holds, strict=True))
                    return counts

                return lax.cond(jnp.max(found) > 0, add, lambda *same: same, *counts)

            slots = (ABOVE, TIED) if last else range(SLOTS - 1)
            counts = sweep(x_g, row, chunk, visit, (full(0),) * len(slots))
            for slot, total in zip(slots, counts, strict=True):
                sums_o[row, slot, chunk] = jnp.sum(total)

    bound, value = (jax.ShapeDtypeStruct(shape[:1], dtype) for dtype in (jnp.int32, jnp.float32))
    sums = jax.ShapeDtypeStruct((shape[0], SLOTS, _width(shape)), jnp.float32)
    return launch(sample_narrow, shape, (bound, bound, value, sums), [plgpu.SMEM((SLOTS,), jnp.float32)])


def _cut(shape):
    """The edge as a float, and the last id that is kept of the elements equal to it."""
    chunks = chunks_of(shape[1])

    def sample_cut(x_g, scale_g, floor_g, wanted_g, low_g, base_g, sums_g, edge_o, cut_o, totals_s):
        row, wanted = lax.axis_index("row"), wanted_g[lax.axis_index("row")]

        @pl.when(wanted <= 0)
        def _():
            edge_o[row], cut_o[row] = jnp.float32(-jnp.inf), jnp.int32(-1)

        @pl.when(wanted > 0)
        def _():
            _totals(sums_g, row, chunks, totals_s)
            count, tied = wanted - (base_g[row] + totals_s[ABOVE]), totals_s[TIED]
            scale, edge = vector(scale_g[row]), from_key(vector(low_g[row]))
            edge_o[row] = jnp.max(edge)

            def search():
                """The id of the `count`-th of the tied: the chunk that holds it, then halves of the chunk."""

                def pass_by(chunk, state):
                    home, left = state
                    here = sums_g[row, TIED, chunk]
                    later = (home == chunk) & (left > here)
                    return jnp.where(later, chunk + 1, home), jnp.where(later, left - here, left)

                home, left = lax.fori_loop(0, chunks, pass_by, (jnp.int32(0), count))

                def halve(_, bounds):
                    low, high = bounds
                    middle = (low + high) >> 1
                    upto = vector(middle)

                    def visit(pieces, total):
                        for logit, ids in pieces:
                            here = (logit * scale == edge) & (ids <= upto)
                            total = total + jnp.where(here, 1.0, 0.0)
                        return total

                    enough = jnp.sum(sweep(x_g, row, home, visit, full(0))) >= left
                    return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

                bounds = home * CHUNK, home * CHUNK + CHUNK - 1
                return lax.fori_loop(0, (CHUNK - 1).bit_length(), halve, bounds)[1]

            cut_o[row] = lax.cond(count < tied, search, lambda: jnp.int32(INT32_MAX))

    out_type = jax.ShapeDtypeStruct(shape[:1], jnp.float32), jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    return launch(sample_cut, shape, out_type, [plgpu.SMEM((SLOTS,), jnp.float32)], per_row=True)
