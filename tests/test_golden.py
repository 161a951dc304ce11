"""I5: this platform's bits are those recorded for this NUMERICS_VERSION."""

import json

import numpy as np
import op_digests
import pytest
from digests import DTYPES, GOLDEN, digest, digests

from jaxdet import NUMERICS_VERSION
from jaxdet.testing import FAMILIES, write_tiny_model
from pallas_kernels.backend import platform_key

REFRESH = "python tests/digests.py --update"


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


FAST = ("llama/float32", "gemma3_text/bfloat16")
MODELS = [f"{family}/{dtype}" for family in FAMILIES for dtype in DTYPES]


def assert_as_recorded(golden, entry: str, found: dict[str, str], of: str | None = None) -> None:
    key = platform_key()
    if key not in golden:
        pytest.skip(f"NO GOLDEN DIGESTS FOR {key}: bits are unchecked here; record them with `{REFRESH}`")
    assert golden[key]["numerics_version"] == NUMERICS_VERSION, (
        f"the digests are old; refresh them with `{REFRESH}`"
    )
    recorded = golden[key][entry] if of is None else golden[key][entry][of]
    changed = [name for name, value in recorded.items() if found.get(name) != value]
    assert not changed, (
        f"bits changed: {', '.join(changed)}. If that is meant, raise NUMERICS_VERSION in "
        f"pallas_kernels/numerics.py and run `{REFRESH}`"
    )
    assert found.keys() == recorded.keys()


def test_golden_digests_of_ops(golden):
    """Every op at real widths, where sums have several chunks and lanes."""
    assert_as_recorded(golden, "ops", op_digests.digests())


@pytest.mark.parametrize(
    "model", [pytest.param(m, marks=[] if m in FAST else pytest.mark.slow) for m in MODELS]
)
def test_golden_digests(golden, tmp_path, model):
    """Logits, samples and the values that lead to them, of a tiny model."""
    family, dtype = model.split("/")
    found = digests(write_tiny_model(tmp_path / family, family), dtype)
    assert_as_recorded(golden, "models", found, model)


def test_every_platform_has_this_version(golden):
    """A new NUMERICS_VERSION makes all old digests worthless: each must be recorded anew or removed."""
    assert {v["numerics_version"] for v in golden.values()} == {NUMERICS_VERSION}


def test_control_one_bit():
    """Negative control: the lowest bit of one value, the dtype and the shape are part of a digest."""
    value = np.ones((2, 3), np.float32)
    changed = value.copy()
    changed.view(np.uint32)[1, 2] ^= 1
    four = {digest(v) for v in (value, changed, value.view(np.int32), value.reshape(3, 2))}
    assert len(four) == 4 and digest(value.copy()) in four
