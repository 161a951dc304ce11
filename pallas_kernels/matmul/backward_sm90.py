"""The matmul's gradient on Hopper: dw = sum so far + xᵀ · dy and dx = dy · wᵀ, both on the packed weights.

Order, per value of dw: the accumulator starts from the sum so far and adds products in ascending rows, in wgmma steps
of 16, chunks of GRADIENT_ROWS rows without a gradient left out. So a cut between micro-batches at a multiple of
GRADIENT_ROWS is a store and a load of the accumulator and changes no bit. Per value of dx: products in ascending
columns as packed (32 of gate, 32 of up, and so on, in a gated product), in wgmma steps of 16, from zero; one rounding
at the end. Tile shape, stages and number of CTAs don't touch either.

Both are one product, leftᵀ · right, whose left operand [contraction, 64 per warpgroup] wgmma reads transposed. What is
64 wide on the left is a block of the packed layout in dx and 64 columns in dw, so neither needs another layout.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import drain, interpreting, kernel_in_place, pl, plgpu
from pallas_kernels.matmul.activation_sm90 import before_activation
from pallas_kernels.matmul.live_sm90 import live_chunks, live_flags
from pallas_kernels.matmul.mosaic_gpu_sm90 import BARRIER_BYTES, K_BLOCK, REGISTERS, SHARED_BYTES, SMS
from pallas_kernels.numerics import GRADIENT_ROWS

DEPTH = GRADIENT_ROWS
"""Contraction per step: rows of dw, columns of dx."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a CTA computes; free of bits."""

    groups: int = 2
    """Consumer warpgroups, 64 columns (dw) or 64 k (dx) each."""
    wide: int = 256
    """Most k (dw) or rows (dx) per CTA."""
    band: int = 4
    """Tiles of the wide axis that go together, so that what they read stays in L2."""
    prefetch: int = 4
    """Of dw: steps from one part of the next tile's sums (64 k wide) that is brought to L2 to the next; 0: none is."""


def matmul(_kernel, x, packed, total, dy, _n):
    """(dx in x's dtype, total + xᵀ · dy in place of `total`), with dy [M, N] in the weights' dtype."""
    return input_gradient(dy, packed, x.shape[1]), weight_gradient(total, x, dy)


def gated_forward(kernel, x, packed, **options):
    """(act(x · w_gate) · (x · w_up), what `gated_matmul` wants of it: gate and up in x's dtype, as packed)."""
    return kernel.gated_matmul_saving(x, packed, **options)


