"""The only module that names unstable jax.experimental APIs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib import cuda_versions
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith as mlir_arith
from jax._src.lib.mlir.dialects import llvm as mlir_llvm
from jax._src.lib.mlir.dialects import math as mlir_math
from jax._src.lib.mlir.dialects import memref as mlir_memref
from jax._src.lib.mlir.dialects import scf as mlir_scf
from jax._src.lib.mlir.dialects import vector as mlir_vector
from jax.experimental import pallas as pl
from jax.experimental.compilation_cache.compilation_cache import reset_cache as reset_compilation_cache
from jax.experimental.mosaic.gpu import fragmented_array as mgpu_arrays
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

__all__ = [
    "add_rounded",
    "count_up",
    "cuda_libraries",
    "drain",
    "fused_multiply_add",
    "gpu_interpreter",
    "interpreting",
    "kernel_in_place",
    "load_operand_row",
    "load_part",
    "pl",
    "plgpu",
    "pltpu",
    "reaching_past",
    "reduce_columns",
    "require_hopper",
    "reset_compilation_cache",
    "store_any_width",
    "store_operand_row",
    "store_part",
    "store_tile",
    "store_turned",
    "tpu_interpreter",
]


def cuda_libraries() -> dict[str, int]:
    """Versions of the CUDA libraries that JAX found, by name; none where it has no CUDA."""
    if cuda_versions is None:
        return {}
    return {
        "cublas": cuda_versions.cublas_get_version(),
        "runtime": cuda_versions.cuda_runtime_get_version(),
        "driver": cuda_versions.cuda_driver_get_version(),
    }


def gpu_interpreter(*, detect_races: bool = False):
    """Context in which Mosaic GPU kernels run on the CPU; a read past an array's end gives NaN.

    Args:
        detect_races: print "RACE DETECTED" where accesses of memory, by warpgroups or copies, aren't ordered.
    """
    return plgpu.force_gpu_interpret_mode(
        plgpu.InterpretGPUParams(out_of_bounds_reads="uninitialized", detect_races=detect_races)
    )


def tpu_interpreter(*, simulate: bool = True):
    """Context in which Mosaic TPU kernels run on the CPU.

    Args:
        simulate: step by step, copies done when they are waited for, and NaN in memory that nothing wrote; else as
            one XLA program, several times as fast.
    """
    return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams() if simulate else True)  # type: ignore[arg-type]


def interpreting() -> bool:
    """Whether kernels traced now run in interpret mode, which cannot execute inline Mosaic operations."""
    return jax._src.config.pallas_tpu_interpret_mode_context_manager.value is not None


def drain(barriers, stages: int, steps) -> None:
    """Waits for the last phase of each barrier of a ring that went through `steps`: the interpreter wants it seen."""

    def wait(step, _):
        plgpu.barrier_wait(barriers.at[lax.rem(step, jnp.int32(stages))])
        return ()

    lax.fori_loop(jnp.maximum(steps - stages, 0), steps, wait, ())


def require_hopper(op: str) -> None:
    """Raises ValueError on a GPU other than Hopper; a machine without one may interpret or lower kernels."""
    if jax.default_backend() != "gpu":
        return
    capability = jax.devices()[0].compute_capability
    if capability != "9.0":
        raise ValueError(
            f"{op}: mosaic_gpu needs compute capability 9.0, this GPU has {capability}; use backend='xla'"
        )


def kernel_in_place(
    body,
    *,
    kernel_name,
    out_type=(),
    grid,
    grid_names,
    num_threads=None,
    thread_name=None,
    compiler_params=None,
):
    """`plgpu.kernel` whose inputs may be `jax.Ref`s that it writes, which that one refuses."""
    mesh = plgpu.Mesh(
        grid=grid,
        grid_names=grid_names,
        num_threads=num_threads,
        thread_name=thread_name,
        kernel_name=kernel_name,
    )
    return pl.kernel(body, out_type=out_type, mesh=mesh, name=kernel_name, compiler_params=compiler_params)


def fused_multiply_add(a, b, c, layout):
    """a · b + c with one rounding, inside a Mosaic GPU kernel; the interpreter may round twice."""
    if interpreting():
        return a * b + c

    @plgpu.inline_mgpu(
        arg_types=(layout,) * 3,
        return_type=plgpu.ShapeDtypeStruct(c.shape, c.dtype, layout=layout),
    )
    def fma(_, x, y, z):
        return x._pointwise(mlir_math.fma, y, z)

    return fma(a, b, c)


def reaching_past(ref, *index):
    """`ref.at[index]` with a range that may reach past the end, where a Mosaic GPU copy fills in zeros.

    From jax 0.12 on, `at` refuses ranges of which it knows that.
    """
    part = ref.at[tuple(slice(None) if isinstance(i, pl.Slice) else i for i in index)]
    *others, inside = part.transforms
    whole = inside.indices[len(index) :]
    given = (i if isinstance(i, pl.Slice) else j for i, j in zip(index, inside.indices, strict=False))
    return dataclasses.replace(
        part, transforms=(*others, dataclasses.replace(inside, indices=(*given, *whole), validate=False))
    )


def store_any_width(x, ref):
    """`ref[...] = x` to device memory; jax 0.12 refuses the plain form where stores don't fill whole cache lines."""
    if interpreting() or not hasattr(plgpu, "store"):
        ref[...] = x
    else:
        plgpu.store(ref, x, optimized=False)


