"""On a Hopper GPU, every program that an engine compiles runs: XLA and Mosaic find some faults only then."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdet.engine.engine import Engine
from jaxdet.engine.packed import pack
from jaxdet.engine.step import Step
from jaxdet.testing import QWEN3_8B, random_model

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def runner(step: Step, ran: list[str]) -> Step:
    """A twin whose methods, given shapes, run their program on zeros."""

    def zeros(x):
        return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x

    def call(name, key, *args, told=None, **static):
        program = step.programs[name, key]
        last = [] if told is None else [np.zeros(pack(told).shape, np.int32)]
        jax.block_until_ready(program(*jax.tree.map(zeros, args), *last))
        ran.append(name)

    return step._twin(call)


@pytest.fixture
def several_processes(tmp_path):
    """Without a folder to keep programs in, this process would lower all of them, one at a time."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("max_model_len, rows, tokens", [(8448, 1000, 8192), (512, 64, 256)])
def test_every_program_runs(max_model_len, rows, tokens, several_processes):
    model = random_model(
        QWEN3_8B | {"num_hidden_layers": 1}, dtype=jnp.bfloat16, backend=None, max_model_len=max_model_len
    )
    assert model.backend == "mosaic_gpu"
    engine = Engine(
        model,
        salt="",
        max_model_len=max_model_len,
        max_num_seqs=rows,
        max_num_batched_tokens=tokens,
        num_pages=300,
        num_scheduler_steps=4,
    )
    engine.compile_all()
    ran = []
    for job in engine.wanted.jobs(lambda step: runner(step, ran)):
        job()
    assert len(ran) == engine.step_fn.compiled > 50
