"""Prints the digest of the reference logits: what `jaxdet verify` runs in a new process."""

import hashlib
import sys

import jax
import numpy as np

from jaxdet.llm import LLM
from jaxdet.verify.probe import Probe


def reference_digest(probe: Probe) -> str:
    """SHA-256 of the reference sequence's float32 logits."""
    return hashlib.sha256(np.ascontiguousarray(probe.reference).view(np.uint8).data).hexdigest()


def main(model: str, dtype: str, backend: str, length: str, compiled: str) -> None:
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    llm = LLM(model, dtype=dtype, backend=backend or None, max_model_len=256)
    print(reference_digest(Probe(llm.engine.step_fn, int(length))))


if __name__ == "__main__":
    main(*sys.argv[1:])
