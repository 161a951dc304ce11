"""Reads the text of an HLO module: its computations, their ops, and which lines of Python made them."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

# fmt: off
REDUCTIONS = {
    "all-reduce", "all-reduce-start", "reduce", "reduce-scatter", "reduce-window", "scatter", "select-and-scatter",
}
# fmt: on


@dataclasses.dataclass(eq=False)
class Op:
    """One HLO instruction."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    source: str
    """JAX's name of the operation and the line of Python that made it, as far as the compiler kept them; "after …" is
    what made the value it starts from."""

    @functools.cached_property
    def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        """(dtype, dimensions) of the result, or of each part of a tuple."""
        found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", self.shape)
        return [(dtype, tuple(map(int, dims.split(","))) if dims else ()) for dtype, dims in found]

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return sum(math.prod(dims) * (_bits(dtype) or 8) // 8 for dtype, dims in self.arrays)

    @property
    def float_bits(self) -> int:
        """Width of the result's narrowest float; 0 without one."""
        return min((_bits(dtype) for dtype, _ in self.arrays if dtype[0] in "fbc"), default=0)

    @property
    def target(self) -> str:
        """What a custom call calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""


def _bits(dtype: str) -> int:
    """32 of f32 and s32; 0 of pred."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 0


class Computation(dict[str, Op]):
    """Ops by name."""

    def operands(self, op: Op) -> list[Op]:
        """What `op` reads."""
        return [self[name] for name in op.operands if name in self]


class Program:
    """An HLO module, optimised or not.

    Raises:
        ValueError: the text is no HLO module.
    """

    def __init__(self, text: str):
        if not text.startswith("HloModule"):
            raise ValueError("program is not the text of an HLO module; pass compiled.as_text()")
        lines = text.split("\n")
        self.optimised = "is_scheduled=true" in lines[0]
        self.aliased = set(re.findall(r"{(\d*)}: \(\d+,", lines[0]))
        """Indices of the results that are written over an argument; "" if there is one result alone."""
        self.entry = current = Computation()
        computations = self._computations = {}
        source = _sources(lines)
        for line in lines:
            if found := re.match(r"(ENTRY )?%?([\w.-]+) (?:\(.*)?{$", line):
                current = computations[found[2]] = self.entry if found[1] else Computation()
            elif found := re.match(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*?)\)", line):
                root, name, shape, opcode, operands = found.groups()
                names = tuple(re.findall(r"%?([\w.-]+)(?:,|$)", operands))
                before, _, rest = line[found.end() :].partition("metadata={")
                metadata, _, after = rest.partition("}")
                op = current[name] = Op(name, shape, opcode, names, before + after, source(metadata))
                if root and current is self.entry:
                    self.result = op
        self.ops = [op for c in computations.values() for op in c.values()]
        for computation in computations.values():
            for op in computation.values():
                inside = (inner.source for inner in self.applied(op))
                before = (
                    f"after {o.source.removeprefix('after ')}" for o in computation.operands(op) if o.source
                )
                op.source = op.source or next(filter(None, inside), "") or next(before, "")
        fused = {name for op in self.ops if op.opcode.startswith("fusion") for name in self._called(op)}
        sums = {name for op in self.ops if op.opcode in REDUCTIONS for name in self._called(op)}
        self.fused = [c for name, c in computations.items() if name in fused]
        """The computations inside fusions."""
        self.loose = [c for name, c in computations.items() if name not in fused | sums]
        """Those whose ops run one by one: the entry, the bodies of loops and branches."""

    def _called(self, op: Op) -> set[str]:
        words = set() if op.opcode == "custom-call" else set(re.findall(r"[\w.-]+", op.attributes))
        return words & self._computations.keys()

    def applied(self, op: Op) -> Iterator[Op]:
        """The ops of the computations that `op` applies: a fusion's own, a reduction's sum."""
        for name in self._called(op):
            yield from self._computations[name].values()


def _sources(lines: list[str]) -> Callable[[str], str]:
    """Reads the module's tables of stack frames; returns what turns an op's metadata into its source."""
    tables: dict[str, dict[str, str]] = {}
    rows: dict[str, str] = {}
    for line in lines:
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            rows = tables[line] = {}
        elif found := re.match(r"(\d+) (.*)", line):
            rows[found[1]] = found[2]

    def number(name: str, text: str) -> str:
        found = re.search(rf"\b{name}=(\d+)", text)
        return found[1] if found else ""

    def source(metadata: str) -> str:
        frame = tables.get("StackFrames", {}).get(number("stack_frame_id", metadata), "")
        place = tables.get("FileLocations", {}).get(number("file_location_id", frame), "")
        file = tables.get("FileNames", {}).get(number("file_name_id", place), "").strip('"')
        name = re.search(r'op_name="([^"]*)"', metadata)
        where = f"{'/'.join(file.split('/')[-3:])}:{number('line', place)}" if file else ""
        return " at ".join(filter(None, (name[1] if name else "", where)))

    return source
