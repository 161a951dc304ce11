"""Sampling on Hopper: every launch reads the logits once, in chunks of a row that all SMs share.

The largest logit → the edge of top-k → the edge of top-p → the largest noisy logit. An edge is found by narrowing the
ordered bits of x, four bits a launch. Each launch sums, over the elements above 15 thresholds, 1 (top-k) or
2^((x − max) · log2 e) (top-p), and the next one reads those sums. The order of a sum depends on the row alone: what
lies above the range that is left was summed before; within it a thread adds its elements of a chunk in ascending id,
Mosaic's tree adds 128 threads, another one adds chunks.

x = logit · (1 / temperature), rounded; noise and ties as `op.sample` says.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import add_rounded, interpreting, pl, plgpu, require_hopper
from pallas_kernels.reduce import pin
from pallas_kernels.sample.chunks_sm90 import (
    CHUNK,
    LOADS,
    LOG2_E,
    PIECE,
    VECTOR,
    aligned,
    chunks_of,
    full,
    load_piece,
    vector,
)
from pallas_kernels.sample.int32 import HIGHEST, LOWEST, from_key, gumbel, noise_keys
from pallas_kernels.sample.logprobs_sm90 import token_logprobs
from pallas_kernels.sample.xla import INT32_MAX

__all__ = ["sample", "token_logprobs"]

SLOTS, SUMS, STEPS = 16, 128, 8
ABOVE, TIED, ALL = 0, 1, SLOTS - 1
NOISE_MAX = 17.0
"""Above every Gumbel value: −log(−log(1 − 2^−24)) = 16.64."""
TABLE = plgpu.Layout.TILED(plgpu.Tiling(((4, 128), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def sample(logits, rows):
    """See `op.sample`."""
    require_hopper("sample")
    vocab = logits.shape[1]
    logits = aligned(logits)
    if chunks_of(logits.shape[1]) > SUMS:
        raise ValueError(f"sample: {vocab} tokens; mosaic_gpu takes up to {SUMS * CHUNK}; use backend='xla'")
    best, first = _kernel(logits.shape, "peak", interpreting=interpreting())(logits)
    peak = jnp.max(best, axis=1)
    greedy, usable = _earliest(best, first), jnp.isfinite(peak)
    if rows is None:
        return greedy, usable
    return jnp.where(rows.temperature > 0, _drawn(logits, peak, rows), greedy), usable


def _drawn(logits, peak, rows):
    common, by_k, by_p = edges(logits, peak, rows)
    active = (rows.temperature > 0).astype(jnp.int32)
    best, first = _kernel(logits.shape, "draw", interpreting=interpreting())(
        *common, *by_k, *by_p, active, *noise_keys(rows)
    )
    return _earliest(best, first)


def edges(logits, peak, rows):
    """((logits, scale, largest x, min-p's floor), top-k's edge, top-p's edge); an edge is (x, last id kept at it)."""
    count, drawn = logits.shape[0], rows.temperature > 0
    scale = jnp.where(drawn, 1.0 / jnp.where(drawn, rows.temperature, 1.0), 1.0)
    peak = pin(peak * scale)
    floor = jnp.where(rows.min_p > 0, pin(peak + jnp.log(rows.min_p)), -jnp.inf)
    common = logits, scale, peak, floor
    call = functools.partial(_kernel, logits.shape, interpreting=interpreting())

    def edge(weigh, active, target, before):
        operands = *common, *before, active.astype(jnp.int32), target
        narrow, last = call("narrow", weigh), call("last", weigh)

        def step(i, state):
            return tuple(narrow(*operands, jnp.full(1, i, jnp.int32), *state))

        # Rows without an edge leave these launches at once; a branch around them would make the host wait for it.
        low, high = jnp.full(count, LOWEST, jnp.int32), jnp.full(count, HIGHEST, jnp.int32)
        nothing = jnp.zeros(count)
        state = low, high, nothing, nothing, jnp.zeros((count, SLOTS, SUMS))
        state = lax.fori_loop(0, STEPS, step, state)
        low, _, base, limit, sums = last(*operands, jnp.full(1, STEPS, jnp.int32), *state)
        return tuple(call("cut", weigh)(*operands, low, base, limit, sums))

    everything = jnp.full(count, -jnp.inf), jnp.full(count, -1, jnp.int32)
    by_k = edge(False, drawn & (rows.top_k > 0), rows.top_k.astype(jnp.float32), everything)
    return common, by_k, edge(True, drawn & (rows.top_p < 1), rows.top_p, by_k)


def _earliest(best, ids):
    """Per row the id that goes with the largest of `best`, the lowest id of several."""
    top = jnp.max(best, axis=1, keepdims=True)
    found = jnp.min(jnp.where(best == top, ids, INT32_MAX), axis=1)
    return jnp.where(found == INT32_MAX, 0, found)


def _sweep(x_g, row, chunk, visit, state):
    """`visit(x, ids, state)` over the pieces of a chunk, ids ascending; past the row's end x is −inf."""
    vocab = x_g.shape[1]

    def several(i, state):
        begin = chunk * CHUNK + i * (LOADS * PIECE)
        pieces = []
        for j in range(LOADS):
            wanted = begin + j * PIECE
            _, x, ids = load_piece(x_g, row, wanted)
            pieces.append((jnp.where(ids >= wanted, x, -jnp.inf), ids))
        return visit(pieces, state)

    left = jnp.minimum(vocab - chunk * CHUNK, CHUNK)
    return lax.fori_loop(0, pl.cdiv(left, jnp.int32(LOADS * PIECE)), several, state)


def _kept(x, ids, floor, edge, cut):
    """Whether min-p and one edge keep each element."""
    return (x > -jnp.inf) & (x >= floor) & ((x > edge) | ((x == edge) & (ids <= cut)))


def _better(value, ids, state):
    best, first = state
    better = value > best
    return jnp.where(better, value, best), jnp.where(better, ids, first)


def _write_best(best, first, value, best_g, first_g, row, chunk):
    """`value`'s largest, which is `best`'s unless a NaN is among it, and the lowest id of `best`'s."""
    best_g[row, chunk] = jnp.max(value)
    earliest = jnp.where(best == vector(jnp.max(best)), first, jnp.int32(INT32_MAX))
    first_g[row, chunk] = jnp.min(earliest)


@functools.cache
def _kernel(shape, step, weigh=False, interpreting=False):
    return {"peak": _peak, "narrow": _narrow, "last": _narrow, "cut": _cut, "draw": _draw}[step](
        shape, weigh, step == "last"
    )


def _launch(body, shape, out_type, scratch=(), *, per_row=False, approximate=True):
    chunks = 1 if per_row else chunks_of(shape[1])
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(shape[0], chunks),
        grid_names=("row", "chunk"),
        compiler_params=plgpu.CompilerParams(approx_math=approximate),
    )


def _per_chunk(shape):
    size = shape[0], chunks_of(shape[1])
    return jax.ShapeDtypeStruct(size, jnp.float32), jax.ShapeDtypeStruct(size, jnp.int32)


def _peak(shape, _weigh, _last):
    """Per chunk the largest logit and its lowest id."""

    def sample_peak(x_g, best_g, first_g):
        row, chunk = lax.axis_index("row"), lax.axis_index("chunk")

        def visit(pieces, state):
            best, first, largest = state
            for x, ids in pieces:
                best, first = _better(x, ids, (best, first))
                largest = jnp.maximum(largest, x)  # a NaN stays
            return best, first, largest

        state = full(-jnp.inf), full(INT32_MAX, jnp.int32), full(-jnp.inf)
        best, first, largest = _sweep(x_g, row, chunk, visit, state)
        _write_best(best, first, largest, best_g, first_g, row, chunk)

    return _launch(sample_peak, shape, _per_chunk(shape))


def _totals(sums_g, row, chunks, totals_s):
    """Sums of the 16 slots over the chunks, into shared memory."""
    sums = plgpu.load(sums_g.at[row], layout=TABLE, optimized=False)
    chunk = plgpu.broadcasted_iota(jnp.int32, (SLOTS, SUMS), 1, layout=TABLE)
    totals_s[...] = jnp.sum(jnp.where(chunk < chunks, sums, 0.0), axis=1)
    plgpu.commit_smem()


def _weights(x, keep, peak, weigh):
    weight = jnp.exp2(add_rounded(x, -peak, VECTOR) * LOG2_E) if weigh else full(1)
    return jnp.where(keep, weight, 0.0)


def _narrow(shape, weigh, last):
    """Reads the sums above the last launch's thresholds, narrows (low, high], sums above new thresholds.

    `base` is the sum above high: what a launch sums is only the elements whose keys lie in [low, high], and most
    pieces soon hold none.
    """
    chunks = chunks_of(shape[1])
    thresholds = 1 if last else SLOTS - 1

    def sample_narrow(x_g, scale_g, peak_g, floor_g, edge_g, cut_g, active_g, target_g, step_g, *rest):
        low_g, high_g, base_g, limit_g, sums_g, low_o, high_o, base_o, limit_o, sums_o, totals_s = rest
        row, chunk = lax.axis_index("row"), lax.axis_index("chunk")

        @pl.when(active_g[row] != 0)
        def _():
            def after(low, high, base, limit):
                _totals(sums_g, row, chunks, totals_s)
                target = target_g[row]
                limit = jnp.where(step_g[0] == 1, target * totals_s[ALL] if weigh else target, limit)
                width = lax.shift_right_logical(high - low, jnp.int32(4)) + 1
                new_low, new_high, new_base = low, high, base
                for j in range(SLOTS - 1):
                    new_low = jnp.where(base + totals_s[j] < limit, new_low, low + (j + 1) * width)
                for j in reversed(range(SLOTS - 1)):
                    threshold = low + (j + 1) * width - 1
                    holds = (base + totals_s[j] < limit) & (threshold < high)
                    new_high = jnp.where(holds, threshold, new_high)
                    new_base = jnp.where(holds, base + totals_s[j], new_base)
                return new_low, new_high, new_base, limit

            state = low_g[row], high_g[row], base_g[row], limit_g[row]
            low, high, base, limit = lax.cond(step_g[0] > 0, after, lambda *same: same, *state)

            @pl.when(chunk == 0)
            def _():
                low_o[row], high_o[row], base_o[row], limit_o[row] = low, high, base, limit

            width = lax.shift_right_logical(high - low, jnp.int32(4)) + 1
            edges = [from_key(vector(low + (j + 1) * width - 1)) for j in range(thresholds)]
            bottom, top = from_key(vector(low)), from_key(vector(high))
            scale, peak, floor = (vector(ref[row]) for ref in (scale_g, peak_g, floor_g))
            edge, cut = vector(edge_g[row]), vector(cut_g[row])

            def visit(pieces, state):
                found = full(0)
                for logit, _ in pieces:
                    x = logit * scale
                    found = jnp.where((x >= bottom) & (x <= top), 1.0, found)

                def add(*state):
                    for logit, ids in pieces:
                        x = logit * scale
                        keep = _kept(x, ids, floor, edge, cut) & (x >= bottom) & (x <= top)
                        weight = _weights(x, keep, peak, weigh)
                        terms = [jnp.where(x > t, weight, 0.0) for t in edges]
                        if last:
                            terms.append(jnp.where(keep & (x == edges[0]), 1.0, 0.0))
                        state = tuple(a + b for a, b in zip(state, (*terms, weight), strict=True))
                    return state

                return lax.cond(jnp.max(found) > 0, add, lambda *same: same, *state)

            slots = (ABOVE, TIED, ALL) if last else range(SLOTS)
            sums = _sweep(x_g, row, chunk, visit, (full(0),) * len(slots))
            for slot, total in zip(slots, sums, strict=True):
                sums_o[row, slot, chunk] = jnp.sum(total)

    bound, value = (jax.ShapeDtypeStruct(shape[:1], dtype) for dtype in (jnp.int32, jnp.float32))
    sums = jax.ShapeDtypeStruct((shape[0], SLOTS, SUMS), jnp.float32)
    scratch = [plgpu.SMEM((SLOTS,), jnp.float32)]
    return _launch(sample_narrow, shape, (bound, bound, value, value, sums), scratch)


def _cut(shape, weigh, _last):
    """The edge as a float, and the last id that is kept of the elements equal to it."""
    chunks = chunks_of(shape[1])

    def sample_cut(x_g, scale_g, peak_g, floor_g, edge_g, cut_g, active_g, target_g, *rest):
        low_g, base_g, limit_g, sums_g, edge_o, cut_o, totals_s = rest
        row = lax.axis_index("row")

        @pl.when(active_g[row] == 0)
        def _():
            edge_o[row], cut_o[row] = jnp.float32(-jnp.inf), jnp.int32(-1)

        @pl.when(active_g[row] != 0)
        def _():
            _totals(sums_g, row, chunks, totals_s)
            above, tied = base_g[row] + totals_s[ABOVE], totals_s[TIED].astype(jnp.int32)
            limit = limit_g[row]
            scale, peak, floor = (vector(ref[row]) for ref in (scale_g, peak_g, floor_g))
            before, before_cut = vector(edge_g[row]), vector(cut_g[row])
            edge = from_key(vector(low_g[row]))
            edge_o[row] = jnp.max(edge)
            each = jnp.max(_weights(edge, edge == edge, peak, weigh))

            def more(_, bounds):  # the first `count` of the tied are kept if those before the last leave room
                fewest, most = bounds
                count = (fewest + most + 1) >> 1
                room = above + each * (count - 1).astype(jnp.float32) < limit
                return jnp.where(room, count, fewest), jnp.where(room, most, count - 1)

            count, _ = lax.fori_loop(0, 24, more, (jnp.int32(1), jnp.maximum(tied, 1)))

            def search():
                def halve(_, bounds):
                    low, high = bounds
                    middle = (low + high) >> 1
                    upto = vector(middle)

                    def each_chunk(chunk, total):
                        def visit(pieces, total):
                            for logit, ids in pieces:
                                x = logit * scale
                                here = _kept(x, ids, floor, before, before_cut) & (x == edge) & (ids <= upto)
                                total = total + jnp.where(here, 1.0, 0.0)
                            return total

                        return _sweep(x_g, row, chunk, visit, total)

                    found = jnp.sum(lax.fori_loop(0, chunks, each_chunk, full(0)))
                    enough = found >= count.astype(jnp.float32)
                    return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

                steps = (shape[1] - 1).bit_length()
                return lax.fori_loop(0, steps, halve, (jnp.int32(0), jnp.int32(shape[1] - 1)))[1]

            cut_o[row] = lax.cond(count < tied, search, lambda: jnp.int32(INT32_MAX))

    out_type = jax.ShapeDtypeStruct(shape[:1], jnp.float32), jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    return _launch(sample_cut, shape, out_type, [plgpu.SMEM((SLOTS,), jnp.float32)], per_row=True)


def _draw(shape, _weigh, _last):
    """Per chunk the largest x + noise of what is kept, and its lowest id."""

    def sample_draw(
        x_g, scale_g, peak_g, floor_g, edge_g, cut_g, edge2_g, cut2_g, active_g, k0_g, k1_g, best_g, first_g
    ):
        row, chunk = lax.axis_index("row"), lax.axis_index("chunk")

        @pl.when(active_g[row] != 0)
        def _():
            scale, floor = vector(scale_g[row]), vector(floor_g[row])
            edges = [(vector(e[row]), vector(c[row])) for e, c in ((edge_g, cut_g), (edge2_g, cut2_g))]
            key = vector(k0_g[row]), vector(k1_g[row])

            def visit(pieces, state):
                kept = []
                for logit, ids in pieces:
                    x = logit * scale
                    keep = _kept(x, ids, floor, *edges[0]) & _kept(x, ids, floor, *edges[1])
                    kept.append((jnp.where(keep, x, -jnp.inf), ids))

                def draw(best, first):
                    for x, ids in kept:
                        best, first = _better(add_rounded(x, gumbel(ids, key), VECTOR), ids, (best, first))
                    return best, first

                # Most pieces hold nothing that any noise could lift above what was found.
                chance = jnp.full_like(state[0], 0)
                for x, _ in kept:
                    chance = jnp.where(x + NOISE_MAX > state[0], 1.0, chance)
                return lax.cond(jnp.max(chance) > 0, draw, lambda *same: same, *state)

            best, first = _sweep(x_g, row, chunk, visit, (full(-jnp.inf), full(INT32_MAX, jnp.int32)))
            _write_best(best, first, best, best_g, first_g, row, chunk)

    return _launch(sample_draw, shape, _per_chunk(shape), approximate=False)
