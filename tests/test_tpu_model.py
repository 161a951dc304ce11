"""Whole tiny models on the TPU kernels, interpreted: prefill, chunks and decode give the same logits, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tpu_rows import bits, error

from jaxdet.models.layers import Batch
from jaxdet.testing import COMMON, FAMILIES, random_model
from pallas_kernels.compat import tpu_interpreter
from pallas_kernels.numerics import PAGE_SIZE, TRASH_PAGE

pytestmark = pytest.mark.interpret
LENGTH, PAGES, TABLE = 140, 7, 2
TOKENS = np.random.default_rng(0).integers(0, 256, (2, LENGTH), np.int32)


class Runner:
    """A tiny model, its compiled forward pass and a cache full of NaN."""

    def __init__(self, family, dtype, backend="mosaic_tpu"):
        config = {"model_type": family} | COMMON | FAMILIES[family]
        model = random_model(config, dtype=jnp.dtype(dtype), backend=backend, max_model_len=256)
        graph, self.state = nnx.split(model)
        self.config, self.dtype = model.config, dtype

        @jax.jit
        def forward(state, batch, cache):
            model = nnx.merge(graph, state)
            hidden, cache = model(batch, cache)
            return model.logits(hidden), cache

        self.forward = functools.partial(forward, self.state)

    def new_cache(self):
        c = self.config
        page = jnp.full((PAGES, c.num_kv_heads, PAGE_SIZE, c.head_dim), jnp.nan, self.dtype)
        return [(page, page) for _ in range(c.num_layers)]

    def step(self, cache, work, *, rows=0, tokens=0):
        """Computes (tokens, begin, table) of every sequence; the first `rows` of them one token each.

        Returns:
            The logits' bits of every sequence and the new cache.
        """
        counts = [len(ids) for ids, _, _ in work]
        total = max(tokens, sum(counts))
        ids, positions = np.zeros(total, np.int32), np.zeros(total, np.int32)
        slots = np.full(total, TRASH_PAGE * PAGE_SIZE, np.int32)
        at = 0
        for own, begin, table in work:
            part, where = slice(at, at + len(own)), begin + np.arange(len(own))
            ids[part], positions[part] = own, where
            slots[part] = np.asarray(table)[where // PAGE_SIZE] * PAGE_SIZE + where % PAGE_SIZE
            at += len(own)
        starts = np.cumsum([0, *counts[rows:]], dtype=np.int32)
        lens = np.asarray([begin + len(own) for own, begin, _ in work], np.int32)
        tables = np.asarray([table for *_, table in work], np.int32)
        prompts = tables[rows:], starts, lens[rows:]
        batch = Batch(ids, positions, slots, tables[:rows], lens[:rows], *prompts)
        logits, cache = self.forward(batch, cache)
        return np.split(bits(logits), np.cumsum(counts)), cache


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", jnp.bfloat16),
        ("qwen3", jnp.float32),
        pytest.param("gemma3_text", jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_prefill_chunks_and_decode_agree(family, dtype):
    run = Runner(family, dtype)
    mine, other = TOKENS
    with tpu_interpreter(simulate=False):
        whole, _ = run.step(run.new_cache(), [(mine, 0, [1, 2])])
        whole = whole[0]
        # A chunk up to 90, beside another prompt and in other pages; from 90 to 136 in a padded step; then decode.
        cache = run.new_cache()
        first, cache = run.step(cache, [(other[:30], 0, [5, 3]), (mine[:90], 0, [6, 4])])
        np.testing.assert_array_equal(first[1], whole[:90])
        second, cache = run.step(cache, [(mine[90:136], 90, [6, 4])], tokens=64)
        np.testing.assert_array_equal(second[0], whole[90:136])
        for at in range(136, LENGTH):
            row = [(mine[at : at + 1], at, [6, 4])]
            beside = [(other[at - 106 : at - 105], at - 106, [5, 3])]
            decoded, cache = run.step(cache, beside + row, rows=2)
            np.testing.assert_array_equal(decoded[1], whole[at : at + 1])
    assert np.isfinite(whole.view(jnp.float32)).all()
    with pytest.raises(AssertionError):  # the comparison sees another prefix
        np.testing.assert_array_equal(decoded[0], whole[33:34])


def test_logits_are_close_to_the_xla_backends():
    """Another order, the same mathematics."""
    logits = {}
    for backend in ("mosaic_tpu", "xla"):
        run = Runner("qwen3", jnp.float32, backend)
        with tpu_interpreter(simulate=False):
            out, _ = run.step(run.new_cache(), [(TOKENS[0], 0, [1, 2])])
        logits[backend] = out[0].view(np.float32)
    assert (
        error("logits, from the xla backend's", logits["mosaic_tpu"], logits["xla"].astype(np.float64)) < 2e-5
    )
    assert (logits["mosaic_tpu"] != logits["xla"]).any(), "two backends did run"
