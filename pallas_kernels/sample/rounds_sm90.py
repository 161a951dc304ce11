"""Drawing on Hopper, and top-p by rejection.

The tokens that min-p and top-k keep, ordered by x and then by id, are a prefix of the row; top-p keeps a shorter one.
A round draws the candidate, the largest noisy token of a prefix, and sums the weights 2^((x − largest) · log2 e) of all
that comes before it. Less than top-p's share of everything kept: top-p keeps the candidate, and it is the row's token.
Otherwise top-p keeps neither it nor anything after it, and the next round draws from what comes before it. Adding up
fewer weights in the same order never gives a larger sum, so that holds in floating point, too. Of every ten rows one
goes on after a round if p is 0.9; after r rounds at most P(Poisson(ln 1/p) ≥ r) do.

The first rounds are two launches each, over (row, chunk); rows that are done leave a launch at once. In the last launch
one CTA a row goes on until its row is done. Both make a chunk's two results with the same function and reduce a row's
chunks in the same way, so a token doesn't depend on how many rounds were launches.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import add_rounded, interpreting, pl, plgpu
from pallas_kernels.sample.chunks_sm90 import (
    LOG2_E,
    VECTOR,
    better,
    chunks_of,
    earliest,
    full,
    launch,
    sweep,
    vector,
)
from pallas_kernels.sample.int32 import gumbel, noise_keys
from pallas_kernels.sample.xla import INT32_MAX

REDRAWS = 3
"""Rounds after the first that are launches over chunks."""
CHUNKS = 128
"""The most that a row may have: a thread each reads what they left."""
LANES = plgpu.Layout.WG_STRIDED((CHUNKS,), vec_size=1)
NOISE_MIN, NOISE_MAX = -2.82, 17.0
"""Around every Gumbel value: −log(−log 2^−24) = −2.811 and −log(−log(1 − 2^−24)) = 16.64."""


def draw(logits, scale, peak, edge, cut, rows, token):
    """Of every row whose `token` is −1 the one drawn, else `token`; see `mosaic_gpu_sm90.edges`."""
    call = functools.partial(_kernel, logits.shape, interpreting=interpreting())
    values, keys, kept = (logits, scale, peak), noise_keys(rows), (edge, cut)
    found = call("draw")(*values, *keys, *kept, token)
    sums = call("check")(*values, *kept, rows.top_p, token, *found)
    for _ in range(REDRAWS):
        *found, token = call("redraw")(*values, *keys, rows.top_p, token, *found, *sums)
        sums = call("check")(*values, *kept, rows.top_p, token, *found)
    return call("finish")(*values, *keys, *kept, rows.top_p, token, *found, *sums)


@functools.cache
def _kernel(shape, step, interpreting):
    return {"draw": _draw, "check": _check, "redraw": _redraw, "finish": _finish}[step](shape)


def _within(x, ids, prefix):
    """Whether the prefix, up to (x, id) = `prefix`, holds each element; a NaN is in none."""
    edge, cut = map(vector, prefix)
    return (x > edge) | ((x == edge) & (ids <= cut))


def _before(x_g, row, scale, token):
    """The prefix that ends just before `token`; any if there is no token."""
    return x_g[row, jnp.minimum(token, x_g.shape[1] - 1)] * scale, token - 1


def _noisiest(x_g, row, chunk, scale, peak, key, prefix):
    """The largest x + noise of a chunk's part of the prefix, and its lowest id; (−inf, INT32_MAX) of nothing."""
    scale, key = vector(scale), tuple(map(vector, key))

    def visit(pieces, state):
        values, largest = [], full(-jnp.inf)
        for logit, ids in pieces:
            x = logit * scale
            x = jnp.where(_within(x, ids, prefix), x, -jnp.inf)
            values.append((x, ids))
            largest = jnp.maximum(largest, x)

        def improve(best, first, reach):
            for x, ids in values:
                best, first = better(add_rounded(x, gumbel(ids, key), VECTOR), ids, best, first)
            return best, first, jnp.maximum(reach, jnp.max(best) - NOISE_MAX)

        # Below `reach` no noise lifts x to the best so far, and the largest x is in every prefix that isn't empty.
        return lax.cond(jnp.max(largest) >= state[2], improve, lambda *same: same, *state)

    state = full(-jnp.inf), full(INT32_MAX, jnp.int32), peak + (NOISE_MIN - NOISE_MAX)
    best, first, _ = sweep(x_g, row, chunk, visit, state)
    return earliest(best, first)


def _masses(x_g, row, chunk, scale, peak, *prefixes):
    """Of each prefix the weight that a chunk has of it."""
    scale, peak = vector(scale), vector(peak)

    def visit(pieces, sums):
        for logit, ids in pieces:
            x = logit * scale
            weight = jnp.exp2(add_rounded(x, -peak, VECTOR) * LOG2_E)
            terms = [jnp.where(_within(x, ids, prefix), weight, 0.0) for prefix in prefixes]
            sums = tuple(add_rounded(a, b, VECTOR) for a, b in zip(sums, terms, strict=True))
        return sums

    return tuple(map(jnp.sum, sweep(x_g, row, chunk, visit, (full(0),) * len(prefixes))))


def _accepted(p, above, total):
    """Whether top-p keeps a token, from the chunks' weights before it and in all; nothing is before the first one."""
    above = jnp.sum(above)
    return (p >= 1) | ~((above > 0) & (above >= p * jnp.sum(total)))  # a row with a NaN is done, too


