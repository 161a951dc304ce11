"""The layers that all families share, as Flax NNX modules over the kernels.

Axis letters: T tokens of a step, S sequences, H hidden, D head_dim, Hq/Hkv heads, P pages, L positions.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxdet.models.config import ModelConfig, inverse_frequencies
from jaxdet.models.weights import Weights
from pallas_kernels.arrays import HostOrDevice
from pallas_kernels.attention.op import attention
from pallas_kernels.attention.tiles import TILES
from pallas_kernels.gradient import Trained
from pallas_kernels.matmul.op import Norm, gated_matmul, matmul, take_columns
from pallas_kernels.reduce import pin
from pallas_kernels.rms_norm.op import rms_norm
from pallas_kernels.rope_cache.op import rope_cache, rope_table

KVCache = list[tuple[jax.Array, jax.Array]]
"""Per layer (k_pages, v_pages), each [P, Hkv, PAGE_SIZE, D]."""


def new_cache(config: ModelConfig, dtype: jnp.dtype, num_pages: int, page_size: int) -> KVCache:
    """Zeroed pages for every layer: [num_pages, Hkv, page_size, D] for keys and for values."""
    shape = num_pages, config.num_kv_heads, page_size, config.head_dim
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The tokens of one step: R rows that are queries of their own, then the prompts of S sequences.

    The rows are decoding sequences, or several tokens of one (drafts): each sees the cache up to its own position.
    Rows and prompts have arrays of their own: a kernel cannot take a slice that begins anywhere.
    """

    tokens: Int[HostOrDevice, " T"]
    positions: Int[HostOrDevice, " T"]
    slots: Int[HostOrDevice, " T"]
    """Where each token's key and value go: page · PAGE_SIZE + offset; padding goes to the trash page."""
    row_tables: Int[HostOrDevice, "R pages"]
    """Page numbers of every row's sequence, in order."""
    row_lens: Int[HostOrDevice, " R"]
    """Keys that each row sees, its own included."""
    tables: Int[HostOrDevice, "S pages"]
    """Page numbers of every prompt."""
    query_start: Int[HostOrDevice, " S+1"]
    """Where each prompt's tokens start, counted from the first after the rows; the last entry is their number."""
    seq_lens: Int[HostOrDevice, " S"]
    """Keys that the last token of each prompt sees."""
    query_alignment: int = dataclasses.field(default=1, metadata={"static": True})
    """Every prompt's tokens start at a multiple of it: a promise to `attention`, part of the program."""

    @property
    def rows(self) -> int:
        return self.row_lens.shape[0]

    def with_tokens(self, tokens: Int[Array, " T"]) -> "Batch":
        return dataclasses.replace(self, tokens=tokens)

    def last_rows(self) -> Int[Array, " R+S"]:
        """The tokens after which something may be sampled: every row, and the last of every prompt."""
        ends = self.rows + jnp.maximum(self.query_start[1:] - 1, 0)
        return jnp.concatenate([jnp.arange(self.rows, dtype=jnp.int32), ends])


class RMSNorm(nnx.Module):
    """Normalises rows; `offset` 1 for families that store w − 1."""

    def __init__(self, weights: Weights, config: ModelConfig, offset: float = 0.0):
        self.weight = nnx.Param(weights.vector("weight", offset=offset))
        self.eps, self.backend = config.norm_eps, weights.backend

    def __call__(self, x: Float[Array, "T H"]) -> Float[Array, "T H"]:
        return rms_norm(x, self.weight[...], eps=self.eps, backend=self.backend)

    @property
    def parameters(self) -> Norm:
        """For a product that normalises its own rows."""
        return self.weight[...], self.eps


