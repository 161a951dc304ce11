"""The contract's lint: names every op of a compiled program whose order or rounding XLA is free to choose.

It reads optimised HLO (`compiled.as_text()`), where an op outside a fusion finds its operands rounded, in memory; and
unoptimised HLO (`lowered.as_text("hlo", debug_info=True)`, which needs no device of the platform it is lowered for),
where whatever has no optimisation barrier in between may come into one fusion. docs/contract.md has the rules.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jax.stages import Compiled
from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxdet.engine.step import Step
from jaxdet.verify.hlo_module import REDUCTIONS, Computation, Op, Program
from pallas_kernels.arrays import round_up
from pallas_kernels.backend import attention_tiles, row_tile, rows_are_free
from pallas_kernels.matmul.xla import BLOCKED_MAX_ROWS
from pallas_kernels.numerics import COLUMN_BLOCK, K_CHUNK, PAGE_SIZE, ROW_TILE
from pallas_kernels.proven import ATTENTION_GROUP, ATTENTION_TILE, BASE, Tiles

# How the targets of custom calls begin: our kernels'; XLA's own that round nothing (sorting, placement); cuBLAS's.
KERNELS = ("mosaic_gpu", "tpu_custom_call")
EXACT_CALLS = ("TopK", "__gpu$TopK", "__cub$Device", "Sharding", "SPMD", "AllocateBuffer", "ConcatBitcast")
CUBLAS = "__cublas"
XLA_KERNEL = re.compile(r"(?!after ).* at pallas_kernels/\w+/xla\.py:")

# fmt: off
COPIES = {"concatenate", "convert", "copy", "dynamic-slice", "pad", "reshape", "reverse", "slice", "transpose"}
MOVES = COPIES | {"bitcast", "broadcast", "get-tuple-element", "tuple"}
CARRIERS = {"call", "conditional", "dynamic-update-slice", "opt-barrier", "while"}
EXACT = MOVES | {
    "abs", "after-all", "all-gather", "all-to-all", "async", "bitcast-convert", "call",
    "ceil", "clamp", "collective-permute", "compare", "conditional", "constant", "dynamic-update-slice",
    "floor", "fusion", "gather", "iota", "is-finite", "maximum", "minimum", "negate", "opt-barrier",
    "parameter", "round-nearest-afz", "round-nearest-even", "select", "sign", "sort", "topk", "while",
}
ELEMENTWISE = {
    "add", "atan2", "cbrt", "cosine", "divide", "erf", "exponential", "exponential-minus-one", "log",
    "log-plus-one", "logistic", "multiply", "power", "remainder", "rsqrt", "sine", "sqrt", "subtract",
    "tan", "tanh",
}
# fmt: on

DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""Their names in HLO."""
ON_CHIP = "S(1)"
"""What marks a result in a TPU's VMEM: fetched for the op that reads it, and no copy in memory."""
CUBLAS_ALIGN = 8
"""Columns and depth of a matrix are multiples of it where cuBLAS multiplies 16-bit numbers."""
AT_LEAST = 2**20
"""Bytes from which a copy is reported."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """An op that breaks the contract, and why."""

    op: Op
    why: str

    def __str__(self) -> str:
        return (
            f"{self.op.name} = {self.op.shape} {self.op.opcode} {self.why} [{self.op.source or 'no source'}]"
        )


def copies(program: Program, at_least: int = AT_LEAST, *, of_what_stays: bool = False) -> Iterator[Finding]:
    """Ops of an optimised program that only move data, fusions of such ops too; a gather is a lookup, no copy.

    Args:
        at_least: bytes that must be both read and written to count.
        of_what_stays: only those of weights, and of the cache in any state.
    """
    # Pages may lie transposed.
    cache = {(dtype, *sorted(dims)) for dtype, dims in _cache_parts(program)}
    for computation in program.loose:
        for op in computation.values():
            if op.opcode.endswith("-start") or ON_CHIP in op.shape:
                continue
            start = computation.operands(op)[0] if op.opcode.endswith("-done") else op
            read = sum(o.size for o in computation.operands(start) if not _filled(computation, o))
            if min(op.size, read) < at_least or not _only_moves(program, start):
                continue
            if not of_what_stays or _moves_what_stays(program, computation, start, cache):
                yield Finding(op, f"copies {op.size / 2**20:.1f} MB")


def misplaced(program: Program, at_least: int = AT_LEAST) -> Iterator[Finding]:
    """Results that have the shape of a part of the argument `cache`, and aren't written in an argument's place.

    Args:
        at_least: bytes from which a result counts.
    """
    cache = _cache_parts(program)
    results = [("", program.result)]
    if program.result.opcode == "tuple":
        results = [(str(i), program.entry[name]) for i, name in enumerate(program.result.operands)]
    for index, op in results:
        if op.size >= at_least and op.arrays[0] in cache and index not in program.aliased:
            yield Finding(op, "is returned, and not written in the place of the cache")


def _cache_parts(program: Program) -> set[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of the argument `cache`."""
    parameters = (op for op in program.entry.values() if op.opcode == "parameter")
    return {op.arrays[0] for op in parameters if op.source.startswith("cache")}


