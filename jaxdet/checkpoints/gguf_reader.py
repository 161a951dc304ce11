"""Reads a GGUF file's metadata and tensor list with the `gguf` package, whatever the file's state."""

import mmap
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGUFValueType

MAX_ARRAY = 2**22
MAX_TENSORS = 2**17
BLOCK_BYTES = 2**22


class GGUFFile:
    """Metadata as Python values and tensors as views of the mapped file.

    Raises:
        ValueError: the file is no GGUF file, damaged or cut short.
    """

    def __init__(self, path: Path):
        try:
            reader = _CheckedReader(path)
            self.fields: dict[str, Any] = {key: _value(field) for key, field in reader.fields.items()}
        except (ValueError, LookupError, OverflowError, MemoryError, TypeError, struct.error):
            raise ValueError(f"{path} is no GGUF file, damaged or cut short; fetch it again") from None
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._map: mmap.mmap | None = getattr(reader.data, "_mmap", None)

    def dequantise(self, name: str) -> np.ndarray:
        """float32, in the shape of the file's rows; the file's pages are given back."""
        tensor = self.tensors[name]
        out = np.empty(tuple(int(n) for n in reversed(tensor.shape)), np.float32)
        step = max(1, BLOCK_BYTES // max(1, out[:1].nbytes))
        for row in range(0, len(out), step):
            out[row : row + step] = gguf.dequantize(tensor.data[row : row + step], tensor.tensor_type)
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
        return out


def _value(field: gguf.ReaderField) -> Any:
    return field.parts[-1].tolist() if field.types[:1] == [GGUFValueType.ARRAY] else field.contents()


class _CheckedReader(gguf.GGUFReader):
    """The package's reader trusts the file's counts: a damaged one makes it loop over nothing for hours.

    It also keeps two NumPy arrays per vocabulary entry (150 MB for 49k tokens); here an array is one.
    """

    def _get(self, offset, dtype, count=1, override_order=None):
        offset, count = int(offset), int(count)
        if offset + count * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError("cut short")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs, raw_type):
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        element, start = GGUFValueType(kind[0]), orig_offs + 12
        if element == GGUFValueType.ARRAY or length[0] > MAX_ARRAY:
            raise ValueError("nested or endless array")
        if element == GGUFValueType.STRING:
            values, end = self._strings(start, int(length[0]))
        else:
            values = self._get(start, self.gguf_scalar_to_np[element], length[0])
            end = start + values.nbytes
        return end - orig_offs, [kind, length, values], [2], [GGUFValueType.ARRAY, element]

    def _strings(self, at: int, count: int) -> tuple[np.ndarray, int]:
        """`count` strings from offset `at`, and the offset behind them."""
        raw, strings = memoryview(self.data), np.empty(count, object)
        for i in range(count):
            (size,) = struct.unpack_from("<Q", raw, at)
            at += 8 + size
            if at > len(raw):
                raise ValueError("cut short")
            strings[i] = str(raw[at - size : at], "utf-8")
        return strings, at

    def _build_tensor_info(self, offs, count):
        if self.byte_order != "I" or count > MAX_TENSORS:
            raise ValueError("other byte order or endless tensor list")
        return super()._build_tensor_info(offs, count)

    def _build_tensors(self, start_offs, fields):
        super()._build_tensors(start_offs, fields)
        end = start_offs
        for tensor in sorted(self.tensors, key=lambda t: t.data_offset):
            if tensor.data_offset < end or tensor.n_elements == 0 or tensor.shape.size == 0:
                raise ValueError("empty or overlapping tensors")
            end = tensor.data_offset + tensor.n_bytes