class Attention(nnx.Module):
    """Norm, fused qkv projection, optional q/k norm, RoPE, paged attention, output projection (+ residual)."""

    def __init__(
        self, weights: Weights, config: ModelConfig, layer: int, *, qk_norm: bool = False, offset: float = 0.0
    ):
        names = ("q_proj", "k_proj", "v_proj")
        self.qkv = nnx.Param(weights.matrix(*(f"{n}.weight" for n in names)))
        self.qkv_bias = nnx.Param(weights.vector(*(f"{n}.bias" for n in names))) if config.qkv_bias else None
        self.output = nnx.Param(weights.matrix("o_proj.weight"))
        self.output_bias = nnx.Param(weights.vector("o_proj.bias")) if config.output_bias else None
        self.q_norm = nnx.Param((weights / "q_norm").vector("weight", offset=offset)) if qk_norm else None
        self.k_norm = nnx.Param((weights / "k_norm").vector("weight", offset=offset)) if qk_norm else None
        self.config, self.window, self.backend = config, config.windows[layer], weights.backend

    def __call__(self, x, norm: RMSNorm, batch: Batch, rope, cache, residual=None):
        c = self.config
        width = (c.num_q_heads + 2 * c.num_kv_heads) * c.head_dim
        qkv = matmul(
            x,
            self.qkv[...],
            n=width,
            bias=_value(self.qkv_bias),
            norm=norm.parameters,
            backend=self.backend,
        )
        q, k_pages, v_pages = rope_cache(
            qkv,
            cache[0],
            cache[1],
            rope,
            batch.positions,
            batch.slots,
            num_q_heads=c.num_q_heads,
            num_kv_heads=c.num_kv_heads,
            q_norm=_value(self.q_norm),
            k_norm=_value(self.k_norm),
            eps=c.norm_eps,
            backend=self.backend,
        )
        out = self._attend(q, k_pages, v_pages, batch).reshape(x.shape[0], -1)
        y = matmul(
            out,
            self.output[...],
            n=c.hidden_size,
            bias=_value(self.output_bias),
            residual=residual,
            backend=self.backend,
        )
        return y, (k_pages, v_pages)

    def _attend(self, q, k_pages, v_pages, batch: Batch):
        """The rows' attention and the prompts'; the op gives both the same bits."""
        c, rows, parts = self.config, batch.rows, []
        call = functools.partial(
            attention,
            scale=c.attention_scale,
            window=self.window,
            soft_cap=c.soft_cap,
            backend=self.backend,
        )
        if rows:
            starts = jnp.arange(rows + 1, dtype=jnp.int32)
            parts.append(
                call(
                    q[:rows],
                    k_pages,
                    v_pages,
                    batch.row_tables,
                    starts,
                    batch.row_lens,
                    max_query_len=1,
                )
            )
        if prompt_tokens := q.shape[0] - rows:
            parts.append(
                call(
                    q[rows:],
                    k_pages,
                    v_pages,
                    batch.tables,
                    batch.query_start,
                    batch.seq_lens,
                    max_query_len=prompt_tokens,
                    query_alignment=batch.query_alignment,
                )
            )
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


class MLP(nnx.Module):
    """Norm, gated feed-forward: act(gate) · up, then down (+ residual)."""

    def __init__(self, weights: Weights, config: ModelConfig):
        self.gate_up = nnx.Param(weights.gated("gate_proj.weight", "up_proj.weight"))
        self.down = nnx.Param(weights.matrix("down_proj.weight"))
        self.config, self.backend = config, weights.backend

    def __call__(self, x, norm: RMSNorm, residual=None):
        c = self.config
        inner = gated_matmul(
            x,
            self.gate_up[...],
            n=c.intermediate_size,
            activation=c.activation,
            norm=norm.parameters,
            backend=self.backend,
        )
        return matmul(inner, self.down[...], n=c.hidden_size, residual=residual, backend=self.backend)


