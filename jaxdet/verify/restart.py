"""Prints the digest of the reference logits: what `jaxdet verify` runs in a new process."""

import hashlib
import sys

import numpy as np

from jaxdet.llm import LLM
from jaxdet.verify.probe import POOL, ROOM, Probe


def reference_digest(probe: Probe) -> str:
    """SHA-256 of the reference sequence's float32 logits."""
    return hashlib.sha256(np.ascontiguousarray(probe.reference).view(np.uint8).data).hexdigest()


def main(model: str, dtype: str, backend: str) -> None:
    llm = LLM(
        model,
        dtype=dtype,
        backend=backend or None,
        max_model_len=ROOM,
        num_pages=POOL,
        compile_at_start=False,
    )
    print(reference_digest(Probe(llm.engine.step_fn)))


if __name__ == "__main__":
    main(*sys.argv[1:])
