"""The certificate as one web page that needs nothing else."""

import importlib.resources
import math
from pathlib import Path
from typing import Any

import jinja2

from jaxdet.files import write_whole
from jaxdet.verify.report import PROMISES, Case, Report

SHADES = 6
"""Colours of the heat map; each but the first stands for ten times the share of the one before."""


def write_html(report: Report, path: Path) -> None:
    """Writes the report as a page, in one piece."""
    write_whole(path, render_html(report))


def render_html(report: Report) -> str:
    """The report as a page: verdict, cases, a heat map of the bits that differed, and the environment."""
    source = (
        importlib.resources.files("jaxdet.verify").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    control = {(case.promise, case.name): case for case in report.control}
    rows = [(case, control.get((case.promise, case.name))) for case in report.cases]
    return environment.from_string(source).render(
        report=report,
        promises=PROMISES,
        rows=rows,
        values=sum(case.compared for case in report.cases),
        failed=sum(case.differing > 0 or case.compared == 0 for case in report.cases),
        heat=[(case.name, _heat(case), _heat(plain)) for case, plain in rows if plain],
        shades=SHADES,
        facts=_flat(report.environment),
    )


def _heat(case: Case) -> list[tuple[int, float, int]]:
    """Per bit, the sign first: how many values differ in it, their share in percent, and its shade."""
    return [
        (count, 100 * count / max(case.compared, 1), _shade(count, case.compared))
        for count in reversed(case.bits)
    ]


def _shade(count: int, of: int) -> int:
    """0 for none; SHADES for a tenth and more, one less for every ten times fewer."""
    return 0 if count == 0 else max(1, min(SHADES, SHADES + 1 + math.floor(math.log10(count / of))))


def _flat(facts: dict[str, Any]) -> dict[str, str]:
    """The environment without what is empty, one line a fact."""
    lines = {}
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items())
        if value not in ("", None):
            lines[name.replace("_", " ")] = str(value)
    return lines