def _moves_what_stays(program: Program, computation: Computation, op: Op, cache: set) -> bool:
    """Whether nothing but moves lies between `op` and a weight, or something as large as a part of the cache.

    Args:
        cache: its parts' dtypes and sorted dimensions.
    """
    pending = computation.operands(op)
    while pending:
        source = pending.pop()
        dtype, dims = source.arrays[0]
        if len(source.arrays) == 1 and (dtype, *sorted(dims)) in cache:
            return True
        if source.opcode == "parameter":
            # In a loop's body it is all that the loop carries. The table of RoPE is no weight: a v5p's XLA lays out
            # its 2 MB anew in every step.
            name = source.source
            if computation is not program.entry or (
                name.startswith(("state", "cache")) and "rope" not in name
            ):
                return True
        elif source.opcode == "get-tuple-element":
            pending.append(_element(computation, source))
        elif _plain(source) in MOVES | CARRIERS or _only_moves(program, source):
            pending += computation.operands(source)
    return False


def _element(computation: Computation, op: Op) -> Op:
    """What `op` takes out of a tuple: out of a loop, what went in at that place."""
    (carrier,) = computation.operands(op)
    while carrier.opcode in ("while", "opt-barrier"):
        (carrier,) = computation.operands(carrier)
    index = re.search(r"index=(\d+)", op.attributes)
    if carrier.opcode != "tuple" or not index:
        return carrier
    return computation[carrier.operands[int(index[1])]]


def _filled(computation: Computation, op: Op) -> bool:
    """Whether `op` repeats a scalar, so that its bytes are no data."""
    scalars = all(math.prod(o.arrays[0][1]) == 1 for o in computation.operands(op))
    return op.opcode in ("broadcast", "fusion") and scalars


def _only_moves(program: Program, op: Op) -> bool:
    if not op.opcode.startswith("fusion"):
        return _plain(op) in COPIES
    opcodes = {inner.opcode for inner in program.applied(op)}
    return opcodes <= MOVES | {"parameter", "constant"} and not opcodes.isdisjoint(COPIES)


def unpinned(program: Program) -> Iterator[Finding]:
    """Float ops of XLA's own whose order or rounding is its choice."""
    named = {op.name: op for op in program.ops}
    for op in program.ops:
        if not op.float_bits:
            continue
        if op.opcode in REDUCTIONS:
            if not _drops_an_axis(named, op) and any(
                inner.opcode in ELEMENTWISE and inner.float_bits for inner in program.applied(op)
            ):
                yield Finding(op, "reduces floats in an order of XLA's choice")
        elif op.opcode == "custom-call":
            if not op.target.startswith((*KERNELS, *EXACT_CALLS)):
                yield Finding(op, f"is {op.target}, no kernel of ours")
        elif _plain(op) not in EXACT | ELEMENTWISE | REDUCTIONS:
            yield Finding(op, "sums in an order of XLA's choice")
    for computation in program.fused if program.optimised else program.loose:
        rounded = {name for name, op in computation.items() if _rounds(computation, op)}
        for op in filter(lambda op: op.float_bits, computation.values()):
            sources = list(_sources(computation, op))
            if op.opcode in ("add", "subtract") and any(s.opcode == "multiply" for s in sources):
                yield Finding(op, "takes a product, and XLA may contract the two into one rounding")
            # In an optimised program such a rounding is one that XLA has kept.
            goes_on = op.name in rounded or _widens(computation, op)
            if goes_on and not program.optimised and any(s.name in rounded for s in sources):
                yield Finding(op, "goes on from a rounded value, and XLA may leave out that rounding")


def _drops_an_axis(named: Mapping[str, Op], op: Op) -> bool:
    """Whether `op` adds −0 to single values: on TPUs XLA writes a reshape that drops an axis of 1 as such a sum."""
    if op.opcode != "reduce" or len(op.operands) != 2:
        return False
    value, start = (named.get(name) for name in op.operands)
    if value is None or start is None or start.operands != ("-0",):
        return False
    return value.size == op.size


def _plain(op: Op) -> str:
    """The opcode of what an asynchronous op starts or ends."""
    return re.sub(r"-(start|update|done)$", "", op.opcode)


