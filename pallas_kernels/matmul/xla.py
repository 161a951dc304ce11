"""Matrix products through XLA's own dots, with one summation order (any CPU, any GPU without its own kernels).

Order, per output: K is cut into c = ceil(K / 768) equal chunks (the last padded with zeros); inside a chunk
products accumulate in ascending k in float32; chunk sums add up in ascending order. Two ways to get it:

* Where the row count provably cannot change a dot's order (`backend.rows_are_free`), weights are stored as
  [c, N / 64, K / c, 64] and a product is one batched dot over (chunk, column block): plain two-dimensional dots
  split k when N is large and M small, these never do. Above 64 rows the blocks are laid side by side on the fly.
* Elsewhere weights stay [K, N] and every dot has exactly `backend.row_tile` rows, mapped over the row tiles:
  whatever order XLA picks for that one shape, it picks always (on GPUs with `backend.compiler_options`). Dots of more
  rows, which read the weights less often, are used for shapes whose bits they were proven to keep (`proven.py`).
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.backend import row_tile, rows_are_free
from pallas_kernels.numerics import COLUMN_BLOCK, K_CHUNK
from pallas_kernels.proven import larger_rows
from pallas_kernels.reduce import dot_f32, pin

BLOCKED_MAX_ROWS = 64


def pack(w):
    """[K, N] → the layout `matmul` takes; NumPy in, NumPy out."""
    if not rows_are_free():
        return w
    k, n = w.shape
    chunks = -(-k // K_CHUNK)
    depth, blocks = -(-k // chunks), -(-n // COLUMN_BLOCK)
    if (pad := (chunks * depth - k, blocks * COLUMN_BLOCK - n)) != (0, 0):
        w = w.__array_namespace__().pad(w, ((0, pad[0]), (0, pad[1])))
    return w.reshape(chunks, depth, blocks, COLUMN_BLOCK).transpose(0, 2, 1, 3)


def unpack(packed, k: int, n: int):
    """The inverse of `pack`."""
    if not rows_are_free():
        return packed
    chunks, blocks, depth, width = packed.shape
    return packed.transpose(0, 2, 1, 3).reshape(chunks * depth, blocks * width)[:k, :n]


def take_columns(packed, ids, k: int):
    """Columns `ids` of the [K, N] matrix as rows [T, K]: the embedding lookup of a tied LM head."""
    if not rows_are_free():
        return packed.at[:, ids].get(mode="promise_in_bounds").T
    picked = packed.at[:, ids // COLUMN_BLOCK, :, ids % COLUMN_BLOCK].get(mode="promise_in_bounds")
    return picked.reshape(ids.shape[0], -1)[:, :k]


def put_columns(packed, ids, rows):
    """`packed` with `rows` [T, K] written to columns `ids`; equal ids bring equal rows."""
    if not rows_are_free():
        return packed.at[:, ids].set(rows.T, mode="promise_in_bounds")
    chunks, _, depth, _ = packed.shape
    rows = jnp.pad(rows, ((0, 0), (0, chunks * depth - rows.shape[1]))).reshape(-1, chunks, depth)
    return packed.at[:, ids // COLUMN_BLOCK, :, ids % COLUMN_BLOCK].set(rows, mode="promise_in_bounds")


def dot(x, packed, n: int):
    """[M, K] × packed → float32 [M, N], the raw accumulators."""
    return pin(_row_free(x, packed) if rows_are_free() else _row_tiled(x, packed))[:, :n]


def _row_free(x, packed):
    rows, k = x.shape
    chunks, blocks, depth, width = packed.shape
    m = max(rows, 2)  # one row alone takes another code path in XLA
    x = jnp.pad(x, ((0, m - rows), (0, chunks * depth - k)))
    if m <= BLOCKED_MAX_ROWS:
        x = x.reshape(m, chunks, depth).transpose(1, 0, 2)
        lhs = jnp.broadcast_to(x[:, None], (chunks, blocks, m, depth))
        y = dot_f32(lhs, packed, (((3,), (2,)), ((0, 1), (0, 1))))
        y = y.transpose(0, 2, 1, 3).reshape(chunks, m, blocks * width)
        parts = [y[c] for c in range(chunks)]
    else:
        # Not before x is there: XLA would lay out every layer's weights first and hold them all at once.
        packed = pin(x, packed)[1]
        flat = packed.transpose(0, 2, 1, 3).reshape(chunks, depth, blocks * width)
        parts = [
            dot_f32(x[:, c * depth : (c + 1) * depth], flat[c], (((1,), (0,)), ((), ())))
            for c in range(chunks)
        ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total[:rows]


def _row_tiled(x, w):
    (rows, k), n, base = x.shape, w.shape[1], row_tile(x.dtype)
    x = jnp.pad(x, ((0, -rows % base), (0, 0)))
    y, first = jnp.zeros((len(x), n), jnp.float32), 0
    # Every size is a multiple of the next: what is padded is less than one base tile, whichever are proven.
    for tile in (*larger_rows(k, n, x.dtype), base):

        def multiply(i, y, first=first, tile=tile):
            at = first + i * tile
            part = dot_f32(lax.dynamic_slice_in_dim(x, at, tile), w, (((1,), (0,)), ((), ())))
            return lax.dynamic_update_slice_in_dim(y, part, at, axis=0)

        if tiles := (len(x) - first) // tile:
            y, first = lax.fori_loop(0, tiles, multiply, y), first + tiles * tile
    return y[:rows]


def matmul(x, packed, *, n, bias=None, residual=None, out_dtype=None):
    """See `op.matmul`."""
    y = dot(x, packed, n)
    if bias is not None:
        y = pin(y + bias.astype(jnp.float32))
    if residual is not None:
        y = pin(y + residual.astype(jnp.float32))
    return pin(y.astype(out_dtype or x.dtype))  # or XLA may go on from the unrounded sum


def gated_matmul(x, packed, *, n, activation, out_dtype=None):
    """See `op.gated_matmul`; gate and up lie side by side, each `n` columns."""
    y = dot(x, packed, 2 * n)
    gate, up = y[:, :n], y[:, n:]
    return pin((ACTIVATIONS[activation](gate) * up).astype(out_dtype or x.dtype))


def pack_gated(gate, up):
    """Gate and up [K, F] as one packed matrix."""
    return pack(gate.__array_namespace__().concatenate([gate, up], axis=1))


def unpack_gated(packed, k: int, n: int):
    """The inverse of `pack_gated`: (gate, up)."""
    both = unpack(packed, k, 2 * n)
    return both[:, :n], both[:, n:]


def silu(x):
    """x / (1 + exp(−x)); no product feeds a sum, so nothing here can be contracted."""
    return x / (1.0 + jnp.exp(-x))


def gelu_tanh(x):
    """x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))), every product rounded before it is added."""
    cubic = pin(x * x * x * 0.044715)
    return (x * 0.5) * (1.0 + jnp.tanh((x + cubic) * 0.7978845608028654))


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}
