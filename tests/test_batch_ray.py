"""`jaxdet batch --ray`: workers of a local cluster write what one process writes, also when one of them is killed."""

import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from batches import differing, mixed, write

from jaxdet.testing import write_tiny_model

LINES = 120
COMMANDS = Path(sys.executable).parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module", autouse=True)
def environment():
    """The cluster wants a token of those who join it, whatever this machine's own settings are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield


@pytest.fixture(scope="module")
def cluster(environment):
    """Address of a cluster of this machine, with four CPUs by its own account."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = [COMMANDS / "ray", "start", "--head", f"--port={port}", "--num-cpus=4", "--include-dashboard=false"]
    process = subprocess.Popen([*ray, "--node-ip-address=127.0.0.1", "--block"], stdout=subprocess.DEVNULL)
    deadline, status = time.monotonic() + 60, [COMMANDS / "ray", "status", f"--address=127.0.0.1:{port}"]
    while subprocess.run(status, capture_output=True, check=False).returncode:
        assert process.poll() is None and time.monotonic() < deadline
    yield f"127.0.0.1:{port}"
    process.terminate()
    process.wait(60)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The command that answers a file, beside the model."""
    folder = tmp_path_factory.mktemp("job")
    tiny = write_tiny_model(folder / "tiny")

    def command(source: Path, out: Path, *options: object) -> list[str]:
        engine = ("-m", tiny, "--max-model-len", 512, "--max-num-seqs", 8)
        return [str(x) for x in (COMMANDS / "jaxdet", "batch", source, out, *engine, *options)]

    return command


@pytest.fixture(scope="module")
def alone(job, tmp_path_factory) -> tuple[Path, bytes, bytes]:
    """An input, and what one process writes: answers and errors."""
    folder = tmp_path_factory.mktemp("alone")
    source = write(folder / "in.jsonl", [*mixed(LINES), b"{bad\n"])
    subprocess.run(job(source, folder / "out.jsonl"), check=False)
    other = write(folder / "other.jsonl", mixed(LINES, seed=5000))
    subprocess.run(job(other, folder / "others.jsonl"), check=True)
    found = results(folder / "out.jsonl")
    assert differing(found[0], (folder / "others.jsonl").read_bytes()) > LINES / 2  # the control
    return source, *found


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def results(out: Path) -> tuple[bytes, bytes]:
    return out.read_bytes(), out.with_suffix(".errors.jsonl").read_bytes()


def workers() -> list[psutil.Process]:
    return [
        p for p in psutil.process_iter(["cmdline"]) if "ray::MapWorker" in " ".join(p.info["cmdline"] or ())
    ]


@pytest.mark.parametrize("count", [1, 2])
def test_any_number_of_workers(job, alone, cluster, tmp_path, monkeypatch, count):
    out = tmp_path / "out.jsonl"
    monkeypatch.setenv("RAY_ADDRESS", cluster)  # as `ray job submit` has it
    address = ("auto", cluster)[count - 1]
    done = run(job(alone[0], out, "--ray", address, "--workers", count))
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    assert len(done.stderr.splitlines()) <= 2, done.stderr  # Ray names its log level, we say what was done
    assert results(out) == alone[1:]


@pytest.mark.parametrize("victim", ["worker", "command", "Ctrl-C"])
def test_killed(job, alone, cluster, tmp_path, victim):
    out = tmp_path / "out.jsonl"
    records = tmp_path / "out.jsonl.journal" / "records"
    command = job(alone[0], out, "--ray", cluster, "--workers", 2)
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background ignore it
    )
    while not records.exists() or records.stat().st_size < 1000:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    if victim == "worker":
        first, *_ = workers()
        first.send_signal(signal.SIGKILL)
        assert process.poll() is None
        said = process.communicate()[1]
        assert process.returncode == 3, said
        assert not first.is_running()
    else:
        process.send_signal(signal.SIGINT if victim == "Ctrl-C" else signal.SIGKILL)
        said = process.communicate()[1]
        assert process.returncode == (130 if victim == "Ctrl-C" else -signal.SIGKILL), said
        assert ("of 121 lines; the same command goes on from there" in said) == (victim == "Ctrl-C")
        assert "Traceback" not in said and not out.exists()
        assert subprocess.run(job(alone[0], out), check=False).returncode == 3  # without the cluster
    assert results(out) == alone[1:]


def test_parquet(job, alone, cluster, tmp_path):
    out = tmp_path / "out.parquet"
    subprocess.run(job(alone[0], out, "--ray", cluster, "--workers", 2), check=False)
    assert "".join(f"{line}\n" for line in pq.read_table(out)["answer"].to_pylist()).encode() == alone[1]


def test_what_goes_wrong_is_one_line(job, alone, cluster, tmp_path):
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        port = mute.getsockname()[1]
        for address, says in (
            ("127.0.0.1:1", "no cluster answers"),
            ("here", "must be auto or HOST:PORT"),
            (f"127.0.0.1:{port}", "Failed to connect"),
        ):
            began = time.monotonic()
            done = run(job(alone[0], tmp_path / "out.jsonl", "--ray", address))
            lines = [line for line in done.stderr.splitlines() if line.startswith("jaxdet: ")]
            assert done.returncode == 1 and len(lines) == 1 and says in lines[0], done.stderr
            assert "Traceback" not in done.stderr
            assert time.monotonic() - began < 90
    done = run(job(alone[0], tmp_path / "out.jsonl", "--ray", cluster, "--dtype", "float8"))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "jaxdet: a worker failed: ValueError: dtype='float8' is unknown" in done.stderr
