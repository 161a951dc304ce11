"""What is compiled for TPUs that are not here: every kernel at real models' shapes, and whole steps.

Run as a script it prints the tables of docs/tpu.md: `python tests/tpu_programs.py [kernels|steps]`.
"""

import dataclasses
import functools
import re
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from tpu_chips import CHIPS, Compiled, compile_for

from jaxdet.engine import packed
from jaxdet.engine.step import _decode
from jaxdet.models.layers import Batch
from jaxdet.testing import QWEN3_8B, SMOLLM2, random_model
from pallas_kernels.attention.op import attention
from pallas_kernels.matmul.op import gated_matmul, matmul, pack, pack_gated
from pallas_kernels.numerics import PAGE_SIZE
from pallas_kernels.rms_norm.op import rms_norm
from pallas_kernels.rope_cache.op import rope_cache
from pallas_kernels.sample.op import SamplingRows, sample, token_logprobs

TPU = "mosaic_tpu"
F32, BF16, I32 = jnp.float32, jnp.bfloat16, jnp.int32


@dataclasses.dataclass(frozen=True)
class Program:
    """A function and the shapes of its operands."""

    name: str
    function: Callable
    operands: tuple
    donated: tuple[int, ...] = ()

    def compile(self, chip: str) -> Compiled:
        jit = functools.partial(jax.jit, donate_argnums=self.donated)
        return compile_for(chip, self.function, *self.operands, jit=jit)


