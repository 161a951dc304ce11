"""The documentation: it builds without a warning, its Python runs, and the commands that it names exist."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from mkdocstrings import Inventory
from typer.core import TyperGroup

import jaxdet
import jaxdet.checkpoints
import jaxdet.rl
import jaxdet.verify
from jaxdet.cli import app
from jaxdet.models import registry
from jaxdet.testing import write_tiny_model

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
RUN = (
    "README.md",
    "adding-a-kernel.md",
    "adding-a-model.md",
    "engine.md",
    "generate.md",
    "index.md",
    "reproducing.md",
)
"""Pages whose Python is run, with a tiny model in the demo model's place; that of the others must compile."""
SLOW = ("README.md", "generate.md", "index.md")
"""Of these, pages that take more than 20 seconds."""


def build(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_public_name_is_in_the_reference(site: Path):
    with (site / "objects.inv").open("rb") as file:
        found = Inventory.parse_sphinx(file)
    modules = jaxdet, jaxdet.checkpoints, jaxdet.rl, jaxdet.verify
    wanted = [f"{module.__name__}.{name}" for module in modules for name in module.__all__]
    assert len(wanted) > 20
    # A function in a module of its own name stands there.
    assert [n for n in wanted if n not in found and f"{n}.{n.rpartition('.')[2]}" not in found] == []
    assert "jaxdet.gone" not in found  # the control


def test_pages_load_nothing_from_elsewhere(site: Path):
    pages = list(site.rglob("*.html"))
    loads = re.compile(
        r"""<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=["']?(https?:)?//[^>]*>"""
    )
    assert len(pages) > 15
    assert [match[0] for page in pages for match in loads.finditer(page.read_text())] == []
    assert loads.search('<link href="https://fonts.example/css" rel="stylesheet">')  # the control


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        ("[a](gone.md) [b](engine.md#gone)", ("gone.md", "#gone")),
        ("::: jaxdet.gone", ("jaxdet.gone",)),
    ],
)
def test_mistakes_are_noticed(tmp_path: Path, mistake: str, named: tuple[str, ...]):
    """Negative control: a page, an anchor or a name that doesn't exist ends the build."""
    for name in ("jaxdet", "pallas_kernels", "benchmarks", "CHANGELOG.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("docs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    page = tmp_path / "docs" / "contract.md"
    page.write_text(f"{page.read_text()}\n{mistake}\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert [name for name in named if name not in done.stdout + done.stderr] == []


def test_the_readmes_links():
    """The site doesn't have this page, so nothing else looks."""
    links = re.findall(r"\]\((?![a-z]+:)([^)#]+)", PAGES["README.md"].read_text())
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every fenced block."""
    text = page.read_text()
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, match.start(1)), match[1]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, page in PAGES.items()
        if any(blocks(page, "python"))
    ],
)
def test_python(name: str, tmp_path: Path, monkeypatch):
    """A page's blocks, one after the other, as somebody reads them."""
    monkeypatch.setattr(registry, "FAMILIES", registry.FAMILIES.copy())  # where a page adds one
    monkeypatch.setattr(jaxdet, "_loaded", {})
    tiny = write_tiny_model(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for line, source in blocks(PAGES[name], "python"):
        source = source.replace('"smollm2-135m"', repr(str(tiny)))
        program = compile("\n" * line + source, PAGES[name], "exec")
        if name in RUN:
            exec(program, names)


def test_the_readmes_proof(capsys):
    """What the first block says that it prints."""
    _, source = next(blocks(PAGES["README.md"], "python"))
    exec(source, {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"# (True|False)$", source, re.MULTILINE)


def commands(page: Path) -> Iterator[list[str]]:
    """Every command of a page's shell blocks, and those that its text quotes."""
    for _, block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.shlex(line, posix=True, punctuation_chars=True)
            words.whitespace_split = True
            command: list[str] = []
            for word in [*words, ";"]:
                if set(word) <= set(";&|<>()"):
                    yield command
                    command = []
                else:
                    command.append(word)
    for quoted in re.findall(r"`((?:jaxdet|make) [^`|]+)`", page.read_text()):
        yield quoted.replace("…", "").split()


def unknown(page: Path) -> list[list[str]]:
    """A page's commands whose subcommand, options, make targets, script or extras don't exist."""
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    options_of = {
        name: {"--help", *(option for p in command.params for option in (*p.opts, *p.secondary_opts))}
        for name, command in group.commands.items()
    }
    wrong = []
    for command in filter(None, commands(page)):
        program, *rest = [word for word in command if not re.match(r"[A-Z_]+=", word)]
        known = True
        match Path(program).name:
            case "jaxdet":
                options = {word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
                known = rest[0] in group.commands and options <= options_of[rest[0]]
            case "make":
                known = set(rest) <= targets
            case "python" if rest[0].endswith(".py"):
                known = (ROOT / rest[0]).is_file()
            case "pip":
                named = re.findall(r"\[([\w,-]+)\]", " ".join(rest))
                known = set(",".join(named).split(",")) - {""} <= set(extras)
        if not known:
            wrong.append(command)
    return wrong


@pytest.mark.parametrize("name", PAGES)
def test_commands_exist(name: str):
    assert unknown(PAGES[name]) == []


def test_wrong_commands_are_noticed(tmp_path: Path):
    """Negative control: one mistake in each line, and in what the text quotes."""
    page = tmp_path / "page.md"
    lines = (
        "jaxdet gone",
        "ls | jaxdet generate --gone x",
        "make gone",
        "python gone.py",
        "pip install '.[gone]'",
    )
    page.write_text("```sh\njaxdet info  # right\n" + "\n".join(lines) + "\n```\n`jaxdet serve --gone`\n")
    assert len(unknown(page)) == len(lines) + 1
