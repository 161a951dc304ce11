"""Finds the module that implements an op on a backend."""

import functools
import importlib
import importlib.util
from types import ModuleType

from pallas_kernels.backend import resolve

MODULES = {"xla": "xla", "mosaic_gpu": "mosaic_gpu_sm90", "mosaic_tpu": "mosaic_tpu"}


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
