"""What one run of the arena is asked to do."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from jaxdet.sampling_params import SamplingParams

MOST_TOKENS = 128
CONTEXT = 384
"""Tokens of prompt and answer together."""
MOST_LOAD = 64


class Settings(BaseModel):
    """A run; the same settings give the same bits."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(min_length=1, max_length=4000)]
    completions: Annotated[int, Field(ge=1, le=64)] = 12
    """How often the prompt is answered."""
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] = 48
    load: Annotated[int, Field(ge=1, le=MOST_LOAD)] = 16
    """The most requests that share a batch; all but one of them, or half, are other people's."""
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0
    """Of every completion alike. A web page's numbers are exact below 2**53."""

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed)
