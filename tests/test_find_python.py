"""The search for a Python that `make` can build its environment with."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "find_python.sh"


def python(path: Path, lacks: str = "") -> Path:
    """A Python of this version; it may lack a module, as Debian's does without python3-venv."""
    start = f"import sys; sys.modules[{lacks!r}] = None; exec(sys.argv[1])"
    run = f"-c '{start}' \"$2\"" if lacks else '"$@"'
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {run}\n')
    path.chmod(0o755)
    return path


def find(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(folder), "HOME": str(folder)}
    return subprocess.run(
        ["/bin/sh", SCRIPT], env=environment, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_python_that_cannot_make_environments_is_passed_over(tmp_path: Path, module: str):
    python(tmp_path / "python3.12", lacks=module)
    found = find(tmp_path)
    assert (found.returncode, found.stdout) == (1, "")
    assert "with venv and ensurepip" in found.stderr
    whole = python(tmp_path / "python3")
    assert find(tmp_path).stdout == f"{whole}\n"
    python(tmp_path / "python3.12")
    assert find(tmp_path).stdout == f"{tmp_path / 'python3.12'}\n"
