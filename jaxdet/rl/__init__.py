"""Training with the sampler's own kernels: the log-probabilities that the trainer sees are those that were sampled."""

from jaxdet.rl.comparison import Comparison, compare
from jaxdet.rl.gradients import GradientSums, accumulate
from jaxdet.rl.logprobs import logprobs
from jaxdet.rl.packing import MicroBatch, pack

__all__ = ["Comparison", "GradientSums", "MicroBatch", "accumulate", "compare", "logprobs", "pack"]
