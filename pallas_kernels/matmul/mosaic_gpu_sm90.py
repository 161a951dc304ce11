"""Matrix products on Hopper: one producer warpgroup feeds wgmma through a ring of shared-memory stages.

Order, per output: products accumulate in float32 in ascending k, in wgmma steps of 16; then + bias and
+ residual (or act(gate) · up), each in float32; one rounding at the end. Tile shape, number of stages and
number of CTAs don't touch it. Very few rows may go through RMSNorm first, to the bits of its own kernel.

Weights are stored [ceil(K / 64), N, 64], so that a k-block of any column range is one contiguous TMA box.
Gate and up columns alternate in groups of GATE_GROUP, so that one CTA holds both halves of what it multiplies.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import (
    drain,
    interpreting,
    load_operand_row,
    pl,
    plgpu,
    reaching_past,
    require_hopper,
    store_operand_row,
    store_tile,
)
from pallas_kernels.matmul.tuning_sm90 import Tile
from pallas_kernels.matmul.tuning_sm90 import tile as tuned_tile
from pallas_kernels.rms_norm import mosaic_gpu_sm90 as rms_norm

K_BLOCK = 64
COLUMN_ALIGN = 64
GATE_GROUP = 32
SMS = 132
SHARED_BYTES = 227 * 1024
"""Of an SM, for one CTA."""
BARRIER_BYTES, REDUCTION_BYTES = 1024, 2048
"""What the barriers of all stages take at most; what Mosaic takes for the sum over a row that is normalised."""
IN_FLIGHT = 204 * 1024
"""Bytes on their way into an SM at most, in tiles of 64 rows: with one stage more they read up to 12 % slower."""
NORMED_ROWS, NORMED_COLUMNS = 4, 8192
"""What a product normalises at most: more rows take longer than the first weights are on their way; 128 KB."""
REGISTERS = {1: 240, 2: 232, 3: 152}


def pack(w):
    """[K, N] → [ceil(K / 64), N rounded up to 64, 64], zero padded; NumPy in, NumPy out."""
    k, n = w.shape
    pad = -k % K_BLOCK, -n % COLUMN_ALIGN
    if pad != (0, 0):
        w = w.__array_namespace__().pad(w, ((0, pad[0]), (0, pad[1])))
    blocked = w.reshape(-1, K_BLOCK, w.shape[1]).transpose(0, 2, 1)
    return (
        blocked.__array_namespace__().ascontiguousarray(blocked) if not isinstance(w, jax.Array) else blocked
    )


def unpack(packed, k: int, n: int):
    """The inverse of `pack`."""
    return packed.transpose(0, 2, 1).reshape(-1, packed.shape[1])[:k, :n]


def take_columns(packed, ids, k: int):
    """Columns `ids` of the [K, N] matrix as rows [T, K]."""
    picked = packed.at[:, ids].get(mode="promise_in_bounds")
    return picked.transpose(1, 0, 2).reshape(ids.shape[0], -1)[:, :k]


def put_columns(packed, ids, rows):
    """`packed` with `rows` [T, K] written to columns `ids`; equal ids bring equal rows."""
    blocks = packed.shape[0]
    rows = jnp.pad(rows, ((0, 0), (0, blocks * K_BLOCK - rows.shape[1]))).reshape(-1, blocks, K_BLOCK)
    return packed.at[:, ids].set(rows.transpose(1, 0, 2), mode="promise_in_bounds")


def pack_gated(gate, up):
    """Gate and up [K, F] as one packed matrix: GATE_GROUP columns of gate, the same of up, and so on."""
    k, width = gate.shape
    xp = gate.__array_namespace__()
    pad = -width % GATE_GROUP
    halves = [xp.pad(w, ((0, 0), (0, pad))).reshape(k, -1, 1, GATE_GROUP) for w in (gate, up)]
    return pack(xp.concatenate(halves, axis=2).reshape(k, -1))


def unpack_gated(packed, k: int, n: int):
    """The inverse of `pack_gated`: (gate, up)."""
    groups = -(-n // GATE_GROUP)
    both = unpack(packed, k, groups * 2 * GATE_GROUP).reshape(k, groups, 2, GATE_GROUP)
    return tuple(both[:, :, half].reshape(k, -1)[:, :n] for half in range(2))


def matmul(x, packed, *, n, bias=None, residual=None, out_dtype=None, norm=None, tile: Tile | None = None):
    """See `op.matmul`; bfloat16 or float16. `norm` as in `takes_norm`; `tile` overrides the tuning table."""
    y = _product(x, packed, bias=bias, residual=residual, out_dtype=out_dtype, norm=norm, tile=tile)
    return y if y.shape == (x.shape[0], n) else y[: x.shape[0], :n]


def gated_matmul(x, packed, *, n, activation, out_dtype=None, norm=None, tile: Tile | None = None):
    """See `op.gated_matmul`; bfloat16 or float16. `norm` as in `matmul`."""
    y = _product(x, packed, activation=activation, out_dtype=out_dtype, norm=norm, tile=tile)
    return y if y.shape == (x.shape[0], n) else y[: x.shape[0], :n]


def gated_matmul_saving(x, packed, *, n, activation, out_dtype=None, tile: Tile | None = None):
    """(`gated_matmul`'s result, to the bit; x · packed, rounded to x's dtype [M, packed columns])."""
    y, inner = _product(x, packed, activation=activation, out_dtype=out_dtype, tile=tile, saving=True)
    rows = x.shape[0]
    return y if y.shape == (rows, n) else y[:rows, :n], inner if len(inner) == rows else inner[:rows]


def column_unit(*, gated: bool = False) -> int:
    """What a tile's columns are a multiple of."""
    return 2 * GATE_GROUP if gated else 8


