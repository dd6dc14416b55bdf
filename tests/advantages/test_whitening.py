"""Batch statistics against numpy, over any cut, and whitening where nothing differs."""

from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.advantages import batch_statistics, merge_statistics, whiten, whiten_groups

N = 8
statistics_of = jax.jit(batch_statistics)


def test_against_numpy():
    rng = np.random.default_rng(0)
    x, mask = rng.normal(3, 2, (4, 5)).astype(np.float32), rng.random((4, 5)) > 0.4
    s, kept = batch_statistics(x, mask), x[mask]
    np.testing.assert_allclose(s.low + s.rise, kept.mean(), rtol=1e-6)
    for ddof in (0, 1):
        np.testing.assert_allclose(s.std(ddof), kept.std(ddof=ddof), rtol=1e-5)
        wanted = np.where(mask, (x - kept.mean()) / (kept.std(ddof=ddof) + 0.5), 0)
        np.testing.assert_allclose(whiten(x, s, mask, epsilon=0.5, ddof=ddof), wanted, rtol=1e-5, atol=1e-6)
    white = np.asarray(whiten(x, s, mask, epsilon=0.0))[mask]
    assert abs(white.mean()) < 1e-6 and white.std(ddof=1) == pytest.approx(1, rel=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    x=st.lists(st.floats(-1e3, 1e3), min_size=N, max_size=N),
    weight=st.lists(st.integers(0, 3), min_size=N, max_size=N),
    piece=st.lists(st.integers(0, 3), min_size=N, max_size=N),
    order=st.permutations(range(4)),
)
def test_any_cut_has_the_statistics_of_the_whole(x, weight, piece, order):
    """Pieces merged in any order, empty ones included, and each number as often as its weight says."""
    x, weight, piece = np.array(x), np.array(weight), np.array(piece)
    with jax.enable_x64(True):
        merged = reduce(merge_statistics, [statistics_of(x, piece == i, weight=weight) for i in order])
        whole = statistics_of(x, np.ones(N, bool), weight=weight)
    merged, whole = jax.tree.map(float, merged), jax.tree.map(float, whole)
    repeated = np.repeat(x, weight)
    assert merged.size == whole.size == len(repeated)
    if not len(repeated):
        return
    assert merged.low == whole.low == repeated.min() and merged.high == whole.high == repeated.max()
    scale = 1 + np.ptp(repeated)
    for s in (merged, whole):
        np.testing.assert_allclose(s.low + s.rise, repeated.mean(), rtol=0, atol=1e-12 * scale)
        np.testing.assert_allclose(s.squares / N, repeated.var() * len(repeated) / N, atol=1e-12 * scale**2)


@pytest.mark.parametrize("value", [0.7, 1 / 3, -1e8, 1e8 + 8, 0.0])
def test_equal_numbers_become_exactly_zero(value):
    """The mean of eight floats 0.7 is not 0.7, and 0 over 0 is no number; one number differs from none."""
    x = jnp.full(N, value, jnp.float32)
    for mask in (np.ones(N, bool), np.arange(N) < 3, np.arange(N) == 5, np.zeros(N, bool)):
        pieces = (
            batch_statistics(x, mask & (np.arange(N) % 2 == 0)),
            batch_statistics(x, mask & (np.arange(N) % 2 == 1)),
        )
        for s in (batch_statistics(x, mask), merge_statistics(*pieces)):
            assert np.all(whiten(x, s, mask, epsilon=0.0) == 0)


def test_large_numbers_keep_their_differences():
    """1e8 + 8·(0, 1, …, 4): deviations −16 to 16 and variance 64·2.5, which a float32 mean has lost."""
    x, mask = np.float32(1e8) + 8 * np.arange(5, dtype=np.float32), np.ones(5, bool)
    halves = batch_statistics(x, mask & (np.arange(5) < 2)), batch_statistics(x, mask & (np.arange(5) >= 2))
    for s in (batch_statistics(x, mask), merge_statistics(*halves)):
        np.testing.assert_allclose(whiten(x, s, mask), np.arange(-2, 3) / 2.5**0.5, rtol=1e-6)


def test_groups_of_zeros_stay_zero_and_count():
    """x = 1, −1, 3 and a group of two zeros: over five numbers the mean is 0.6, the variance
    (0.16 + 2.56 + 5.76 + 0.36 + 0.36)/4 = 2.3. The 0 in group 9 is a number like any other."""
    x, group = jnp.array([1.0, 0.0, -1.0, 0.0, 3.0]), jnp.array([9, 4, 9, 4, 7])
    got = whiten_groups(x, group, jnp.ones(5, bool), epsilon=0.0)
    np.testing.assert_allclose(got, np.array([0.4, 0, -1.6, 0, 2.4]) / 2.3**0.5, rtol=1e-6)
    assert got[1] == got[3] == 0
    per_turn = whiten_groups(jnp.stack([x, x.at[1].set(2)], 1), group, jnp.ones((5, 2), bool), epsilon=0.0)
    assert np.all(per_turn != 0)  # a number in one turn of the group, and all of it takes part


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"x \(3,\), mask \(2,\)"):
        batch_statistics(jnp.zeros(3), jnp.ones(2, bool))
    s = batch_statistics(jnp.zeros(3), jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"x \(3,\), mask \(2,\)"):
        whiten(jnp.zeros(3), s, jnp.ones(2, bool))