def store_part(x, layout, ref, *ranges):
    """Writes rows (and columns) x[start : start + size], a (start, size) each, to `ref` in device memory.

    Inside a Mosaic GPU kernel, for parts that no copy through shared memory takes; `ref` has the part's shape.
    """
    if interpreting():
        ref[...] = x[tuple(slice(start, start + size) for start, size in ranges)]
        return

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))
    def store(_, array, target):
        for at, values in zip(array.layout.thread_idxs(array.shape), array.registers.flat, strict=True):
            at, inside = _within(at, ranges)
            with mgpu.when(inside):
                mlir_vector.store(values, target, at)

    store(x, ref)


def store_tile(x, ref, row, column) -> None:
    """Writes x [R, C], laid out as a wgmma leaves it, to `ref` in device memory from (row, column) on.

    Inside a Mosaic GPU kernel; what would lie past the end of `ref` is dropped. It takes no shared memory and waits
    for nothing. Of 16-bit values the four lanes of a row hold two of every eight columns each; they trade them, so
    that each writes 16 bytes at once.

    Args:
        ref: [rows, columns] of 2 or 4 bytes a value; `column` and the columns are multiples of 8.
    """
    rows, columns = ref.shape
    if interpreting():
        for at in range(0, x.shape[1], 8):

            @pl.when(column + at < columns)
            def _(at=at):
                ref[pl.ds(row, x.shape[0]), pl.ds(column + at, 8)] = x[:, at : at + 8]

        return
    size = jnp.dtype(ref.dtype).itemsize
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), splat, splat))
    def store(_, array, target, row, column):
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        add, times, quotient, rest = (
            lambda a, n, do=do: do(a, mgpu.c(n, i32))
            for do in (mlir_arith.addi, mlir_arith.muli, mlir_arith.divui, mlir_arith.remui)
        )
        inside = lambda a, n: mlir_arith.cmpi(mlir_arith.CmpIPredicate.ult, a, mgpu.c(n, i32))  # noqa: E731
        at_byte = lambda a, n: mlir_arith.muli(mlir_arith.extui(i64, a), mgpu.c(n, i64))  # noqa: E731
        thread = rest(mgpu.thread_idx(), 128)
        lane = rest(thread, 4)
        # A warp has 16 rows of 64, four lanes two of them, 8 apart.
        mine = mlir_arith.addi(times(quotient(thread, 32), 16), quotient(rest(thread, 32), 4))
        row, column = (value.registers.flat[0] for value in (row, column))
        begin = mlir_llvm.ptrtoint(i64, mgpu.memref_ptr(target))
        registers = array.registers.reshape(x.shape[0] // 64, x.shape[1] // 8, 2)
        for block, half in np.ndindex(len(registers), 2):
            at = add(mlir_arith.addi(row, mine), 64 * block + 8 * half)
            line = mlir_arith.addi(begin, at_byte(at, columns * size))
            held = [_words(pair) for pair in registers[block, :, half]]
            while held:
                group = registers.shape[1] - len(held)
                if size == 2 and len(held) >= 4:
                    values, held, spread = _traded([word for (word,) in held[:4]], lane), held[4:], 8
                else:
                    values, held, spread = held[0], held[1:], 2
                to = add(mlir_arith.addi(column, times(lane, spread)), 8 * group)
                names = ", ".join(f"${i}" for i in range(1, len(values) + 1))
                kind, names = ("b32", names) if len(values) == 1 else (f"v{len(values)}.b32", f"{{{names}}}")
                mgpu.inline_ptx(
                    f"st.global.{kind} [$0], {names};",
                    mlir_arith.addi(line, at_byte(to, size)),
                    *values,
                    predicate=mlir_arith.andi(inside(at, rows), inside(to, columns)),
                )

    store(x, ref, jnp.int32(row), jnp.int32(column))


def _words(vector) -> list:
    """The 32-bit words of a register."""
    i32 = ir.IntegerType.get_signless(32)
    words = mlir_vector.bitcast(ir.VectorType.get((mgpu.bitwidth(vector.type) // 32,), i32), vector)
    at = [ir.DenseI64ArrayAttr.get([i]) for i in range(words.type.shape[0])]
    return [mlir_vector.extract(words, dynamic_position=[], static_position=i) for i in at]


def _traded(values: list, lane) -> list:
    """Of four lanes that hold four values each: lane q gets the q-th of every lane."""
    i32, values = ir.IntegerType.get_signless(32), list(values)
    for distance in (1, 2):
        bit = mlir_arith.andi(lane, mgpu.c(distance, i32))
        upper = mlir_arith.cmpi(mlir_arith.CmpIPredicate.ne, bit, mgpu.c(0, i32))
        for i in (i for i in range(4) if not i & distance):
            a, b = values[i], values[i + distance]
            got = mgpu.shfl_bfly(mlir_arith.select(upper, a, b), distance)
            values[i] = mlir_arith.select(upper, got, a)
            values[i + distance] = mlir_arith.select(upper, b, got)
    return values


def store_operand_row(x, layout, ref, row) -> None:
    """Writes x [K], a row of a wgmma operand, to row `row` of every 8 rows of `ref` in shared memory, 64 columns each.

    Inside a Mosaic GPU kernel. So `ref` [K / 8, 64] holds the tile of 8 rows and 64 columns that step k of a product
    takes in its rows 8 k to 8 k + 7.

    Args:
        ref: tiled in (8, 64) and swizzled by 128 bytes; may have more rows.
        layout: WG_STRIDED, vectors of 8 elements at most.
    """
    if interpreting():
        for block in range(x.shape[0] // 64):
            ref[8 * block + row] = x[64 * block : 64 * (block + 1)]
        return

    @plgpu.inline_mgpu(arg_types=(layout, _OPERAND, plgpu.Layout.WG_SPLAT))
    def store(_, array, target, row):
        places = _operand_places(array.layout, array.shape, row)
        for at, values in zip(places, array.registers.flat, strict=True):
            mlir_vector.store(values, target, at)

    store(x, ref, jnp.int32(row))


def load_operand_row(ref, layout, size: int, row):
    """The row [size] that `store_operand_row` wrote; each thread reads what it wrote itself."""
    if interpreting():
        return jnp.concatenate([ref[8 * block + row] for block in range(size // 64)])

    kind = plgpu.ShapeDtypeStruct((size,), ref.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(_OPERAND, plgpu.Layout.WG_SPLAT), return_type=kind)
    def load(_, source, row):
        spread = layout.to_mgpu()
        element = ir.VectorType.get((spread.vec_size,), source.type.element_type)
        places = _operand_places(spread, (size,), row)
        registers = np.array([mlir_vector.load(element, source, at) for at in places], dtype=object)
        return mgpu_arrays.FragmentedArray(_registers=registers, _layout=spread, _is_signed=None)

    return load(ref, jnp.int32(row))


_OPERAND = plgpu.RefType((plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def _operand_places(layout, shape, row):
    """Where the registers of a row lie in an operand's tiles: the swizzle moves eighths of a row of 128 bytes."""
    index = lambda value: mlir_arith.constant(ir.IndexType.get(), value)  # noqa: E731
    row = mlir_arith.index_cast(ir.IndexType.get(), row.registers.flat[0])
    eighth = mlir_arith.muli(row, index(8))
    for (column,) in layout.thread_idxs(shape):
        block, inside = (op(column, index(64)) for op in (mlir_arith.divui, mlir_arith.remui))
        yield [block, index(0), row, mlir_arith.xori(inside, eighth)]


def load_part(ref, shape, layout):
    """`ref` in device memory as the first rows of an array of `shape`; the others are zero. Like `store_part`."""
    if interpreting():
        x = ref[...]
        return lax.pad(
            x, jnp.zeros((), x.dtype), [(0, shape[0] - x.shape[0], 0)] + [(0, 0, 0)] * (x.ndim - 1)
        )

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=layout)
    )
    def load(_, source):
        tiled, element = layout.to_mgpu(), source.type.element_type
        kind, registers = tiled.registers_element_type(element), []
        for at in tiled.thread_idxs(shape):
            at, inside = _within(at, ((0, ref.shape[0]),))
            choice = mlir_scf.IfOp(inside, [kind], has_else=True)
            with ir.InsertionPoint(choice.then_block):
                mlir_scf.yield_([mlir_vector.load(kind, source, at)])
            with ir.InsertionPoint(choice.else_block):
                zero = ir.DenseElementsAttr.get_splat(kind, ir.FloatAttr.get(element, 0.0))
                mlir_scf.yield_([mlir_arith.constant(kind, zero)])
            registers.append(choice.results[0])
        array = np.array(registers, dtype=object).reshape(tiled.registers_shape(shape))
        return mgpu_arrays.FragmentedArray(_registers=array, _layout=tiled, _is_signed=None)

    return load(ref)


def _within(at, ranges):
    """The index `at` less the starts of `ranges`, and whether it is inside them; one unsigned comparison a range."""
    index, moved, inside = ir.IndexType.get(), list(at), []
    for axis, (start, size) in enumerate(ranges):
        moved[axis] = mlir_arith.subi(at[axis], mlir_arith.constant(index, start)) if start else at[axis]
        less = mlir_arith.CmpIPredicate.ult
        inside.append(mlir_arith.cmpi(less, moved[axis], mlir_arith.constant(index, size)))
    return moved, functools.reduce(mlir_arith.andi, inside)


def count_up(counter, seen) -> None:
    """Adds one to `counter` [1] in device memory, after all that this CTA wrote; `seen` [1] becomes what it was.

    A CTA that sees the others' counts may read what they wrote before.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def add(_, counter, seen):
        i32 = ir.IntegerType.get_signless(32)
        zero = mlir_arith.constant(ir.IndexType.get(), 0)
        mgpu.warpgroup_barrier()
        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            old = mgpu.inline_ptx(
                "atom.acq_rel.gpu.global.add.u32 $0, [$1], $2;",
                mgpu.memref_ptr(counter),
                mgpu.c(1, i32),
                result_types=i32,
                has_side_effects=True,
            )
            mlir_memref.store(old, seen, [zero])
        mgpu.warpgroup_barrier()

    add(counter, seen)


def add_rounded(a, b, layout):
    """a + b, inside a Mosaic GPU kernel; Mosaic's own sum lets the compiler fuse a product in a or b into it."""
    if interpreting():
        a, b = lax.optimization_barrier((a, b))
        return a + b

    @plgpu.inline_mgpu(
        arg_types=(layout,) * 2,
        return_type=plgpu.ShapeDtypeStruct(a.shape, a.dtype, layout=layout),
    )
    def add(_, x, y):
        return x._pointwise(mlir_arith.addf, y)

    return add(a, b)


def reduce_columns(x, layout, row_layout):
    """Sum over the columns of [rows, columns] in one tree, that of a WGMMA tile.

    Mosaic's own `sum` picks its tree from the rows a warpgroup holds. Column 8g + 2t + e: even g ascending
    plus odd g ascending, then e = 0 plus e = 1, then (t₀ + t₁) + (t₂ + t₃).

    Args:
        layout: WGMMA, or one whose lanes hold columns 16 apart, ascending, and whose lane dimensions along the columns
            are, from the major one, t, e and the parity of g.
    """
    if interpreting():
        parts = x.reshape(x.shape[0], -1, 2, 4, 2)
        parts = functools.reduce(jnp.add, (parts[:, i] for i in range(parts.shape[1])))
        parts = parts[:, 0] + parts[:, 1]
        parts = parts[:, :, 0] + parts[:, :, 1]
        return (parts[:, 0] + parts[:, 1]) + (parts[:, 2] + parts[:, 3])
    # Sums in flight: of a WGMMA tile's lane, two a row; elsewhere lanes hold even and odd g.
    ilp = x.shape[0] // 8 if layout == plgpu.Layout.WGMMA else 1

    @plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct((x.shape[0],), x.dtype, layout=row_layout),
    )
    def pinned(_, tile):
        return tile.reduce("add", 1, acc_ilp=ilp)

    return pinned(x)


def store_turned(x, layout, ref):
    """Writes x [I, J] to `ref` [j, I] of any memory, as far as it has rows: ref[j, i] = x[i, j].

    Inside a Mosaic GPU kernel; threads of the warpgroup may read it at once.
    """
    if interpreting():
        ref[...] = x.T[: ref.shape[0]]
        return

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))
    def store(_, array, target):
        mgpu.warpgroup_barrier()
        for (i, j), values in zip(array.layout.thread_idxs(array.shape), array.registers.flat, strict=True):
            for offset in range(values.type.shape[0]):
                at = mlir_arith.addi(j, mlir_arith.constant(ir.IndexType.get(), offset))
                value = mlir_vector.extract(
                    values, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([offset])
                )
                (at, _), inside = _within((at, i), ((0, ref.shape[0]),))
                with mgpu.when(inside):
                    mlir_memref.store(value, target, [at, i])
        mgpu.warpgroup_barrier()

    store(x, ref)
