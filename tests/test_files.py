"""A file is written whole, or the one that was there stays."""

import threading

import pytest

from jaxdet.files import write_whole


def test_text_and_bytes(tmp_path):
    path = tmp_path / "file"
    for content in ("ü\n", b"\x00\xff", ""):
        write_whole(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]
    plain = tmp_path / "plain"
    plain.write_text("")
    assert path.stat().st_mode == plain.stat().st_mode, "readable for whom any file is"


def test_a_failure_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")

    def fills_up(part, data):
        with part.open("wb") as file:
            file.write(data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", fills_up)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_of_the_same_file(tmp_path):
    """Readers see one of the contents, never a mixture, and writers don't take each other's parts."""
    path, contents = tmp_path / "file", [letter * 100_000 for letter in "abcd"]
    write_whole(path, contents[0])
    writers = [
        threading.Thread(target=lambda c=c: [write_whole(path, c) for _ in range(20)]) for c in contents
    ]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers) or not seen:
        assert path.read_text() in contents
        seen += 1
    assert list(tmp_path.iterdir()) == [path]
