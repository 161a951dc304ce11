"""Matrix products on TPUs: every dot the MXU sees has one shape, [ROW_TILE, block_k] × [column tile, block_k]ᵀ.

Order, per output: K is cut into blocks of `block_k(K, dtype)`, a function of those two alone; a block is one MXU dot
from zero with float32 accumulation, blocks add up in ascending k in VMEM; then + bias and + residual (or
act(gate) · up), each in float32; one rounding at the end. A decode step's rows are padded to a tile of 128, in VMEM
alone: 128 flops a byte of weights is less than any TPU needs to be bound by memory. How many tiles share a fetched
block depends on the number of rows and touches no bit.

Weights are stored [N rounded up to 128, K rounded up to blocks], rows of output features, so that an embedding lookup
takes rows; the MXU reads its second operand transposed. Gate and up lie one after the other, [2, F, K].
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.arrays import round_up
from pallas_kernels.compat import pl, pltpu
from pallas_kernels.tiles_tpu import LANES, VMEM_LIMIT, dot, require_dtype

ROW_TILE = 128
COLUMN_TILE = 512
"""Columns of a dot; half of it for each of gate and up."""

BLOCK_BYTES = 5120
"""Bytes of a row's part in one block of k, at most: 2560 bfloat16 or 1280 float32 values."""

ROW_TILES, COLUMN_TILES = 8, 2
"""Tiles that share a fetched block when there are more rows than one tile's."""


