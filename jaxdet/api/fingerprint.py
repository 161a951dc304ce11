"""What answers depend on besides the request."""

import hashlib
import importlib.metadata
import importlib.util
import json
import secrets

from jaxdet import certificates
from jaxdet.llm import LLM
from pallas_kernels.backend import libraries, platform_key
from pallas_kernels.numerics import NUMERICS_VERSION


def fingerprint(llm: LLM) -> str:
    """Digest of everything that answers depend on: engines with the same one give the same bits.

    Where `jaxdet verify` found values that differ, or a device that the project doesn't test was never verified, no two
    engines have the same one.
    """
    backend = llm.engine.step_fn.backend
    if not certificates.claimed(llm.name, backend, llm.dtype):
        return f"uncertified_{secrets.token_hex(16)}"
    tokenizer = llm.tokenizer
    grammars = importlib.util.find_spec("llguidance") and importlib.metadata.version("llguidance")
    facts = {
        "weights": llm.weights_digest,
        "numerics_version": NUMERICS_VERSION,
        "backend": backend,
        "platform": platform_key(),
        "libraries": libraries(backend),
        "dtype": llm.dtype,
        "seed": llm.engine.seed,
        "max_model_len": llm.max_model_len,
        "tokenizer": hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest(),
        "special": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_ids, tokenizer.add_bos],
        "chat_template": [tokenizer.chat_template, tokenizer.tool_template],
        "version": importlib.metadata.version(
            "jaxdet"
        ),  # of how stop strings end and what tools' calls follow
        "llguidance": grammars,
    }
    return "fp_" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