def shape(*dims: int, dtype=BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def norm_program(rows, size, dtype=BF16):
    function = functools.partial(rms_norm, eps=1e-6, backend=TPU)
    return Program(
        f"rms_norm {rows} × {size}", function, (shape(rows, size, dtype=dtype), shape(size, dtype=F32))
    )


def matmul_program(rows, k, n, dtype=BF16, *, residual=False):
    packed = jax.eval_shape(functools.partial(pack, backend=TPU), shape(k, n, dtype=dtype))
    more = (shape(rows, n, dtype=dtype),) if residual else ()

    def function(x, w, residual=None):
        return matmul(x, w, n=n, residual=residual, backend=TPU)

    return Program(f"matmul {rows} × {k} × {n}", function, (shape(rows, k, dtype=dtype), packed, *more))


def gated_program(rows, k, n, dtype=BF16):
    half = shape(k, n, dtype=dtype)
    packed = jax.eval_shape(functools.partial(pack_gated, backend=TPU), half, half)
    function = functools.partial(gated_matmul, n=n, activation="silu", backend=TPU)
    return Program(f"gated_matmul {rows} × {k} × {n}", function, (shape(rows, k, dtype=dtype), packed))


def rope_program(tokens, heads, kv_heads, dim, dtype=BF16, *, normed=False):
    pages = shape(PAGES, kv_heads, PAGE_SIZE, dim, dtype=dtype)
    norm = shape(dim, dtype=F32) if normed else None

    def function(qkv, k_pages, v_pages, rope, positions, slots, q_norm, k_norm):
        options = {"num_q_heads": heads, "num_kv_heads": kv_heads, "q_norm": q_norm, "k_norm": k_norm}
        return rope_cache(qkv, k_pages, v_pages, rope, positions, slots, **options, backend=TPU)

    qkv = shape(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    index = shape(tokens, dtype=I32)
    operands = (qkv, pages, pages, shape(4096, dim, dtype=F32), index, index, norm, norm)
    return Program(f"rope_cache {tokens} × ({heads} + {kv_heads}) × {dim}", function, operands, (1, 2))


def attention_program(tokens, heads, kv_heads, dim, dtype=BF16, *, decode=False, **options):
    pages = shape(PAGES, kv_heads, PAGE_SIZE, dim, dtype=dtype)
    sequences = tokens if decode else 8
    options = {"scale": dim**-0.5, "max_query_len": 1 if decode else tokens, "backend": TPU} | options
    function = functools.partial(attention, **options)
    index = functools.partial(shape, dtype=I32)
    operands = (shape(tokens, heads, dim, dtype=dtype), pages, pages)
    operands += (index(sequences, 64), index(sequences + 1), index(sequences))
    kind = "decode" if decode else "prefill"
    return Program(f"attention, {kind} {tokens} × ({heads} / {kv_heads}) × {dim}", function, operands)


def sampling_rows(rows):
    one = functools.partial(shape, rows)
    return SamplingRows(
        temperature=one(dtype=F32),
        top_k=one(dtype=I32),
        top_p=one(dtype=F32),
        min_p=one(dtype=F32),
        seed=shape(rows, 2, dtype=jnp.uint32),
        sample_index=one(dtype=I32),
        position=one(dtype=I32),
    )


def sample_program(rows, vocab):
    function = functools.partial(sample, backend=TPU)
    return Program(f"sample {rows} × {vocab}", function, (shape(rows, vocab, dtype=F32), sampling_rows(rows)))


def logprobs_program(rows, vocab):
    function = functools.partial(token_logprobs, top=1, backend=TPU)
    operands = (shape(rows, vocab, dtype=F32), shape(rows, dtype=I32))
    return Program(f"token_logprobs {rows} × {vocab}", function, operands)


PAGES = 512
KERNELS = [
    norm_program(1, 576),
    norm_program(2048, 4096),
    norm_program(64, 4096, F32),
    matmul_program(1, 576, 960),
    matmul_program(64, 12288, 4096, residual=True),
    matmul_program(2048, 4096, 6144),
    matmul_program(300, 4096, 1024, F32, residual=True),
    gated_program(3, 576, 1536),
    gated_program(2048, 4096, 12288),
    rope_program(1, 9, 3, 64),
    rope_program(2048, 32, 8, 128, normed=True),
    rope_program(40, 32, 32, 96, F32),
    attention_program(1, 9, 3, 64, decode=True),
    attention_program(64, 32, 8, 128, decode=True),
    attention_program(1024, 32, 8, 128),
    attention_program(256, 8, 4, 256, window=512, soft_cap=50.0),
    attention_program(40, 28, 4, 80, F32),
    sample_program(1, 49152),
    sample_program(64, 151936),
    sample_program(8, 262144),
    logprobs_program(64, 151936),
]


def step_program(name, config, *, rows, prompt_tokens, pages, sequences=4):
    """A whole step: `rows` decoding sequences and `prompt_tokens` of up to `sequences` prompts, sampled tokens out."""
    model = nnx.eval_shape(
        lambda: random_model(config, dtype=jnp.dtype(BF16), backend=TPU, max_model_len=8192)
    )
    graph, state = nnx.split(model)
    c = model.config
    page = shape(pages, c.num_kv_heads, PAGE_SIZE, c.head_dim)
    cache = [(page, page) for _ in range(c.num_layers)]
    tokens = rows + prompt_tokens
    sequences = sequences if prompt_tokens else 0
    index = functools.partial(shape, dtype=I32)
    batch = Batch(
        tokens=index(tokens),
        positions=index(tokens),
        slots=index(tokens),
        row_tables=index(rows, 64),
        row_lens=index(rows),
        tables=index(sequences, 64),
        query_start=index(sequences + 1),
        seq_lens=index(sequences),
    )

    def step(state, cache, batch, sampling):
        model = nnx.merge(graph, state)
        hidden, cache = model(batch, cache)
        last = hidden.at[batch.last_rows()].get(mode="promise_in_bounds")
        return *sample(model.logits(last), sampling, backend=TPU), cache

    kind = f"decode {rows}" if not prompt_tokens else f"{rows} decoding + {prompt_tokens} prompt tokens"
    operands = (state, cache, batch, sampling_rows(rows + sequences))
    return Program(f"{name}, {kind}", step, operands, (1,))


def repeated_program(name, config, *, rows, pages, times):
    """Several decode steps in a row."""
    single = step_program(name, config, rows=rows, prompt_tokens=0, pages=pages)
    state, cache, batch, sampling = single.operands
    graph, state = nnx.split(
        nnx.eval_shape(lambda: random_model(config, dtype=jnp.dtype(BF16), backend=TPU, max_model_len=8192))
    )
    weights, tree = jax.tree.flatten(state)
    each = shape(rows, dtype=I32)
    told = each, batch, each, sampling, each
    function = functools.partial(_decode, graph, tree, TPU, layout=packed.layout_of(told), steps=times)
    operands = weights, cache, each, packed.pack(told)
    return Program(f"{single.name}, {times} times", function, operands, (1, 2))


@functools.cache
def steps(chip: str) -> list[Program]:
    """The steps of two models on one device of that chip; v5e holds half of Qwen3-8B's layers."""
    layers = 18 if chip == "v5e" else 36
    qwen = QWEN3_8B | {"num_hidden_layers": layers}
    name = "Qwen3-8B" if layers == 36 else f"Qwen3-8B, {layers} layers"
    return [
        step_program("SmolLM2-135M", SMOLLM2, rows=8, prompt_tokens=0, pages=512),
        step_program("SmolLM2-135M", SMOLLM2, rows=8, prompt_tokens=504, pages=512),
        repeated_program("SmolLM2-135M", SMOLLM2, rows=8, pages=512, times=8),
        step_program(name, qwen, rows=64, prompt_tokens=0, pages=256),
        step_program(name, qwen, rows=64, prompt_tokens=1984, pages=256),
    ]


def kernels_called(compiled: Compiled) -> int:
    """Calls of Mosaic kernels in the optimised HLO."""
    return compiled.text.count('custom_call_target="tpu_custom_call"')


def vmem(compiled: Compiled) -> int:
    """The most vector memory, in bytes, that a kernel of the program uses, beside what XLA keeps there meanwhile."""
    most = 0
    for line in compiled.text.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            given, used = (_vmem_config(line, name) for name in ("scoped", "used_scoped"))
            most = max(most, used["size"] - given["offset"])
    return most


def _vmem_config(line: str, name: str) -> dict[str, int]:
    """Offset and size, in bytes, that an op's `name`_memory_configs tell of VMEM, which is memory space 1."""
    found = re.search(
        rf'"{name}_memory_configs":\[.*?"memory_space":"1","offset":"(\d+)","size":"(\d+)"', line
    )
    assert found, line
    return {"offset": int(found[1]), "size": int(found[2])}


def hbm(compiled: Compiled) -> int:
    """Bytes of HBM that the program takes: operands, results that are none of them, temporaries and code."""
    m = compiled.program.memory_analysis()
    assert m is not None
    size = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return size + m.temp_size_in_bytes + m.generated_code_size_in_bytes


def main(kind: str) -> None:
    of = {"kernels": lambda chip: KERNELS, "steps": steps}[kind]
    print("| program |", " | ".join(CHIPS), "|")
    print("|---" * (len(CHIPS) + 1) + "|")
    for programs in zip(*map(of, CHIPS), strict=True):
        cells = []
        for chip, program in zip(CHIPS, programs, strict=True):
            compiled = program.compile(chip)
            if kind == "kernels":
                size = f"{vmem(compiled) / 2**20:.1f} MiB"
            else:
                size = f"{hbm(compiled) / 2**30:.2f} GiB, {kernels_called(compiled)} kernels"
            cells.append(f"{compiled.seconds:.1f} s, {size}")
        print(f"| {programs[-1].name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