def gated_matmul(_kernel, x, packed, total, inner, dy, _n, activation):
    """`matmul`'s for act(x · w_gate) · (x · w_up), with `inner` from `gated_forward`."""
    columns = inner.shape[1]
    d_inner = before_activation(_padded(inner, columns), _padded(dy, columns // 2), activation)
    return input_gradient(d_inner, packed, x.shape[1])[: len(x)], weight_gradient(total, x, d_inner)


def weight_gradient(total, x, dy, *, tile: Tile = Tile()):
    """total + xᵀ · dy in place of `total`.

    Args:
        total: the float32 sum so far, as packed: [ceil(K / 64), N rounded up to 64, 64].
        x: [M, K] in bfloat16 or float16. GRADIENT_ROWS rows from a multiple of that on whose dy is all zero add
            nothing, even if they are NaN; the others must be finite, a single row without a gradient too.
        dy: [M, N] in x's dtype, N up to the packed one.
        tile: another tile than the usual one.
    """
    blocks, columns, _ = total.shape
    x, dy = _padded(x, blocks * K_BLOCK), _padded(dy, columns)
    wide, groups = (
        _divisor(blocks * K_BLOCK, tile.wide),
        tile.groups if columns % (64 * tile.groups) == 0 else 1,
    )
    # The sums come through the ring, ahead of what is added to them, if a stage has room for 64 k of them.
    staged = wide % 128 == 0 and groups <= wide // 128
    options = groups, wide, tile.band, tile.prefetch, staged, interpreting()
    call = _weight_kernel(x.shape, columns, x.dtype, *options)
    sums = jax.new_ref(total)
    with jax.enable_x64(False):  # the kernel's loops count in int32
        call(x, dy, live_chunks(dy), sums)
    return jax.freeze(sums)


def input_gradient(dy, packed, k: int, *, tile: Tile = Tile()):
    """dy · wᵀ as [M, K] in dy's dtype.

    Args:
        dy: [M, N] in the weights' dtype, N up to the packed one.
        packed: what `pack` or `pack_gated` made of [K, N] weights.
        k: K.
        tile: another tile than the usual one.
    """
    blocks, columns, _ = packed.shape
    rows, dy = dy.shape[0], _padded(dy, columns)
    wide, groups = _divisor(dy.shape[0], tile.wide), tile.groups if blocks % tile.groups == 0 else 1
    call = _input_kernel(dy.shape, blocks, dy.dtype, groups, wide, tile.band, interpreting())
    with jax.enable_x64(False):
        dx = call(packed, dy)
    return dx if dx.shape == (rows, k) else dx[:rows, :k]


def _padded(x, columns: int):
    """Zeros up to a multiple of DEPTH rows and to `columns`."""
    pad = (0, -x.shape[0] % DEPTH), (0, columns - x.shape[1])
    return x if pad == ((0, 0), (0, 0)) else jnp.pad(x, pad)


def _divisor(size: int, most: int) -> int:
    """The widest tile that divides `size`: TMA boxes that are partly out of range are slow."""
    return next(width for width in (256, 192, 128, 64) if width <= most and size % width == 0)


@functools.cache
def _weight_kernel(shape, columns, dtype, groups, wide, band, every, staged, _interpreting):
    rows, k = shape
    blocks = wide // K_BLOCK

    def body(x_g, dy_g, found_g, sums_g):
        def load(row, column, chunk, left, right, full):
            depth = pl.ds(chunk * DEPTH, DEPTH)
            for group in range(groups):
                part = dy_g.at[depth, pl.ds((row * groups + group) * 64, 64)]
                plgpu.copy_gmem_to_smem(part, left.at[group], full)
            plgpu.copy_gmem_to_smem(x_g.at[depth, pl.ds(column * wide, wide)], right, full)

        def sums(row, column, group, block):
            return sums_g.at[column * blocks + block, pl.ds((row * groups + group) * 64, 64), :]

        def prefetch(row, column, block):
            part = pl.ds(row * groups * 64, groups * 64)
            plgpu.async_prefetch(sums_g.at[column * blocks + block, part, :])

        def start(row, column, group):
            return [
                plgpu.load(sums(row, column, group, block), layout=plgpu.Layout.WGMMA, optimized=False)
                for block in range(blocks)
            ]

        def stage(row, column, block, to, full):
            for group in range(groups):
                plgpu.copy_gmem_to_smem(sums(row, column, group, block), to.at[group], full)
            plgpu.barrier_arrive(full)  # for the copy that a step has more

        def finish(acc, row, column, group, _):
            for block in range(blocks):
                sums(row, column, group, block)[...] = acc[:, block * K_BLOCK : (block + 1) * K_BLOCK]

        _product(
            (columns // (64 * groups), k // wide),
            rows // DEPTH,
            load,
            start,
            finish,
            groups=groups,
            right=(DEPTH, wide),
            turned=False,
            copies=groups + 1,
            band=band,
            dtype=dtype,
            out=None,
            found=found_g,
            ahead=(blocks, every, prefetch) if every else None,
            staged=(blocks, stage) if staged else None,
        )

    tiles = columns // (64 * groups) * (k // wide)
    return _launch(kernel_in_place, body, f"dw_{k}x{columns}", tiles, groups)


@functools.cache
def _input_kernel(shape, blocks, dtype, groups, wide, band, _interpreting):
    rows, columns = shape

    def body(w_g, dy_g, dx_g):
        def load(row, column, step, left, right, full):
            depth = pl.ds(step * DEPTH, DEPTH)
            plgpu.copy_gmem_to_smem(w_g.at[pl.ds(row * groups, groups), depth, :], left, full)
            plgpu.copy_gmem_to_smem(dy_g.at[pl.ds(column * wide, wide), depth], right, full)

        def finish(acc, row, column, group, out):
            for first in range(0, wide, 64):
                y = plgpu.layout_cast(acc[:, first : first + 64].astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out.at[group].transpose((1, 0))[...] = y
                plgpu.commit_smem()
                where = pl.ds(column * wide + first, 64), pl.ds((row * groups + group) * 64, 64)
                plgpu.copy_smem_to_gmem(out.at[group], dx_g.at[where])

        _product(
            (blocks // groups, rows // wide),
            columns // DEPTH,
            load,
            lambda *_: None,
            finish,
            groups=groups,
            right=(wide, DEPTH),
            turned=True,
            copies=2,
            band=band,
            dtype=dtype,
            out=(groups, 64, 64),
        )

    out_type = jax.ShapeDtypeStruct((rows, blocks * K_BLOCK), dtype)
    tiles = blocks // groups * (rows // wide)
    return _launch(plgpu.kernel, body, f"dx_{blocks * K_BLOCK}x{columns}", tiles, groups, out_type=out_type)


def _launch(kernel, body, name, tiles, groups, **options):
    return kernel(
        body,
        kernel_name=name,
        grid=(min(tiles, SMS),),
        grid_names=("cta",),
        num_threads=groups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **options,
    )


def _product(
    tiles,
    steps,
    load,
    start,
    finish,
    *,
    groups,
    right,
    turned,
    copies,
    band,
    dtype,
    out,
    found=None,
    ahead=None,
    staged=None,
):
    """leftᵀ · right by tiles: one producer warpgroup, `groups` consumers of 64 rows of the result each.

    Args:
        tiles: number of tiles along the rows and columns of the result.
        steps: steps of DEPTH.
        load: (tile's row, column, step, left [groups, DEPTH, 64], right, barrier): `copies` copies.
        start: (tile's row, column, group) -> what the accumulator starts from, by columns, or None for zeros.
        finish: (accumulator, tile's row, column, group, out).
        right: the shape of a stage of the right operand: [DEPTH, columns], or [columns, DEPTH] if it is `turned`.
        out: shape of what `finish` stores through, or None.
        found: what `live_chunks` found, if steps are left out; without any left nothing is done.
        ahead: (parts, steps from one to the next, f(row, column, part of the next tile)), or None.
        staged: (parts, f(tile's row, column, part, where to [groups, 64, 64], barrier)): what the accumulator starts
            from, through the ring in place of `start`; or None.
    """
    count, wide = tiles[0] * tiles[1], right[0] if turned else right[1]
    ctas = min(count, SMS)
    used = BARRIER_BYTES + (groups * 64 * 64 * 2 if out else 0)
    if found is not None:
        used += (groups + 1) * found.shape[1] * 4
    stages = min((SHARED_BYTES - used) // ((groups * 64 + wide) * DEPTH * 2), 6)

    def scoped(left_s, right_s, full, empty, out_s=None, flags_s=None):
        if staged:
            right_s, sums_s = right_s
        group, cta = lax.axis_index("wg"), lax.axis_index("cta")
        mine = lax.div(jnp.int32(count - 1) - cta, jnp.int32(ctas)) + 1
        live, live_steps = lambda _: True, steps
        if found is not None:
            live, live_steps = live_flags(found, flags_s.at[group], steps)
            mine = jnp.where(live_steps > 0, mine, 0)

        before = staged[0] if staged else 0
        in_ring = before + live_steps

        def tile_of(local):
            return plgpu.planar_snake(cta + local * ctas, tiles, 1, band)

        def each_tile(work):
            def body(local, _):
                work(local, local * in_ring, *tile_of(local))
                return ()

            lax.fori_loop(0, mine, body, ())

        def prefetch(local, step):
            parts, every, part_of = ahead
            every = jnp.maximum(jnp.minimum(lax.div(live_steps, jnp.int32(parts)), every), 1)
            # Over the tile's last steps: what is there earlier is gone from L2 again.
            step = step - (live_steps - parts * every)
            now = (step >= 0) & (lax.rem(step, every) == 0) & (local + 1 < mine)
            pl.when(now)(lambda: part_of(*tile_of(local + 1), lax.div(step, every)))

        @pl.when(group == groups)
        def _produce():
            if groups > 1:
                plgpu.set_max_registers(40, action="decrease")

            def work(local, first, row, column):
                def free(at):
                    slot = lax.rem(at, jnp.int32(stages))
                    pl.when(at >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    return slot

                for part in range(before):
                    slot = free(first + part)
                    staged[1](row, column, part, sums_s.at[slot], full.at[slot])
                first = first + before

                def each_step(i, at):
                    @pl.when(live(i))
                    def _():
                        slot = free(at)
                        load(row, column, i, left_s.at[slot], right_s.at[slot], full.at[slot])
                        if ahead:
                            prefetch(local, at - first)

                    return at + jnp.int32(live(i))

                lax.fori_loop(0, steps, each_step, first)

            each_tile(work)
            if interpreting():
                drain(empty, stages, mine * in_ring)

        @pl.when(group < groups)
        def _consume():
            if groups > 1:
                plgpu.set_max_registers(REGISTERS[groups], action="increase")

            def operands(slot):
                a = left_s.at[slot, group].transpose((1, 0))
                return a, right_s.at[slot].transpose((1, 0)) if turned else right_s.at[slot]

            def work(_, first, row, column):
                def release(step):
                    plgpu.barrier_arrive(empty.at[lax.rem(step, jnp.int32(stages))])

                if staged:
                    begin = []
                    for part in range(before):
                        slot = lax.rem(first + part, jnp.int32(stages))
                        plgpu.barrier_wait(full.at[slot])
                        begin.append(plgpu.load(sums_s.at[slot, group], layout=plgpu.Layout.WGMMA))
                        plgpu.commit_smem()  # all warps have read it before a copy writes over it
                        release(first + part)
                    first = first + before
                else:
                    begin = start(row, column, group)
                if begin is None:
                    begin = plgpu.layout_cast(jnp.zeros((64, wide), jnp.float32), plgpu.Layout.WGMMA)
                else:
                    begin = jnp.concatenate(begin, axis=1)

                def accumulate(acc):
                    def each_step(i, _):
                        slot = lax.rem(first + i, jnp.int32(stages))
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.wgmma(acc, *operands(slot))
                        plgpu.wgmma_wait(1)  # the step before this one is done: its stage is free
                        pl.when(i > 0)(lambda: release(first + i - 1))
                        return ()

                    lax.fori_loop(0, live_steps, each_step, ())

                def interpreted(i, acc):  # which starts no accumulator from a value
                    slot = lax.rem(first + i, jnp.int32(stages))
                    plgpu.barrier_wait(full.at[slot])

                    def multiply(ref):
                        plgpu.wgmma(ref, *operands(slot))
                        return ref[...]

                    acc = acc + pl.run_scoped(multiply, plgpu.ACC((64, wide), jnp.float32))
                    release(first + i)
                    return acc

                if interpreting():
                    acc = lax.fori_loop(0, live_steps, interpreted, begin)
                else:
                    acc = pl.run_state(accumulate)(plgpu.ACC.init(begin))
                    release(first + live_steps - 1)
                finish(acc, row, column, group, out_s)

            each_tile(work)
            if out:
                plgpu.wait_smem_to_gmem(0)

    swizzle = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    scratch = {}
    if out:
        scratch["out_s"] = plgpu.SMEM(out, dtype, transforms=swizzle)
    if found is not None:
        scratch["flags_s"] = plgpu.SMEM((groups + 1, found.shape[1]), jnp.float32)
    right_s = plgpu.SMEM((stages, *right), dtype, transforms=swizzle)
    if staged:  # a stage has the same bytes either way
        shape, transforms = (stages, wide // 128, 64, 64), (plgpu.TilingTransform((8, 32)), swizzle[1])
        right_s = plgpu.RefUnion(right_s, plgpu.SMEM(shape, jnp.float32, transforms=transforms))
    pl.run_scoped(
        scoped,
        plgpu.SMEM((stages, groups, DEPTH, 64), dtype, transforms=swizzle),
        right_s,
        plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        collective_axes="wg",
        **scratch,
    )