def takes_norm(rows: int, k: int) -> bool:
    """Whether a product of so many rows can normalise them itself: `norm` is then (RMSNorm's float32 weights [K], eps).

    The rows lie in shared memory beside the weights' stages, as eight whatever their number. K: as many vectors of
    eight columns for every thread, which is what was run on a GPU.
    """
    return rows <= NORMED_ROWS and k <= NORMED_COLUMNS and k % (8 * rms_norm.THREADS) == 0


def silu(x):
    """x / (1 + exp(−x))."""
    return x * (1.0 / (1.0 + jnp.exp(-x)))


def gelu_tanh(x):
    """x / (1 + exp(−2t)) with t = √(2/π) (x + 0.044715 x³), which is x/2 · (1 + tanh t)."""
    return x * (1.0 / (1.0 + jnp.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * (x * x)))))


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}


def _product(
    x,
    packed,
    *,
    bias=None,
    residual=None,
    activation=None,
    out_dtype=None,
    norm=None,
    tile=None,
    saving=False,
):
    require_hopper("matmul")
    rows, k = x.shape
    blocks, columns, _ = packed.shape
    if x.dtype not in (jnp.bfloat16, jnp.float16) or packed.dtype != x.dtype:
        raise ValueError(
            f"matmul: x is {x.dtype} and packed {packed.dtype}; mosaic_gpu takes bfloat16 or float16; "
            "use backend='xla'"
        )
    if -(-k // K_BLOCK) != blocks:
        raise ValueError(
            f"matmul: x has K={k} but packed holds {blocks} blocks of {K_BLOCK}; pack a [{k}, N] matrix"
        )
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
    narrowest = column_unit(gated=activation is not None)
    if norm is not None and not takes_norm(rows, k):
        raise ValueError(f"matmul: {rows} rows of {k} can't be normalised inside; call rms_norm first")
    tile = tile or tuned_tile(rows, k, columns, narrowest)
    if tile.columns % narrowest:
        raise ValueError(f"matmul: tile.columns={tile.columns} must be a multiple of {narrowest}")
    if tile.tail and (tile.tail % narrowest or tile.tail >= tile.columns):
        raise ValueError(
            f"matmul: tile.tail={tile.tail} must be a multiple of {narrowest} below tile.columns={tile.columns}"
        )
    if tile.columns > columns:  # a TMA box wider than its array reads wrong columns
        tile = dataclasses.replace(tile, columns=columns)
    # TMA wants fewer than 8 rows or a multiple of 8. Loads of boxes that are partly out of range are slow, so that
    # several tiles need whole ones of x. The interpreter does not copy part of a tile.
    least = 8 if rows > 8 else 1
    unit = tile.rows if rows > tile.rows or interpreting() else least
    pad = ((0, 0 if norm is not None else -rows % unit), (0, blocks * K_BLOCK - k))
    out_rows = rows + (-rows % unit if interpreting() else 0)
    if pad != ((0, 0), (0, 0)):
        x = jnp.pad(x, pad)
    width = columns // 2 if activation else columns
    extra = []
    if bias is not None:
        last = parts_of(-(-x.shape[0] // tile.rows), columns, tile)[-1]
        covered = last.begin + last.count * last.width  # nothing drops what is read past the end
        extra.append(jnp.pad(bias.astype(jnp.float32), (0, covered - bias.shape[0])))
    if residual is not None:
        fill = (0, -rows % (unit if interpreting() else least)), (0, width - residual.shape[1])
        if fill != ((0, 0), (0, 0)):
            residual = jnp.pad(residual, fill)
        extra.append(residual)
    if norm is not None:
        extra.append(norm[0])
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(
            f"matmul: residual is {residual.dtype}, x is {x.dtype}; cast the residual to x's dtype"
        )
    call = _kernel(
        x.shape,
        out_rows,
        columns,
        x.dtype,
        out_dtype or x.dtype,
        tile,
        bias is not None,
        residual is not None,
        activation,
        saving,
        None if norm is None else float(norm[1]),
        interpreting(),
    )
    with jax.enable_x64(False):  # the kernel's loops count in int32
        return call(x, packed, *extra)


def _transforms(columns: int):
    """Swizzle for a [rows, columns] buffer of 16-bit values that TMA writes; none where a row is too narrow."""
    swizzle = plgpu.find_swizzle(columns * 16)
    if swizzle <= 16:
        return ()
    return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)


class Part(NamedTuple):
    """Columns that go in tiles of one width."""

    begin: int
    width: int
    count: int
    """Tiles side by side; the last may stand over the matrix."""


def parts_of(row_tiles: int, columns: int, tile: Tile) -> list[Part]:
    """All columns in tiles of `tile.columns`; with a tail, those that full rounds of the SMs leave in narrower ones."""
    whole = Part(0, tile.columns, -(-columns // tile.columns))
    full = row_tiles * whole.count // SMS * SMS // row_tiles
    if not tile.tail or full in (0, whole.count):
        return [whole]
    begin = full * tile.columns
    return [whole._replace(count=full), Part(begin, tile.tail, -(-(columns - begin) // tile.tail))]


def clusters_at_once(cluster: int) -> int:
    """How many clusters of so many CTAs run together: of three 42, not 44, where two groups of SMs have 18 and six 16.

    A cluster lies within one group. On a GPU cut differently the last clusters begin late; bits are the same.
    """
    return min(SMS // cluster, 42) if cluster == 3 else SMS // cluster


def cluster_of(tile: Tile, row_tiles: int, parts: list[Part], k_blocks: int) -> int:
    """`tile.cluster`, where row tiles and each copy of weights can be shared out evenly; else 1."""
    cluster = tile.cluster
    shared = k_blocks % cluster == 0 or (k_blocks == 1 and all(p.width // 8 % cluster == 0 for p in parts))
    return cluster if shared and row_tiles % cluster == 0 else 1


def stages_of(tile: Tile, depth: int, residual: int, held: int, most: int) -> int:
    """Pipeline stages that fit and are worth having, beside bytes of a residual and of rows that are held."""
    weights, both = (columns * depth * 2 for columns in (tile.columns, tile.columns + tile.rows))
    room = SHARED_BYTES - BARRIER_BYTES - residual
    stages = room // both
    if held:  # x takes no part in a stage then
        stages = min(stages, (room - REDUCTION_BYTES - held) // weights)
    elif tile.rows == 64:
        stages = min(stages, IN_FLIGHT // both)
    return min(stages, most, tile.stages or most)


@functools.cache
def _kernel(
    x_shape,
    out_rows,
    columns,
    dtype,
    out_dtype,
    tile: Tile,
    has_bias,
    has_residual,
    activation,
    saving,
    eps,
    interpreted,
):
    rows, k = x_shape
    depth = tile.depth if k % tile.depth == 0 else K_BLOCK
    groups, group_rows = tile.row_groups, tile.rows // tile.row_groups
    steps, k_blocks = k // depth, depth // K_BLOCK
    row_tiles = -(-rows // tile.rows)
    parts = parts_of(row_tiles, columns, tile)
    cluster = cluster_of(tile, row_tiles, parts, k_blocks)
    row_tiles //= cluster  # from here on those of a cluster are one tile, its CTAs one CTA of several members
    tiles = row_tiles * sum(part.count for part in parts)
    ctas = min(tiles, clusters_at_once(cluster))
    if row_tiles == len(parts) == 1:  # mostly memory is the limit: CTAs that have equal shares end together
        ctas = -(-tiles // -(-tiles // ctas))
    ratio = 2 if activation else 1
    # The epilogue goes in chunks of columns; those of the residual come through shared memory, ahead of it.
    chunk = common = math.gcd(*(part.width // ratio for part in parts))
    if activation or has_residual:  # 32 is GATE_GROUP, of which what is gated has whole ones
        chunk = 32 if common % 32 == 0 else max(c for c in range(8, 65, 8) if common % c == 0)
    buffers = min(tile.columns // ratio // chunk, 4) if has_residual else 0
    loaded_rows = min(tile.rows, -(-rows // 8) * 8)
    added_rows = loaded_rows if groups == 1 else group_rows
    held = 0
    if normed := eps is not None:
        held = k // K_BLOCK * 8 + tile.rows - 8  # wgmma takes 64 rows: behind a step's eight, the next steps'
        if groups > 1:
            raise ValueError(f"matmul: {tile} has {groups} row groups; rows are normalised by one")
    residual_bytes = tile.rows * chunk * buffers * 2
    stages = stages_of(tile, depth, residual_bytes, held * K_BLOCK * 2, steps if ctas == tiles else 32)
    if stages < min(steps, 2):  # a stage is free once the next step runs
        raise ValueError(
            f"matmul: {tile} leaves shared memory for {stages} stages of K={k}; take a smaller tile"
        )

    def normalise(x_g, norm_g, x_s):
        """The rows, by RMSNorm's own code, to where the products take them from."""
        layout = rms_norm.layout_of(k)
        weight = plgpu.load(norm_g, layout=layout)
        xs = [plgpu.load(x_g.at[row], layout=layout) for row in range(rows)]
        for row, x in enumerate(xs):
            store_operand_row(x, layout, x_s, row)

        def each_row(row, _):
            x = load_operand_row(x_s, layout, k, row)
            store_operand_row(rms_norm.normalised(x, weight, k, eps), layout, x_s, row)
            return ()

        lax.fori_loop(0, rows, each_row, ())  # unrolled it is no faster
        plgpu.commit_smem()

    def body(x_g, w_g, *rest):
        rest = list(rest)
        bias_g = rest.pop(0) if has_bias else None
        residual_g = rest.pop(0) if has_residual else None
        norm_g = rest.pop(0) if normed else None
        out_g, *saved_g = rest

        def scoped(x_s, w_s, full, empty, residual_s=None, residual_bar=None):
            group = lax.axis_index("wg")
            cta = lax.axis_index("cta")
            member = lax.axis_index("member") if cluster > 1 else 0

            def origin(at, column_tiles):
                if row_tiles == 1:
                    return member, at
                # Row tiles vary fastest, a band of them at a time: what CTAs that run together read stays in L2.
                band = lax.div(at, jnp.int32(tile.band * column_tiles))
                height = jnp.minimum(row_tiles - band * tile.band, tile.band)
                within = at - band * (tile.band * column_tiles)
                row = band * tile.band + lax.rem(within, height)
                return row * cluster + member, lax.div(within, height)

            def stage_of(part, slot):
                whole = w_s.at[slot]
                return whole if part.width == tile.columns else whole.at[:, pl.ds(0, part.width), :]

            def for_each_tile(do):
                """do(part, n, row tile, column tile of the part) for this CTA's tiles, n counting them; how many."""
                begun = done = 0
                for part in parts:
                    part_tiles = row_tiles * part.count
                    # The CTAs that the part before left idle in its last round come first.
                    first = lax.rem(cta + -begun % ctas, jnp.int32(ctas)) if begun else cta
                    count = 1
                    if part_tiles != ctas:
                        count = lax.div(jnp.int32(part_tiles - 1 + ctas) - first, jnp.int32(ctas))

                    def each_tile(local, _, part=part, first=first, done=done):
                        do(part, done + local, *origin(first + local * ctas, part.count))
                        return ()

                    lax.fori_loop(0, count, each_tile, ())
                    begun, done = begun + part_tiles, done + count
                return done

            @pl.when(group == groups)
            def _produce():
                if groups > 1:
                    plgpu.set_max_registers(40, action="decrease")

                def load(part, local, row, column):
                    def each_step(i, _):
                        step = local * steps + i
                        slot = lax.rem(step, jnp.int32(stages))

                        @pl.when(step >= stages)
                        def _():
                            plgpu.barrier_wait(empty.at[slot])

                        plgpu.copy_gmem_to_smem(
                            w_g.at[
                                pl.ds(i * k_blocks, k_blocks),
                                pl.ds(part.begin + column * part.width, part.width),
                                :,
                            ],
                            stage_of(part, slot),
                            full.at[slot],
                            # Each member loads a part for all; the interpreter, which can't, all for itself.
                            collective_axes=None if interpreted else "member",
                        )
                        if normed:
                            return ()
                        to = (
                            x_s.at[slot]
                            if loaded_rows == tile.rows
                            else x_s.at[slot, pl.ds(0, loaded_rows), :]
                        )
                        plgpu.copy_gmem_to_smem(
                            reaching_past(x_g, pl.ds(row * tile.rows, loaded_rows), pl.ds(i * depth, depth)),
                            to,
                            full.at[slot],
                        )
                        return ()

                    lax.fori_loop(0, steps, each_step, ())

                count = for_each_tile(load)
                # A member ends only after the others' last arrivals at its barriers.
                if interpreted or cluster > 1:
                    drain(empty, stages, count * steps)

            @pl.when(group < groups)
            def _consume():
                if groups > 1:
                    plgpu.set_max_registers(REGISTERS[groups], action="increase")
                if normed:
                    normalise(x_g, norm_g, x_s)

                def compute(part, local, row, column):
                    chunks = part.width // ratio // chunk
                    first_column = part.begin // ratio + column * (part.width // ratio)
                    first_row = row * tile.rows + group * group_rows

                    def load_residual(j):
                        at = group * buffers + j % buffers
                        to = residual_s.at[at]
                        plgpu.copy_gmem_to_smem(
                            residual_g.at[
                                pl.ds(first_row, added_rows), pl.ds(first_column + j * chunk, chunk)
                            ],
                            to if added_rows == group_rows else to.at[pl.ds(0, added_rows), :],
                            residual_bar.at[at],
                        )

                    if has_residual:
                        for j in range(min(buffers, chunks)):
                            load_residual(j)

                    def accumulate(acc):
                        def each_step(i, _):
                            step = local * steps + i
                            slot = lax.rem(step, jnp.int32(stages))
                            plgpu.barrier_wait(full.at[slot])
                            for block in range(k_blocks):
                                if normed:
                                    left = x_s.at[pl.ds((i * k_blocks + block) * 8, tile.rows)]
                                else:
                                    left = x_s.at[
                                        slot,
                                        pl.ds(group * group_rows, group_rows),
                                        pl.ds(block * K_BLOCK, K_BLOCK),
                                    ]
                                right = stage_of(part, slot).at[block].transpose((1, 0))
                                plgpu.wgmma(acc, left, right)
                            plgpu.wgmma_wait(k_blocks)  # the step before this one is done: its stage is free

                            @pl.when(i > 0)
                            def _():
                                plgpu.barrier_arrive(empty.at[lax.rem(step - 1, jnp.int32(stages))])

                            return ()

                        lax.fori_loop(0, steps, each_step, ())
                        value = acc[...]
                        plgpu.barrier_arrive(empty.at[lax.rem(local * steps + steps - 1, jnp.int32(stages))])
                        return value

                    sums = pl.run_scoped(accumulate, plgpu.ACC((group_rows, part.width), jnp.float32))
                    for j in range(chunks):
                        if saving:
                            both = sums[:, 2 * j * chunk : 2 * (j + 1) * chunk].astype(dtype)
                            inner = part.begin + column * part.width + 2 * j * chunk
                            store_tile(both, saved_g[0], first_row, inner)
                        if activation:
                            gate = sums[:, 2 * j * chunk : (2 * j + 1) * chunk]
                            up = sums[:, (2 * j + 1) * chunk : (2 * j + 2) * chunk]
                            y = ACTIVATIONS[activation](gate) * up
                        else:
                            y = sums[:, j * chunk : (j + 1) * chunk]
                        first = first_column + j * chunk
                        if has_bias:
                            bias = plgpu.load(
                                bias_g.at[pl.ds(first, chunk)],
                                layout=plgpu.Layout.WGMMA.reduce(0),
                                optimized=False,
                            )
                            y = y + lax.broadcast_in_dim(bias, (group_rows, chunk), [1])
                        if has_residual:
                            at = group * buffers + j % buffers
                            plgpu.barrier_wait(residual_bar.at[at])
                            y = y + residual_s[at].astype(jnp.float32)
                            if j + buffers < chunks or j == chunks - 1:
                                plgpu.commit_smem()  # what the next load writes over has been read by all warps
                            if j + buffers < chunks:
                                load_residual(j + buffers)
                        store_tile(y.astype(out_dtype), out_g, first_row, first)

                for_each_tile(compute)

        operand = _transforms(K_BLOCK)
        scratch = {}
        if has_residual:
            scratch = {
                "residual_s": plgpu.SMEM(
                    (groups * buffers, group_rows, chunk), dtype, transforms=_transforms(chunk)
                ),
                "residual_bar": plgpu.Barrier(num_arrivals=1, num_barriers=groups * buffers),
            }
        pl.run_scoped(
            scoped,
            x_s=plgpu.SMEM(
                (held, K_BLOCK) if normed else (stages, tile.rows, depth), dtype, transforms=operand
            ),
            w_s=plgpu.SMEM((stages, k_blocks, tile.columns, K_BLOCK), dtype, transforms=operand),
            full=plgpu.Barrier(num_arrivals=1 if normed else 2, num_barriers=stages),
            # A stage is free once every member has read its own: what one loads goes to all.
            empty=plgpu.ClusterBarrier(collective_axes=("member",), num_arrivals=groups, num_barriers=stages)
            if cluster > 1
            else plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            collective_axes="wg",
            **scratch,
        )

    out_type = jax.ShapeDtypeStruct((out_rows, columns // ratio), out_dtype)
    return plgpu.kernel(
        body,
        kernel_name=f"matmul_{k}x{columns}",
        out_type=(out_type, jax.ShapeDtypeStruct((out_rows, columns), dtype)) if saving else out_type,
        grid=(ctas,),
        grid_names=("cta",),
        cluster=(cluster,),
        cluster_names=("member",),
        num_threads=groups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
