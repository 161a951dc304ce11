"""What the host tells a step in one array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdet.engine import packed
from jaxdet.engine.packed import layout_of, pack, unpack

TREE = {
    "ids": np.arange(8200, dtype=np.int32),
    "tables": np.arange(64 * 66, dtype=np.int32).reshape(64, 66),
    "nothing": None,
    "empty": np.zeros((0, 66), np.int32),
    "bits": np.array([[7, 2**32 - 1]], np.uint32),
    "share": np.array([0.5, -0.0, np.nan], np.float32),
}


def starts() -> list[int]:
    """Where the parts begin, in bytes, as XLA is told."""
    layout = layout_of(TREE)
    program = jax.make_jaxpr(lambda vector: unpack(vector, layout))(jnp.asarray(pack(TREE)))
    return [4 * e.params["start_indices"][0] for e in program.eqns if e.primitive.name == "slice"]


def test_round_trip():
    found = unpack(jnp.asarray(pack(TREE)), layout_of(TREE))
    assert jax.tree.structure(found) == jax.tree.structure(TREE)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(TREE), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == y.tobytes()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), TREE)
    assert pack(shapes).shape == pack(TREE).shape


def test_parts_lie_where_a_kernel_can_read_them(monkeypatch):
    """XLA gives Mosaic a part's own address, which must be a multiple of 256 bytes."""
    assert len(starts()) >= 4 and all(start % 256 == 0 for start in starts())
    monkeypatch.setattr(packed, "ALIGN", 1)  # control
    assert any(start % 256 for start in starts())


def test_only_numbers_of_32_bits():
    with pytest.raises(ValueError, match="use int32, uint32 or float32"):
        layout_of({"x": np.zeros(3, np.int64)})
