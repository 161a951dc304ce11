"""Finds the module that implements an op, or its gradient, on a backend."""

import functools
import importlib
import importlib.util
from types import ModuleType

from pallas_kernels.backend import resolve

MODULES = {"xla": "xla", "mosaic_gpu": "mosaic_gpu_sm90", "mosaic_tpu": "mosaic_tpu"}
BACKWARD_MODULES = {"xla": "backward_xla", "mosaic_gpu": "backward_sm90", "mosaic_tpu": "backward_xla"}


@functools.cache
def load(op: str, backend: str | None) -> ModuleType:
    """The module `pallas_kernels.<op>.<backend's file>`.

    Raises:
        NotImplementedError: that backend has no kernel for this op; never another backend in its place.
    """
    name = resolve(backend)
    module = f"pallas_kernels.{op}.{MODULES[name]}"
    if importlib.util.find_spec(module) is None:
        raise NotImplementedError(f"backend={name!r} has no {op} kernel; use backend='xla'")
    return importlib.import_module(module)


@functools.cache
def load_backward(op: str, backend: str | None) -> ModuleType:
    """The module with the parts of the op's gradient that are a backend's own; TPUs share the `xla` backend's."""
    return importlib.import_module(f"pallas_kernels.{op}.{BACKWARD_MODULES[resolve(backend)]}")
