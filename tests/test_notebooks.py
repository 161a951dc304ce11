"""The notebooks run from a clean kernel and show what they claim; their committed outputs do, too."""

import ast
import importlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
COLAB = ROOT / "colab"
NAMES = sorted(path.name for path in COLAB.glob("*.ipynb"))
TOO_LARGE = 100_000
LONGEST = 600
"""Seconds that a notebook may take on a CPU."""
LOCAL = re.compile(
    r"(?<![\w.])/(?:home|root|tmp|usr|work|opt|var|Users|mnt|content)/|\bhttps?://|\blocalhost\b|pypi|C:\\\\"
)
"""Of the machine that ran a notebook: folders, and where it installs from."""


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(COLAB / name, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def results(notebook: nbformat.NotebookNode) -> dict:
    """What the last cell prints."""
    (output,) = code_cells(notebook)[-1].outputs
    return json.loads(output.text)


def shown(output: nbformat.NotebookNode) -> str:
    """What a reader sees of an output, but for its image."""
    return output.get("text") or output.data["text/plain"]


def digests(found: dict) -> dict:
    return {key: value for key, value in found.items() if key.startswith("digest")}


def check_defeating_nondeterminism(found: dict) -> None:
    assert found["completions"] == 64
    ours, plain = found["summary"]["jaxdet"], found["summary"]["plain JAX"]
    assert ours["unique outputs"] == ours["different logits"] == 1
    assert ours["first divergence"] is None
    assert ours["largest difference of a logit"] == 0
    assert not any(found["ops"]["jaxdet"].values())
    assert found["path"]["jaxdet"] == 0
    # The control: plain JAX, counted in the same way.
    assert plain["unique outputs"] > 1 or plain["largest difference of a logit"] > 0
    assert plain["different logits"] > 1
    assert any(found["ops"]["plain JAX"].values())
    assert found["path"]["plain JAX"] > 0


def check_generate(found: dict) -> None:
    assert found["digest"] == found["digest_in_a_crowd"] == found["digest_streamed"]
    assert found["score_differs"] == 0
    assert found["digests"] == found["digests_with_guesses"]
    assert found["guesses_kept"] > 0
    assert found["unique_of_four_samples"] == 4  # the control: other seeds and samples have other digests


def check_true_on_policy_rl(found: dict) -> None:
    assert found["differing"]["jaxdet"] == 0
    assert found["compared"]["jaxdet"] > 200
    assert set(found["kl"]) == {0.0}
    assert found["reward"][1] > 0.8 > 0.3 > found["reward"][0]
    once, small, other = found["digests"]
    assert once == small
    # The controls: plain JAX, counted in the same way, and another seed.
    assert found["differing"]["plain JAX"] > 0
    assert other != once


def check_batch_inference(found: dict) -> None:
    assert found["answers"] == 24
    assert found["resumed"] == 14
    assert len(found["digests"]) == 3
    assert len(set(found["digests"])) == 1
    assert found["digest_of_other_seeds"] != found["digests"][0]  # the control
    cached, uncached = found["cached_tokens"]
    assert cached >= 128
    assert uncached == 0
    assert found["finished_first"] == {"same priority": [0, 1], "urgent": [10, 11]}
    assert not found["priorities_change_answers"]


CHECKS = {
    "01_defeating_nondeterminism.ipynb": check_defeating_nondeterminism,
    "02_generate.ipynb": check_generate,
    "03_true_on_policy_rl.ipynb": check_true_on_policy_rl,
    "04_batch_inference.ipynb": check_batch_inference,
}


def test_every_notebook_has_a_check():
    assert sorted(CHECKS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs(name: str):
    notebook = read(name)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))  # one run, from the top
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    assert all(output.get("name") != "stderr" for output in outputs)
    images = [output.data["image/png"] for output in outputs if output.output_type == "display_data"]
    assert max(map(len, images), default=0) < TOO_LARGE
    assert [found for text in map(shown, outputs) for found in LOCAL.findall(text)] == []
    CHECKS[name](results(notebook))


@pytest.mark.parametrize("text", ["/tmp/x/lib/a.py:21: Warning", "see https://mirror", "from pypi.example"])
def test_traces_of_a_machine_are_found(text: str):
    assert LOCAL.search(text) and not LOCAL.search("cpu/x86_64/avx2/jaxlib-0.11.2, 1/tmp")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("platform", "wanted"), [("cpu", {"bfloat16", "auto"}), ("gpu", {"auto"})])
def test_models_have_a_dtype_that_old_gpus_multiply(name: str, platform: str, wanted: set[str]):
    """`auto`, which is float16 where a GPU has no matrix units for bfloat16; plain JAX has jaxdet's."""
    given = {"jax": SimpleNamespace(default_backend=lambda: platform)}
    llm = SimpleNamespace(dtype="auto")
    calls = []
    for cell in code_cells(read(name)):
        for node in ast.walk(ast.parse(cell.source)):
            match node:
                case ast.Assign(targets=[ast.Name("DTYPE")], value=value):
                    given["DTYPE"] = eval(ast.unparse(value), given)
                case ast.Call(func=ast.Name("LLM" | "Baseline"), keywords=keywords):
                    calls.append({k.arg: k.value for k in keywords}.get("dtype", ast.Constant("auto")))
    assert calls
    assert {eval(ast.unparse(dtype), given | {"llm": llm}) for dtype in calls} <= wanted


