"""What verification found: cases with counts, the digest, the environment."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxdet.files import write_whole
from pallas_kernels.backend import libraries, platform_key
from pallas_kernels.numerics import NUMERICS_VERSION

PROMISES = {"I1": "batch", "I2": "path", "I3": "place", "I4": "run"}


@dataclasses.dataclass
class Case:
    """One way of computing the same values again; equal means equal in every bit."""

    promise: str
    """"I1" batch, "I2" path, "I3" place or "I4" run."""
    name: str
    """What was varied."""
    compared: int = 0
    """Values (logits, log-probabilities, token ids) compared."""
    differing: int = 0
    """Values of which any bit differs."""
    bits: list[int] = dataclasses.field(default_factory=lambda: [0] * 32)
    """How many of the float32 values differ in each bit; the lowest is first, the sign last."""
    note: str = ""
    """Why nothing could be compared, if so."""

    def compare(self, found: np.ndarray, expected: np.ndarray) -> None:
        """Counts the values whose bits differ; a wrong shape counts as all different."""
        found, expected = (np.ascontiguousarray(x) for x in (found, expected))
        self.compared += expected.size
        if found.shape != expected.shape or found.dtype != expected.dtype:
            self.differing += expected.size
        else:
            unsigned = f"u{expected.dtype.itemsize}"
            changed = found.view(unsigned) ^ expected.view(unsigned)
            changed = changed[changed != 0]
            self.differing += changed.size
            if expected.dtype == np.float32 and changed.size:
                self.bits = [
                    count + more for count, more in zip(self.bits, _count_bits(changed), strict=True)
                ]


def _count_bits(values: np.ndarray) -> list[int]:
    """How many of some uint32 have each bit set."""
    octets = values.astype("<u4", copy=False).view(np.uint8).reshape(-1, 4)
    found: list[int] = []
    for octet in octets.T:
        seen = np.bincount(octet, minlength=256)
        found += [int(seen[(np.arange(256) >> bit) & 1 == 1].sum()) for bit in range(8)]
    return found


@dataclasses.dataclass
class Report:
    """Outcome of `verify`."""

    model: str
    """The model's name."""
    digest: str
    """SHA-256 of the reference sequence's float32 logits."""
    cases: list[Case]
    """Through jaxdet's engine and step."""
    control: list[Case]
    """The same through `jaxdet.baseline`."""
    environment: dict[str, Any]
    """Device, backend, dtype, versions and settings that bits may depend on, and when it was seen."""

    @property
    def ok(self) -> bool:
        """Whether every case compared something and nothing differed."""
        return all(c.compared > 0 and c.differing == 0 for c in self.cases)

    @property
    def control_bites(self) -> bool:
        """Whether plain JAX failed at least one of its cases, so that the comparison is known to see differences."""
        return any(c.differing for c in self.control)

    def write_json(self, path: Path) -> None:
        """Writes everything, in one piece."""
        content = dataclasses.asdict(self) | {"ok": self.ok, "control_bites": self.control_bites}
        write_whole(path, json.dumps(content, indent=1) + "\n")

    def render(self) -> Group:
        """The report for a terminal."""
        table = Table(
            title=f"{self.model}: jaxdet beside plain jax.jit, all bits compared", title_justify="left"
        )
        table.add_column("promise")
        table.add_column("the same again")
        for heading in ("values", "differ", "plain JAX: differ of"):
            table.add_column(heading, justify="right")
        control = {(c.promise, c.name): c for c in self.control}
        for case in self.cases:
            plain = control.get((case.promise, case.name))
            table.add_row(
                f"{case.promise} {PROMISES[case.promise]}",
                f"{case.name}: {case.note}" if case.note else case.name,
                f"{case.compared:,}",
                Text(f"{case.differing:,}", style="green" if case.differing == 0 else "bold red"),
                "" if plain is None else f"{plain.differing:,} of {plain.compared:,}",
            )
        quiet = [c.name for c in self.control if not c.differing]
        notes = [f"digest of the logits: {self.digest}"]
        notes += [f"{name}: {value}" for name, value in self.environment.items() if value not in ("", None)]
        if not self.control_bites:
            notes.append(
                "Plain JAX showed no difference here, so this machine does not show what jaxdet prevents."
            )
        elif quiet:
            notes.append(f"Plain JAX showed no difference in: {'; '.join(quiet)}.")
        bad = sum(c.differing > 0 or c.compared == 0 for c in self.cases)
        verdict = (
            Text(f"certified: {sum(c.compared for c in self.cases):,} values, 0 differ", style="bold green")
            if self.ok
            else Text(f"NOT deterministic: {bad} of {len(self.cases)} cases failed", style="bold red")
        )
        return Group(table, *notes, verdict)


def environment(backend: str, dtype: str) -> dict[str, Any]:
    """What bits may depend on, and when it was seen."""
    versions = {
        name: importlib.metadata.version(name) for name in ("jaxdet", "jax", "jaxlib", "flax", "numpy")
    }
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform_key": platform_key(),
        "libraries": libraries(backend),
        "numerics_version": NUMERICS_VERSION,
        "backend": backend,
        "dtype": dtype,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cpus": os.process_cpu_count() if sys.version_info >= (3, 13) else len(os.sched_getaffinity(0)),
        "versions": versions,
        "python": platform.python_version(),
        "system": platform.platform(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "jax_enable_x64": jax.config.jax_enable_x64,
        "jax_default_matmul_precision": jax.config.jax_default_matmul_precision,
    }
