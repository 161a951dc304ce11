"""The wheel holds the two packages and works away from the checkout."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models

ROOT = Path(__file__).parents[1]


def run(*command, **options) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    (found,) = out.glob("*.whl")
    return found


def test_content(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    (info,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {"jaxdet", "pallas_kernels", info}
    tracked = run("git", "ls-files", "jaxdet", "pallas_kernels", cwd=ROOT).split()
    assert set(tracked) <= set(names), "a file of the packages is missing"
    assert not [n for n in names if "__pycache__" in n or n.endswith((".pyc", ".gguf", ".safetensors"))]


def test_installs_and_generates_elsewhere(wheel: Path, tmp_path: Path, references: Path):
    """A fresh environment sees this one's packages, but not the editable checkout."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q", wheel)
    packages = tmp_path / "packages"  # a .pth to the folder itself would run the checkout's own .pth
    packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "jaxdet" not in entry.name and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    (site / "locked.pth").write_text(f"{packages}\n")
    model = tmp_path / "model"
    shutil.copytree(references / "llama", model)
    tokenizers.Tokenizer(models.BPE({chr(33 + i): i for i in range(90)}, [])).save(
        str(model / "tokenizer.json")
    )
    code = (
        "import jaxdet, json; out = jaxdet.generate({'prompt_token_ids': [3, 4, 5]}, model='model', max_tokens=6, "
        "ignore_eos=True); print(json.dumps([jaxdet.__file__, len(out[0].outputs[0].token_ids)]))"
    )
    file, count = json.loads(run(python, "-c", code, cwd=tmp_path, env={"JAX_PLATFORMS": "cpu", "PATH": ""}))
    assert Path(file).is_relative_to(site)
    assert count == 6