@pytest.mark.parametrize("name", NAMES)
def test_badge(name: str):
    """The badges of a notebook and of the README open this notebook."""
    link = (
        rf"\(https://colab\.research\.google\.com/github/([\w-]+/[\w-]+)/blob/main/colab/{re.escape(name)}\)"
    )
    (here,) = re.findall(link, read(name).cells[0].source)
    assert re.findall(link, (ROOT / "README.md").read_text()) == [here]


@pytest.mark.slow
@pytest.mark.timeout(LONGEST + 60)
@pytest.mark.parametrize("name", NAMES)
def test_runs_from_a_clean_kernel(name: str, demo_model):
    committed, notebook = results(read(name)), read(name)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    began = time.monotonic()
    NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=LONGEST,
        coalesce_streams=True,
        resources={"metadata": {"path": str(COLAB)}},
    ).execute()
    assert time.monotonic() - began < LONGEST
    found = results(notebook)
    CHECKS[name](found)
    same = ("platform", "numerics_version")
    if all(found[key] == committed[key] for key in same):
        assert digests(found) == digests(committed)


def install_cell() -> str:
    sources = {code_cells(read(name))[0].source for name in NAMES}
    (source,) = sources  # the same one everywhere
    return source


@pytest.fixture
def machine(monkeypatch, tmp_path: Path):
    """A machine without jaxdet, outside a checkout, whose pip only takes notes; `versions` is what it installs."""
    fake = SimpleNamespace(driver=None, devices=[], commands=[], versions={})

    def version(name: str) -> str:
        if name == "jaxdet" and not fake.commands:
            raise importlib.metadata.PackageNotFoundError(name)
        return fake.versions.get(name, getattr(sys.modules.get(name), "__version__", "1"))

    def run(command, **_):
        if command == ["nvidia-smi"]:
            return SimpleNamespace(stdout=f"| CUDA Version: {fake.driver} |")
        assert command[:3] == [sys.executable, "-m", "pip"]
        fake.commands.append(command[3:])

    def glob(folder: Path, pattern: str):
        return (
            device for device in map(Path, fake.devices) if device.parent == folder and device.match(pattern)
        )

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name: fake.driver and f"/usr/bin/{name}")
    monkeypatch.setattr(Path, "glob", glob)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.mark.parametrize(
    ("driver", "devices", "wanted"),
    [
        (None, [], "jaxdet"),
        ("13.0", [], "jaxdet[cuda]"),
        ("12.4", [], "jaxdet[cuda12]"),
        (None, ["/dev/vfio/0"], "jaxdet[tpu]"),
        (None, ["/dev/accel0"], "jaxdet[tpu]"),
        (None, ["/dev/vfio/vfio", "/dev/accel"], "jaxdet"),  # what other machines have
    ],
)
def test_install_cell(machine, driver, devices, wanted: str):
    machine.driver, machine.devices = driver, devices
    exec(install_cell(), {})
    *removed, installed = machine.commands
    assert installed == ["install", "-q", wanted, "matplotlib"]
    other = {"jaxdet[cuda]": ["jax-cuda12-plugin"], "jaxdet[cuda12]": ["jax-cuda13-plugin"]}
    assert [command[3] for command in removed] == other.get(wanted, [])
    exec(install_cell(), {})  # a second time there is nothing to do
    assert machine.commands == [*removed, installed]


def test_install_cell_in_a_checkout(machine, monkeypatch):
    monkeypatch.chdir(COLAB)
    exec(install_cell(), {})
    assert machine.commands == [["install", "-q", str(ROOT), "matplotlib"]]


@pytest.mark.parametrize("name", ["numpy", "jax", "jaxlib", "flax"])
def test_install_cell_asks_for_a_restart(machine, name: str):
    importlib.import_module(name)
    exec(install_cell(), {})  # the control: what is loaded is what is installed
    machine.versions[name] = "999"
    with pytest.raises(RuntimeError, match=f"an older {name} is loaded: restart the session"):
        exec(install_cell(), {})


def test_the_tpu_extra_brings_the_libtpu_of_this_jaxlib():
    """As JAX's own extra pins it; ours allows JAX no other versions than the package itself does."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (jax,) = [Requirement(r) for r in project["dependencies"] if Requirement(r).name == "jax"]
    (tpu,) = map(Requirement, project["optional-dependencies"]["tpu"])
    assert (tpu.name, tpu.extras) == ("jax", {"tpu"})
    assert tpu.specifier in (jax.specifier, "")
    pinned = [Requirement(r) for r in importlib.metadata.requires("jax") or () if r.startswith("libtpu")]
    assert pinned and all({s.operator for s in r.specifier} == {"=="} for r in pinned)
