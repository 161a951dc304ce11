"""Causal attention over a paged KV cache; decode, prefill, chunks and mixed batches agree bit for bit."""

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels import registry
from pallas_kernels.arrays import HostOrDevice
from pallas_kernels.attention import backward
from pallas_kernels.attention.tiles import TILES
from pallas_kernels.backend import resolve
from pallas_kernels.gradient import with_gradient


def attention(
    q: Float[Array, "T Hq D"],
    k_pages: Float[Array, "P Hkv page D"],
    v_pages: Float[Array, "P Hkv page D"],
    block_tables: Int[HostOrDevice, "S pages"],
    query_start: Int[HostOrDevice, " S+1"],
    seq_lens: Int[HostOrDevice, " S"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    max_query_len: int,
    query_alignment: int = 1,
    backend: str | None = None,
) -> Float[Array, "T Hq D"]:
    """softmax(scale · q·kᵀ) · v per query, in segments of fixed absolute position merged in ascending order.

    Within a segment: scores with float32 accumulation in ascending d, m = max, p = exp(s − m), l = Σp, o = Σp·v in
    ascending key order. Segments merge one after the other: O ← O·e^(M−M′) + o·e^(m−M′), likewise L. The result is
    O / L, rounded once. A key outside the causal mask or the window contributes an exact zero if it is finite. If its
    key or value is infinite or NaN:

    - "xla": it contributes an exact zero still. A row that sees a value with an infinite or NaN entry is NaN, in the
      query heads of that KV head, as is a row whose result overflows float32.
    - "mosaic_gpu": an infinite or NaN key contributes an exact zero, and so does any value at or past the sequence's
      `seq_lens`. A value before that must be finite: 0 · NaN makes a row NaN that loads the same block of keys
      (`segments_sm90.BLOCK`) without seeing it: earlier rows of the same prefill, or rows whose window has left it.

    Gradients depend on the sequence alone, too. Without atomics: dq adds up over ascending keys; dk and dv over
    ascending queries, in a tile of 64 over ascending heads of the group (elsewhere than on "mosaic_gpu" a tile's rows
    and heads are one sum); a page that sequences share over those in ascending order. For them the forward pass keeps,
    with "mosaic_gpu", its result and each row's log-sum-exp.

    Args:
        q: queries of all sequences, one after the other.
        k_pages, v_pages: cache pages of PAGE_SIZE keys, already holding this step's keys and values.
        block_tables: page numbers of each sequence, in order.
        query_start: row of `q` at which each sequence starts; the last entry is the number of real rows.
        seq_lens: keys of each sequence, this step's included; its last query sits at position seq_lens − 1.
        scale: factor on the scores.
        window: a query sees the last `window` keys, itself included.
        soft_cap: scores become soft_cap · tanh(s / soft_cap) (Gemma).
        max_query_len: static bound on the queries of one sequence; 1 means decode.
        query_alignment: static promise that every sequence begins at a multiple of so many rows of `q`: all entries of
            `query_start` but the last, those of empty sequences too. It touches no bit; broken, it gives wrong values,
            unnoticed. With a multiple of 64 "mosaic_gpu" takes the rows of prompts, and of gradients, where they are.
        backend: "xla", "mosaic_gpu" or "mosaic_tpu"; None is "xla".

    Returns:
        [T, Hq, D] in q's dtype. With "mosaic_gpu" rows past query_start[-1], and rows of sequences without keys, are
        zero, and so are their gradients, be q and the result's cotangent NaN there: training relies on it. Without
        differentiation and with `max_query_len=1` they are unspecified. With other backends rows past query_start[-1]
        are unspecified, and finite only if their inputs are.

    Raises:
        ValueError: the backend is unknown, or doesn't take the dtype or this device (named, with the remedy).
        NotImplementedError: the backend has no such kernel.
    """
    operands = q, k_pages, v_pages, block_tables, query_start, seq_lens
    tiles = None
    if resolve(backend) == "mosaic_gpu" and max_query_len > 1:
        # Out here, where rematerialisation sees the name: inside an op with a gradient it would not.
        make = registry.load("attention", backend).batch_tiles
        tiles = checkpoint_name(make(*operands, window=window, query_alignment=query_alignment), TILES)
    return _attention((scale, window, soft_cap, max_query_len, backend), *operands, tiles)


@with_gradient(backward.attention, saving=backward.forward)
def _attention(static, q, k_pages, v_pages, block_tables, query_start, seq_lens, tiles):
    scale, window, soft_cap, max_query_len, backend = static
    return registry.load("attention", backend).attention(
        q,
        k_pages,
        v_pages,
        block_tables,
        query_start,
        seq_lens,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        max_query_len=max_query_len,
        **({} if tiles is None else {"tiles": tiles}),
    )
