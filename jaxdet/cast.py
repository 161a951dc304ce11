"""Casts weights, and says so when a value does not fit."""

import ml_dtypes
import numpy as np

CHECKED_AT_ONCE = 2**20
"""Elements; a mask of a whole embedding would be as large as a layer."""
WIDER = {"float16": "use bfloat16 or float32", "bfloat16": "use float32"}


def cast(name: str, value: np.ndarray, dtype: np.typing.DTypeLike) -> np.ndarray:
    """`value` in `dtype`; itself if it has that dtype already.

    Raises:
        ValueError: a finite element overflows `dtype` (the tensor is named).
    """
    dtype = np.dtype(dtype)
    if value.dtype == dtype:
        return value
    with np.errstate(over="ignore"):
        out = value.astype(dtype)
    if ml_dtypes.finfo(value.dtype).max <= ml_dtypes.finfo(dtype).max:
        return out
    before, after = value.reshape(-1), out.reshape(-1)
    for start in range(0, before.size, CHECKED_AT_ONCE):
        part = slice(start, start + CHECKED_AT_ONCE)
        if (np.isfinite(before[part]) & ~np.isfinite(after[part])).any():
            remedy = WIDER.get(dtype.name, "fetch the model again")
            raise ValueError(f"tensor {name} holds values too large for {dtype.name}; {remedy}")
    return out
