"""Lowered programs that stay on disk: found again, to the same bits, and never in the way."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdet.engine import lowered_cache
from jaxdet.engine.engine import Engine
from jaxdet.sampling_params import SamplingParams
from jaxdet.testing import random_model

TINY = {
    "model_type": "qwen3",
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 96,
}


def answers():
    """Tokens and log-probabilities of a new engine."""
    model = random_model(TINY, dtype=jnp.float32, backend="xla", max_model_len=128)
    engine = Engine(model, salt="", max_model_len=128, max_num_seqs=2, max_num_batched_tokens=32, num_pages=8)
    params = SamplingParams(max_tokens=4, seed=3, logprobs=2, prompt_logprobs=1)
    (sequence,) = engine.add([5, 17, 40], params)
    while engine.has_work:
        engine.step()
    rows = [*sequence.prompt_logprobs, *sequence.logprobs]
    return sequence.output, np.concatenate([np.append(top, chosen) for chosen, _, top, _ in rows])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(lowered_cache, "folder", lambda backend: tmp_path)
    return tmp_path


def no_export(*args, **options):
    raise AssertionError("lowered again")


def test_the_second_engine_finds_what_the_first_one_lowered(folder, monkeypatch):
    first = answers()
    names = {path.name for path in folder.iterdir()}
    assert len(names) >= 4
    with monkeypatch.context() as patched:
        patched.setattr(lowered_cache.export, "export", no_export)
        second = answers()
    monkeypatch.setattr(lowered_cache, "folder", lambda backend: None)
    plain = answers()
    assert {path.name for path in folder.iterdir()} == names
    for found in (second, plain):
        assert found[0] == first[0]
        np.testing.assert_array_equal(found[1], first[1])
    assert first[1].size and np.isfinite(first[1]).all()


def doubled(folder):
    """2 · [1, 2] by a program kept in `folder`."""
    x = jnp.array([1.0, 2.0])
    program = lowered_cache.Program(lambda x: 2 * x, (x,), {}, ("double",), jax.jit)
    return lowered_cache.lower(program, folder).compile()(x).tolist()


def test_a_damaged_file_is_replaced(tmp_path):
    assert doubled(tmp_path) == [2, 4]
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], b"x" + whole[1:]):
        path.write_bytes(damaged)
        assert doubled(tmp_path) == [2, 4]
        assert path.stat().st_size == len(whole)
        assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path):
    (tmp_path / "file").write_text("")
    assert doubled(tmp_path / "file") == [2, 4]


def test_what_decides_a_program_decides_its_key(monkeypatch):
    x = jax.ShapeDtypeStruct((2, 3), jnp.float32)

    def key(*args, origin="model", **static):
        return lowered_cache._key(lowered_cache.Program(abs, args, static, (origin,), jax.jit))

    keys = [key(x), key(x, origin="draw"), key(x, top=3), key(x, x), key([x])]
    keys.append(key(jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)))
    with jax.default_matmul_precision("highest"):
        keys.append(key(x))
    monkeypatch.setattr(lowered_cache, "_code", lambda: "of another version")
    keys.append(key(x))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", ["kernel.py", "tiles.json"])
def test_code_and_tables_decide_it_too(monkeypatch, tmp_path, name):
    monkeypatch.setattr(lowered_cache, "SOURCES", (SimpleNamespace(__path__=[str(tmp_path)]),))
    digests = set()
    for text in ("1", "2"):
        (tmp_path / name).write_text(text)
        digests.add(lowered_cache._code.__wrapped__())
    assert len(digests) == 2


def test_only_slow_lowerings_are_kept():
    assert lowered_cache.folder("xla") is None
    assert lowered_cache.folder("mosaic_gpu") is None  # interpreted here