class DecoderLayer(nnx.Module):
    """Pre-norm block: attention and MLP, each added to the residual in its own product's epilogue."""

    def __init__(self, weights: Weights, config: ModelConfig, layer: int, *, qk_norm: bool = False):
        self.input_norm = RMSNorm(weights / "input_layernorm", config)
        self.attention = Attention(weights / "self_attn", config, layer, qk_norm=qk_norm)
        self.post_norm = RMSNorm(weights / "post_attention_layernorm", config)
        self.mlp = MLP(weights / "mlp", config)

    def __call__(self, x, batch: Batch, rope, cache):
        x, cache = self.attention(x, self.input_norm, batch, rope, cache, residual=x)
        return self.mlp(x, self.post_norm, residual=x), cache


class DecoderLM(nnx.Module):
    """Embedding, decoder layers, final norm and LM head: the frame of every family.

    A family says how to read its config and, where they differ, what its layers and its norms' offset are.
    """

    norm_offset = 0.0

    @staticmethod
    def read_config(config: dict[str, Any]) -> ModelConfig:
        """The model's shape, from its config.json."""
        raise NotImplementedError

    @staticmethod
    def make_layer(weights: Weights, config: ModelConfig, index: int) -> nnx.Module:
        """Layer `index`, from the tensors under its own prefix."""
        return DecoderLayer(weights, config, index)

    def __init__(self, weights: Weights, config: ModelConfig, max_model_len: int):
        self.config, self.backend, self.dtype = config, weights.backend, weights.dtype
        if config.tied_embeddings:
            self.embedding = None
            self.head = nnx.Param(weights.matrix("model.embed_tokens.weight"))
        else:
            self.embedding = nnx.Param(weights.matrix("model.embed_tokens.weight"))
            self.head = nnx.Param(weights.matrix("lm_head.weight"))
        layers = weights / "model" / "layers"
        self.layers = nnx.List(self.make_layer(layers / str(i), config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(weights / "model" / "norm", config, self.norm_offset)
        self.rope = nnx.List(
            nnx.Variable(jnp.asarray(rope_table(inverse_frequencies(r, config.head_dim), max_model_len)))
            for r in config.rope
        )

    def embed(self, tokens: Int[HostOrDevice, " T"]) -> Float[Array, "T H"]:
        """Rows of the embedding, which a tied model looks up in its LM head."""
        table = self.head if self.embedding is None else self.embedding
        return take_columns(table[...], tokens, self.config.hidden_size, self.backend)

    def __call__(
        self, batch: Batch, cache: KVCache, *, remat: bool = False
    ) -> tuple[Float[Array, "T H"], KVCache]:
        """Runs the layers over one step's tokens; returns normalised hidden states and the new cache.

        Args:
            remat: under differentiation, keep each layer's input only and compute the rest again; to the same bits.
        """
        run = _run_layer
        if remat:
            kept = jax.checkpoint_policies.save_only_these_names(TILES)
            run = jax.checkpoint(run, static_argnums=0, policy=kept)
        x = self.embed(batch.tokens)
        written = []
        for layer, rope, kv in zip(self.layers, self.config.rope_of_layer, cache, strict=True):
            x, kv = run(*nnx.split(layer), x, batch, self.rope[rope][...], kv)
            written.append(kv)
        return self.norm(x), written

    def logits(self, hidden: Float[Array, "M H"]) -> Float[Array, "M V"]:
        """float32 logits of the given rows."""
        return head_logits(self.head[...], hidden, self.config, self.backend)


def head_logits(
    head: Float[Array, "..."] | Trained, hidden: Float[Array, "M H"], config: ModelConfig, backend: str
) -> Float[Array, "M V"]:
    """float32 logits of rows through a packed LM head."""
    out = matmul(hidden, head, n=config.vocab_size, out_dtype=jnp.float32, backend=backend)
    if config.logit_soft_cap is not None:
        out = pin(jnp.tanh(out / config.logit_soft_cap) * config.logit_soft_cap)
    return out


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(graph, state, x, batch: Batch, rope, cache):
    """A layer as a function of its own, so that layers alike are traced and lowered once, not once each."""
    return nnx.merge(graph, state)(x, batch, rope, cache)


def _value(parameter: nnx.Param | None) -> jax.Array | None:
    return None if parameter is None else parameter[...]