def _chunks(shape, row, ref, empty):
    """What a launch left per chunk of a row, a lane each."""
    lane = plgpu.broadcasted_iota(jnp.int32, (CHUNKS,), 0, layout=LANES)
    return jnp.where(lane < chunks_of(shape[1]), plgpu.load(ref.at[row], layout=LANES), empty)


def _candidate(shape, row, best_g, first_g):
    """The row's largest noisy token; INT32_MAX if it has none."""
    best = _chunks(shape, row, best_g, -jnp.inf)
    return earliest(best, _chunks(shape, row, first_g, jnp.int32(INT32_MAX)))[1]


def _decided(shape, row, p, best_g, first_g, above_g, total_g):
    """(candidate, whether it is the row's token)."""
    sums = (_chunks(shape, row, ref, 0.0) for ref in (above_g, total_g))
    return _candidate(shape, row, best_g, first_g), _accepted(p, *sums)


def _token(candidate):
    """A row without a candidate has no usable logit."""
    return jnp.where(candidate == INT32_MAX, 0, candidate)


def _per_chunk(shape, *dtypes):
    return tuple(jax.ShapeDtypeStruct((shape[0], CHUNKS), dtype) for dtype in dtypes)


def _draw(shape):
    def sample_draw(x_g, scale_g, peak_g, k0_g, k1_g, edge_g, cut_g, token_g, best_o, first_o):
        row, chunk = lax.axis_index("row"), lax.axis_index("chunk")

        @pl.when(token_g[row] < 0)
        def _():
            key, prefix = (k0_g[row], k1_g[row]), (edge_g[row], cut_g[row])
            found = _noisiest(x_g, row, chunk, scale_g[row], peak_g[row], key, prefix)
            best_o[row, chunk], first_o[row, chunk] = found

    return launch(sample_draw, shape, _per_chunk(shape, jnp.float32, jnp.int32), approximate=False)


def _check(shape):
    def sample_check(x_g, scale_g, peak_g, edge_g, cut_g, p_g, token_g, best_g, first_g, above_o, total_o):
        row, chunk = lax.axis_index("row"), lax.axis_index("chunk")

        @pl.when((token_g[row] < 0) & (p_g[row] < 1))
        def _():
            scale, kept = scale_g[row], (edge_g[row], cut_g[row])
            before = _before(x_g, row, scale, _candidate(shape, row, best_g, first_g))
            sums = _masses(x_g, row, chunk, scale, peak_g[row], before, kept)
            above_o[row, chunk], total_o[row, chunk] = sums

    return launch(sample_check, shape, _per_chunk(shape, jnp.float32, jnp.float32), approximate=False)


def _redraw(shape):
    """Decides about the candidate; the token is known now, or the next candidate is drawn."""

    def sample_redraw(x_g, scale_g, peak_g, k0_g, k1_g, p_g, token_g, *rest):
        *before, best_o, first_o, token_o = rest
        row, chunk = lax.axis_index("row"), lax.axis_index("chunk")

        def decide():
            candidate, accepted = _decided(shape, row, p_g[row], *before)
            return jnp.where(accepted, _token(candidate), -1), candidate

        token, candidate = lax.cond(token_g[row] < 0, decide, lambda: (token_g[row], jnp.int32(0)))

        @pl.when(chunk == 0)
        def _():
            token_o[row] = token

        @pl.when(token < 0)
        def _():
            scale, key = scale_g[row], (k0_g[row], k1_g[row])
            prefix = _before(x_g, row, scale, candidate)
            best_o[row, chunk], first_o[row, chunk] = _noisiest(
                x_g, row, chunk, scale, peak_g[row], key, prefix
            )

    out_type = *_per_chunk(shape, jnp.float32, jnp.int32), jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    return launch(sample_redraw, shape, out_type, approximate=False)


def _finish(shape):
    """Decides about the last launched round's candidate, and goes on alone."""

    def sample_finish(x_g, scale_g, peak_g, k0_g, k1_g, edge_g, cut_g, p_g, token_g, *rest):
        *before, token_o = rest
        row = lax.axis_index("row")

        def finish():
            p, scale, peak = p_g[row], scale_g[row], peak_g[row]
            key, kept = (k0_g[row], k1_g[row]), (edge_g[row], cut_g[row])
            lane = plgpu.broadcasted_iota(jnp.int32, (CHUNKS,), 0, layout=LANES)

            def each_chunk(results, *empty):
                """`results(chunk)` of every chunk, as the launches leave them."""

                def put(chunk, lanes):
                    pairs = zip(results(chunk), lanes, strict=True)
                    return tuple(jnp.where(lane == chunk, value, others) for value, others in pairs)

                start = (plgpu.layout_cast(jnp.full((CHUNKS,), each), LANES) for each in empty)
                return lax.fori_loop(0, chunks_of(shape[1]), put, tuple(start))

            def again(state):
                prefix = _before(x_g, row, scale, state[0])
                noisiest = functools.partial(_noisiest, x_g, row)
                found = each_chunk(
                    lambda chunk: noisiest(chunk, scale, peak, key, prefix), -jnp.inf, jnp.int32(INT32_MAX)
                )
                candidate = earliest(*found)[1]
                before = _before(x_g, row, scale, candidate)
                masses = functools.partial(_masses, x_g, row)
                sums = each_chunk(lambda chunk: masses(chunk, scale, peak, before, kept), 0.0, 0.0)
                return candidate, _accepted(p, *sums)

            state = _decided(shape, row, p, *before)
            return _token(lax.while_loop(lambda state: ~state[1], again, state)[0])

        token_o[row] = lax.cond(token_g[row] < 0, finish, lambda: token_g[row])

    out_type = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    return launch(sample_finish, shape, out_type, per_row=True, approximate=False)