def block_k(k: int, dtype) -> int:
    """Length of the blocks that K is cut into: of the 1 to 2 times as many as need be, those that pad K least."""
    fewest = pl.cdiv(k, BLOCK_BYTES // jnp.dtype(dtype).itemsize)
    lengths = [round_up(pl.cdiv(k, blocks), LANES) for blocks in range(fewest, 2 * fewest + 1)]
    return min(lengths, key=lambda length: (round_up(k, length), -length))


def pack(w):
    """[K, N] → [N, K], both padded with zeros; NumPy in, NumPy out."""
    k, n = w.shape
    pad = -n % LANES, -k % block_k(k, w.dtype)
    w = w.T
    if pad != (0, 0):
        return w.__array_namespace__().pad(w, ((0, pad[0]), (0, pad[1])))
    return w if isinstance(w, jax.Array) else w.__array_namespace__().ascontiguousarray(w)


def pack_gated(gate, up):
    """Gate and up [K, F] → [2, F, K], padded like `pack`."""
    return gate.__array_namespace__().stack([pack(gate), pack(up)])


def unpack_gated(packed, k: int, n: int):
    """The inverse of `pack_gated`: (gate, up)."""
    return unpack(packed[0], k, n), unpack(packed[1], k, n)


def unpack(packed, k: int, n: int):
    """The inverse of `pack`."""
    return packed[:n, :k].T


def take_columns(packed, ids, k: int):
    """Columns `ids` of the [K, N] matrix as rows [T, K]."""
    return packed.at[ids].get(mode="promise_in_bounds")[:, :k]


def put_columns(packed, ids, rows):
    """`packed` with `rows` [T, K] written to columns `ids`; equal ids bring equal rows."""
    return packed.at[ids, : rows.shape[1]].set(rows, mode="promise_in_bounds")


def matmul(x, packed, *, n, bias=None, residual=None, out_dtype=None):
    """See `op.matmul`; float32 or bfloat16."""
    return _product(x, packed[None], n, bias=bias, residual=residual, out_dtype=out_dtype)


def gated_matmul(x, packed, *, n, activation, out_dtype=None):
    """See `op.gated_matmul`; float32 or bfloat16."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
    return _product(x, packed, n, activation=activation, out_dtype=out_dtype)


def silu(x):
    """x / (1 + exp(−x))."""
    return x / (1.0 + jnp.exp(-x))


def gelu_tanh(x):
    """x/2 · (1 + tanh(√(2/π) · x (1 + 0.044715 x²)))."""
    return (x * 0.5) * (1.0 + jnp.tanh(x * (0.7978845608028654 * (1.0 + 0.044715 * (x * x)))))


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}


def _product(x, packed, n, *, bias=None, residual=None, activation=None, out_dtype=None):
    rows, k = x.shape
    halves, columns, depth = packed.shape
    require_dtype("matmul: x", x.dtype)
    if packed.dtype != x.dtype or (residual is not None and residual.dtype != x.dtype):
        other = packed.dtype if packed.dtype != x.dtype else residual.dtype
        raise ValueError(f"matmul: x is {x.dtype} but packed or residual is {other}; cast them to one dtype")
    step = block_k(k, x.dtype)
    if round_up(k, step) != depth:
        raise ValueError(f"matmul: x has K={k} but packed holds K={depth}; pack a [{k}, N] matrix")
    blocks = depth // step
    column_tile = min(COLUMN_TILE // halves, columns)
    if rows <= ROW_TILE:  # all of x stays in VMEM
        block = ROW_TILE, column_tile
        x_spec = pl.BlockSpec((ROW_TILE, depth), lambda i, j, b: (0, 0))
    else:
        row_tiles = min(ROW_TILES, pl.cdiv(rows, ROW_TILE))
        block = row_tiles * ROW_TILE, min(COLUMN_TILES, pl.cdiv(columns, column_tile)) * column_tile
        x_spec = pl.BlockSpec((block[0], step), lambda i, j, b: (i, b))
    extra, extra_specs = [], []
    if bias is not None:
        extra.append(bias.astype(jnp.float32)[None])
        extra_specs.append(pl.BlockSpec((1, block[1]), lambda i, j, b: (0, j)))
    if residual is not None:
        extra.append(residual)
        extra_specs.append(pl.BlockSpec(block, lambda i, j, b: (i, j)))
    tiles = block[0] // ROW_TILE, block[1] // column_tile
    return pl.pallas_call(
        functools.partial(
            _kernel,
            k=k,
            step=step,
            biased=bias is not None,
            activation=activation,
            whole=rows <= ROW_TILE,
        ),
        grid=(pl.cdiv(rows, block[0]), pl.cdiv(columns, block[1]), blocks),
        in_specs=[
            x_spec,
            pl.BlockSpec((halves, block[1], step), lambda i, j, b: (0, j, b)),
            *extra_specs,
        ],
        out_specs=pl.BlockSpec(block, lambda i, j, b: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, n), out_dtype or x.dtype),
        scratch_shapes=[pltpu.VMEM((*tiles, halves, ROW_TILE, column_tile), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name="gated_matmul" if activation else "matmul",
    )(x, packed, *extra)


def _kernel(x_ref, w_ref, *refs, k, step, biased, activation, whole):
    *extra, y_ref, acc_ref = refs
    row_tiles, column_tiles, halves, _, width = acc_ref.shape
    block, last = pl.program_id(2), pl.num_programs(2) - 1

    def tile(index, _):
        i, j = index // column_tiles, index % column_tiles
        rows = pl.ds(pl.multiple_of(i * ROW_TILE, ROW_TILE), ROW_TILE)
        columns = pl.ds(pl.multiple_of(j * width, LANES), width)
        x = x_ref[rows, pl.ds(pl.multiple_of(block * step, LANES), step) if whole else slice(None)]
        if k % step:  # what lies past K is not zero; Mosaic has no select for a few bfloat16 rows
            depth = lax.broadcasted_iota(jnp.int32, x.shape, 1) + block * step
            x = jnp.where(depth < k, x.astype(jnp.float32), 0.0).astype(x.dtype)
        for half in range(halves):
            part = dot(x, w_ref[half, columns], (((1,), (1,)), ((), ())))

            @pl.when(block == 0)
            def _(half=half, part=part):
                acc_ref[i, j, half] = part

            @pl.when(block > 0)
            def _(half=half, part=part):
                acc_ref[i, j, half] += part

        @pl.when(block == last)
        def _():
            y = acc_ref[i, j, 0]
            if activation:
                y = ACTIVATIONS[activation](y) * acc_ref[i, j, 1]
            left = list(extra)
            if biased:
                y = y + left.pop(0)[:, columns]
            if left:
                y = y + left[0][rows, columns].astype(jnp.float32)
            y_ref[rows, columns] = y.astype(y_ref.dtype)

    lax.fori_loop(0, row_tiles * column_tiles, tile, None)
