"""What every row-wise TPU op is held to: a row's bits depend on that row alone."""

import numpy as np

POOL = 6
ROWS = (1, 3, 33, 300)
HOSTILE = (np.nan, np.inf, -np.inf, 1e30)


def bits(x):
    """The unsigned integers that hold x's bits."""
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def random(seed, shape, dtype):
    """Standard normal values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def error(what, found, exact):
    """The largest error relative to the largest value of `exact`, float64; `pytest -s` shows it."""
    found = np.asarray(found)
    worst = np.abs(found.astype(np.float64) - exact).max() / np.abs(exact).max()
    print(f"\nerror of {what} in {found.dtype}: {worst:.1e}")
    return worst


def assert_rows_independent(f, pool, counts=ROWS):
    """Rows of `pool` at random places among hostile ones, in batches of any size, keep the bits they have alone."""
    alone = np.concatenate([bits(f(pool[i : i + 1])) for i in range(len(pool))])
    rng = np.random.default_rng(0)
    for count in counts:
        picked, hostile = rng.integers(0, len(pool), count), rng.random(count) < 0.3
        x = pool[picked]
        x[hostile] = rng.choice(HOSTILE, (hostile.sum(), 1)).astype(pool.dtype)
        np.testing.assert_array_equal(bits(f(x))[~hostile], alone[picked][~hostile], err_msg=f"{count} rows")
