"""jaxdet: deterministic LLM inference in JAX. The same prompt, weights and seed give the same bits."""

from collections.abc import Sequence
from typing import Any

from jaxdet.llm import LLM, Prompt, as_list
from jaxdet.outputs import CompletionOutput, Logprob, RequestOutput, ScoreOutput
from jaxdet.sampling_params import SamplingParams
from pallas_kernels.numerics import NUMERICS_VERSION

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "NUMERICS_VERSION",
    "CompletionOutput",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "ScoreOutput",
    "generate",
    "score",
]


_loaded: dict[tuple[str, str, str | None, int | None], LLM] = {}


def _shared(*key: Any) -> LLM:
    """The model of the last call, or a new one; the old one is let go first, so that there is room."""
    if key not in _loaded:
        _loaded.clear()
        model, dtype, backend, max_model_len = key
        _loaded[key] = LLM(model, dtype=dtype, backend=backend, max_model_len=max_model_len)
    return _loaded[key]


def generate(
    prompts: Prompt | Sequence[Prompt],
    model: str = "smollm2-135m",
    *,
    dtype: str = "auto",
    backend: str | None = None,
    max_model_len: int | None = None,
    use_tqdm: bool = False,
    **sampling: Any,
) -> list[RequestOutput]:
    """Completes prompts with a model that stays loaded for the next call.

    Args:
        prompts: one prompt or many: text (run through the chat template if the model has one), token ids, or
            {"prompt": …} / {"prompt_token_ids": …} (run as they are).
        model, dtype, backend, max_model_len: see `LLM`; other values load the model anew, in the old one's place.
        use_tqdm: show a progress bar.
        sampling: fields of `SamplingParams`, such as max_tokens=32, temperature=0.7, seed=7.

    Returns:
        One output per prompt, in their order.

    Raises:
        ValueError, FileNotFoundError: see `LLM`, `LLM.generate` and `SamplingParams`.
    """
    params, listed = SamplingParams(**sampling), as_list(prompts)
    llm = _shared(str(model), dtype, backend, max_model_len)
    listed = [llm.user_prompt(p) if isinstance(p, str) else p for p in listed]
    return llm.generate(listed, params, use_tqdm=use_tqdm)


def score(
    token_id_sequences: Sequence[Sequence[int]],
    model: str = "smollm2-135m",
    *,
    dtype: str = "auto",
    backend: str | None = None,
    max_model_len: int | None = None,
) -> list[ScoreOutput]:
    """Log-probabilities of given tokens, with a model that stays loaded for the next call.

    Args:
        token_id_sequences: one list of ids per sequence, each of up to max_model_len tokens.
        model, dtype, backend, max_model_len: as for `generate`, which shares the model.

    Returns:
        One output per sequence, see `LLM.score`.

    Raises:
        ValueError, FileNotFoundError: see `LLM` and `LLM.score`.
    """
    return _shared(str(model), dtype, backend, max_model_len).score(token_id_sequences)
