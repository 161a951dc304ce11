"""The rollout worker for Tunix, where Tunix is installed: its own Llama's weights, its prompts, the engine's bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdet import LLM
from jaxdet.checkpoints import open_checkpoint
from jaxdet.rl import compare
from jaxdet.testing import COMMON, write_tiny_model

base_rollout = pytest.importorskip("tunix.rl.rollout.base_rollout")
tunix_llama = pytest.importorskip("tunix.models.llama3.model")

from jaxdet.rl import tunix as worker  # noqa: E402  (needs Tunix)

THETA = 1_000_000
"""Tunix 0.1.7's Llama turns by this, whatever its config says."""
PROMPTS = ["abc", "abc", "a longer prompt", "b"]


class ByteTokenizer:
    """What Tunix asks of a tokenizer."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def bos_id(self) -> int:
        return 256

    def eos_id(self) -> int:
        return 258

    def pad_id(self) -> int:
        return 257


def llama(folder) -> nnx.Module:
    """Tunix's model with the weights of a checkpoint."""
    c, checkpoint = COMMON, open_checkpoint(folder)
    heads, kv, dim, hidden = (
        c["num_attention_heads"],
        c["num_key_value_heads"],
        c["head_dim"],
        c["hidden_size"],
    )
    config = tunix_llama.ModelConfig(
        num_layers=c["num_hidden_layers"],
        vocab_size=c["vocab_size"],
        embed_dim=hidden,
        hidden_dim=c["intermediate_size"],
        num_heads=heads,
        head_dim=dim,
        num_kv_heads=kv,
        rope_theta=THETA,
        norm_eps=c["rms_norm_eps"],
    )
    model = tunix_llama.Llama3(config, rngs=nnx.Rngs(0))

    def read(name: str, *shape: int, turned: bool = True) -> jax.Array:
        value = checkpoint.read(name)
        return jnp.asarray(value.T if turned else value).reshape(
            shape or value.T.shape if turned else value.shape
        )

    model.embedder.input_embedding[...] = read("model.embed_tokens.weight", turned=False)
    model.final_norm.w[...] = read("model.norm.weight", turned=False)
    model.lm_head.w[...] = read("lm_head.weight")
    for i, layer in enumerate(model.layers):
        stem = f"model.layers.{i}"
        for name, count in (("q", heads), ("k", kv), ("v", kv)):
            projection = getattr(layer.attn, f"{name}_proj")
            projection.w[...] = read(f"{stem}.self_attn.{name}_proj.weight", hidden, count, dim)
        layer.attn.o_proj.w[...] = read(f"{stem}.self_attn.o_proj.weight", heads, dim, hidden)
        for name in ("gate", "up", "down"):
            getattr(layer.mlp, f"{name}_proj").kernel[...] = read(f"{stem}.mlp.{name}_proj.weight")
        for name in ("input_layernorm", "post_attention_layernorm"):
            getattr(layer, name).w[...] = read(f"{stem}.{name}.weight", turned=False)
    return model


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """An engine with other weights than Tunix's model, and that model."""
    place = tmp_path_factory.mktemp("tunix")
    folders = [write_tiny_model(place / str(seed), seed=seed, rope_theta=float(THETA)) for seed in (0, 1)]
    llm = LLM(folders[0], dtype="float32", max_model_len=128)
    before = llm.weights_digest
    config = base_rollout.RolloutConfig(
        max_tokens_to_generate=12, temperature=1.0, max_prompt_length=20, return_logprobs=True
    )
    model = llama(folders[1])
    rollout = worker.JaxdetRollout(
        rollout_actor=model,
        tokenizer=ByteTokenizer(llm.tokenizer),
        mesh=None,
        rollout_config=config,
        llm=llm,
    )
    assert llm.weights_digest != before
    assert llm.weights_digest == LLM(folders[1], dtype="float32", max_model_len=128).weights_digest
    return rollout, config, model


def test_generate(setting):
    rollout, config, _ = setting
    rollout._calls = 0
    found = rollout.generate(PROMPTS, config)
    assert found.left_padded_prompt_tokens.shape == (4, 20)
    assert found.left_padded_prompt_tokens[0].tolist() == [257] * 16 + [256, *b"abc"]
    assert not np.array_equal(found.tokens[0], found.tokens[1]), "equal prompts get different completions"
    again = rollout.generate(PROMPTS, config)
    assert not np.array_equal(found.tokens[0], again.tokens[0]), "every call draws anew"
    rollout._calls = 0
    repeated = rollout.generate(PROMPTS, config)
    for one, other in zip(found.tokens + found.logprobs, repeated.tokens + repeated.logprobs, strict=True):
        np.testing.assert_array_equal(one, other)
    completions = np.full((4, 14), rollout.pad_id(), np.int32)
    for row, tokens in zip(completions, found.tokens, strict=True):
        row[: len(tokens)] = tokens
    values = np.asarray(rollout.get_per_token_logps(found.left_padded_prompt_tokens, completions))
    scored = [row[: len(tokens)] for row, tokens in zip(values, found.tokens, strict=True)]
    assert compare(found.logprobs, scored).differing == 0
    other = [np.asarray(x) + np.float32(1e-6) for x in scored]
    assert compare(found.logprobs, other).differing > 0


@pytest.mark.parametrize("seed", [jax.random.key(3), jax.random.PRNGKey(3), 3])
def test_seeds(setting, seed):
    rollout, config, _ = setting
    rollout._calls = 0
    unseeded = rollout.generate(PROMPTS, config)
    rollout._calls = 0
    found = rollout.generate(PROMPTS, dataclasses.replace(config, seed=seed))
    assert any(not np.array_equal(a, b) for a, b in zip(found.tokens, unseeded.tokens, strict=True))


def test_weights_stay_on_the_device(setting):
    """Tunix forbids transfers while it syncs on a CPU."""
    rollout, _, model = setting
    digest = rollout.llm.weights_digest
    doubled = jax.tree.map(lambda x: x * 2, nnx.state(model, nnx.Param))
    for params, same in ((doubled, False), (nnx.state(model, nnx.Param), True)):
        with jax.transfer_guard("disallow_explicit"):
            rollout.update_params(params, (nnx.Param,))
        assert (rollout.llm.weights_digest == digest) == same


def test_beside_tunix_own_forward_pass(setting):
    """The same function but for rounding: weights and layouts are right."""
    rollout, config, model = setting
    found = rollout.generate(PROMPTS, config)
    for prompt, tokens, expected in zip(
        found.left_padded_prompt_tokens, found.tokens, found.logprobs, strict=True
    ):
        ids = np.concatenate([prompt[prompt != rollout.pad_id()], tokens])
        size = len(ids)
        mask = jnp.tril(jnp.ones((1, size, size), bool))
        logits, _ = model(jnp.asarray(ids)[None], jnp.arange(size)[None], None, mask)
        every = jax.nn.log_softmax(logits[0].astype(jnp.float32))[jnp.arange(size - 1), ids[1:]]
        np.testing.assert_allclose(every[-len(tokens) :], expected, atol=2e-4)


def test_unknown_names():
    with pytest.raises(
        ValueError, match=r"^params: layers.0.attn.q_proj.w_lora_a is not a weight of Tunix's"
    ):
        worker.huggingface_tensors({"layers": {0: {"attn": {"q_proj": {"w_lora_a": jnp.zeros((2, 2))}}}}})