def _sources(computation: Computation, op: Op) -> Iterator[Op]:
    """The ops whose results come to `op` with nothing but moves and signs in between, and those moves."""
    pending = computation.operands(op)
    while pending:
        yield (source := pending.pop())
        if _plain(source) in MOVES or source.opcode == "negate":
            pending += computation.operands(source)


def _rounds(computation: Computation, op: Op) -> bool:
    """Whether `op` rounds to fewer bits than XLA computes in."""
    if op.opcode == "convert":
        return 0 < op.float_bits < computation.operands(op)[0].float_bits
    return op.opcode in ELEMENTWISE and 0 < op.float_bits < 32


def _widens(computation: Computation, op: Op) -> bool:
    return op.opcode == "convert" and op.float_bits > computation.operands(op)[0].float_bits > 0


class Dot(NamedTuple):
    """The shape of an XLA dot."""

    batch: int
    rows: int
    depth: int
    columns: int
    dtypes: tuple[str, ...]


def dots(program: Program) -> Iterator[tuple[Op, Dot]]:
    """Every float dot, cuBLAS's too, with its shape."""
    for computation in (*program.loose, *program.fused):
        for op in filter(_is_dot, computation.values()):
            (x, left), (y, right) = (o.arrays[0] for o in computation.operands(op)[:2])
            batch, depth = (
                math.prod(left[i] for i in _axes(op, f"lhs_{k}")) for k in ("batch", "contracting")
            )
            outer = max(batch * depth, 1)
            dtypes = (x, y, op.arrays[0][0])
            yield op, Dot(batch, math.prod(left) // outer, depth, math.prod(right) // outer, dtypes)


def _is_dot(op: Op) -> bool:
    return op.float_bits > 0 and (op.opcode == "dot" or op.target.startswith(CUBLAS))


def _axes(op: Op, kind: str) -> list[int]:
    """Of `lhs_batch_dims={0,1}`, or cuBLAS's `"lhs_batch_dimensions":["0","1"]`."""
    found = re.search(rf'{kind}_dim(?:s=|ensions":)[{{\[]([\d,"]*)', op.attributes)
    return [int(i) for i in re.findall(r"\d+", found[1])] if found else []


def misshapen(programs: Mapping[str, Program], tiles: Tiles = BASE) -> Iterator[tuple[str, Finding]]:
    """Dots that no kernel of the xla backend asks for, and dots that not every program (bucket) has.

    A kernel's dot states the highest precision. Where its rows are free (`rows_are_free`) it has at least two, sums
    at most K_CHUNK products, has whole blocks of columns (at most a page of keys up to BLOCKED_MAX_ROWS rows), and
    every program has dots of that depth; elsewhere every program has dots of exactly that shape, where one that `tiles`
    has counts as the base tile's, and a product of two matrices has the base tile's rows.
    """
    free = rows_are_free()
    base = _bases(tiles)
    found = {
        name: [(op, dot, _form(dot, free, base)) for op, dot in dots(program)]
        for name, program in programs.items()
    }
    forms = {name: {form for _, _, form in triples} for name, triples in found.items()}
    for name, triples in found.items():
        for op, dot, form in triples:
            missing = [other for other in forms if form not in forms[other]]
            if not re.search(
                r'operand_precision"?[=:][{\[]"?highest"?,"?highest', op.attributes, re.IGNORECASE
            ):
                yield name, Finding(op, "states no precision, so none of our kernels asked for it")
            elif free and not _in_blocks(dot):
                yield name, Finding(op, f"has a shape whose order may depend on the rows: {dot}")
            elif missing:
                yield name, Finding(op, f"has a shape that {', '.join(missing)} lacks: {dot}")
            elif not free and dot.batch == 1 and form[1] not in _base_rows(dot):
                yield name, Finding(op, f"has rows that no tile was proven to have: {dot}")


def _form(dot: Dot, free: bool, base: Mapping[tuple[int | str, ...], tuple[int, int]]) -> tuple:
    if free:
        return dot.depth, dot.dtypes
    batch, rows = base.get((*dot[:4], dot.dtypes[0]), dot[:2])
    return dot._replace(batch=batch, rows=rows)


def _base_rows(dot: Dot) -> set[int]:
    """Of a base tile of such a product. Where a device can't multiply 16-bit numbers XLA widens them to float32."""
    return {row_tile(name) for name, in_hlo in DTYPES.items() if dot.dtypes[0] in (in_hlo, "f32")}


def _bases(tiles: Tiles) -> dict[tuple[int | str, ...], tuple[int, int]]:
    """Batch and rows of the base tile, by the shape and the dtype of each dot in a larger one."""
    bases = {}
    for k, n, dtype, rows in tiles.dots:
        for in_hlo in (DTYPES[dtype], "f32"):
            bases[1, rows, k, n, in_hlo] = 1, row_tile(dtype)
        if DTYPES[dtype] != "f32":  # XLA fills 16-bit matrices up with zeros for cuBLAS
            padded = round_up(k, CUBLAS_ALIGN), round_up(n, CUBLAS_ALIGN)
            bases[1, rows, *padded, DTYPES[dtype]] = 1, row_tile(dtype)
    for shape in tiles.attention:
        heads, group = shape.kv_heads, shape.q_heads // shape.kv_heads
        base = attention_tiles() * heads, max(ROW_TILE * group, 2)
        columns = -(-shape.head_dim // COLUMN_BLOCK) * COLUMN_BLOCK
        for depth, width in ((shape.head_dim, PAGE_SIZE), (PAGE_SIZE, columns)):
            for in_hlo in (DTYPES[shape.dtype], "f32"):
                bases[ATTENTION_GROUP * heads, ATTENTION_TILE * group, depth, width, in_hlo] = base
    return bases


def _in_blocks(dot: Dot) -> bool:
    widest = PAGE_SIZE if dot.rows <= BLOCKED_MAX_ROWS else math.inf
    return (
        dot.rows >= 2 and dot.depth <= K_CHUNK and dot.columns % COLUMN_BLOCK == 0 and dot.columns <= widest
    )


@dataclasses.dataclass
class Report:
    """What `lint` found."""

    programs: dict[str, Program]
    findings: list[tuple[str, Finding]]
    """With the name of the program that each is in."""

    @property
    def ok(self) -> bool:
        """Whether there were programs, and nothing in them to find."""
        return bool(self.programs) and not self.findings

    def render(self) -> Group:
        """The report for a terminal."""
        table = Table(
            title="compiled programs: what XLA may order or round as it likes", title_justify="left"
        )
        table.add_column("program")
        for heading in ("ops checked", "our kernels", "dots", "findings"):
            table.add_column(heading, justify="right")
        for name, program in self.programs.items():
            kernels = sum(op.target.startswith(KERNELS) for op in program.ops)
            count = sum(where == name for where, _ in self.findings)
            cells = (len(program.ops), kernels, sum(map(_is_dot, program.ops)), count)
            table.add_row(name, *(f"{cell:,}" for cell in cells), style="bold red" if count else None)
        verdict = (
            Text(f"clean: {len(self.programs)} programs", style="bold green")
            if self.ok
            else Text(f"NOT pinned: {len(self.findings)} findings", style="bold red")
        )
        return Group(table, *(Text(f"{name}: {finding}") for name, finding in self.findings), verdict)


def lint(
    programs: Mapping[str, Compiled | str], backend: str, *, at_least: int = AT_LEAST, tiles: Tiles = BASE
) -> Report:
    """Checks one function's programs, one for each bucket.

    Args:
        programs: by name; compiled, or the text of their HLO.
        backend: "xla", whose kernels are XLA's own dots and moves, or that of kernels beside which XLA may have none.
        at_least: as for `copies`.
        tiles: those that the programs may use beside the xla backend's base tiles.

    Raises:
        ValueError: a text is no HLO module.
    """
    read = {name: Program(p if isinstance(p, str) else p.as_text() or "") for name, p in programs.items()}
    findings = []
    for name, program in read.items():
        # A TPU's XLA brings a prompt's queries into tiles, and results from VMEM to HBM: as large as the step is.
        of_what_stays = backend == "mosaic_tpu"
        moves = copies(program, at_least, of_what_stays=of_what_stays) if program.optimised else ()
        order = unpinned(program)
        place = misplaced(program, at_least)
        if backend == "xla":
            order = (f for f in order if not _is_dot(f.op))
            moves = (f for f in moves if not XLA_KERNEL.match(f.op.source))
        findings += [(name, finding) for finding in (*order, *moves, *place)]
    return Report(read, [*findings, *(misshapen(read, tiles) if backend == "xla" else ())])


def lint_step(step: Step) -> Report:
    """Checks every program that `step` has compiled so far, each function's buckets together."""
    functions: dict[str, dict[str, Compiled]] = {}
    for (function, key), program in step.programs.items():
        functions.setdefault(function, {})[f"{function} {key}"] = program
    report = Report({}, [])
    for function, programs in functions.items():
        # The raw logits stay, beside the adjusted ones, for the logprobs: a copy is what is asked for.
        at_least = sys.maxsize if function == "adjust" else AT_LEAST
        found = lint(programs, step.backend, at_least=at_least, tiles=step.tiles)
        report.programs |= found.programs
        report.findings += found.findings
    return report
