"""BNPO: its density, the fit of its parameters, and what it is at fixed ones."""

import math
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import (
    batch_statistics,
    beta_parameters,
    bnpo,
    dr_grpo,
    grpo,
    merge_statistics,
    success_rate_statistics,
)
from jaxrl_llm.losses import finalize

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)

# Success rates ¼, ¾ and ½, in mixed order, and one group of a single row.
REWARDS = jnp.array([1.0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 1])
GROUP = jnp.array([3, 8, 3, 8, 8, 3, 8, 3, 5, 5, 2])
RATE = np.array([0.25, 0.75, 0.25, 0.75, 0.75, 0.25, 0.75, 0.25, 0.5, 0.5, 1])


def density(p, a, b):
    """Beta(p; a, b) by gamma functions."""
    return math.gamma(a + b) / math.gamma(a) / math.gamma(b) * p ** (a - 1) * (1 - p) ** (b - 1)


@pytest.mark.parametrize("a, b", [(0.0, 0.0), (1.5, 1.5), (0.6, 2.4), (12.0, 3.0)])
def test_the_baseline_over_the_density(a, b):
    got, metrics = bnpo(REWARDS, GROUP, parameters=(a, b))
    wanted = [(r - p) / density(p, 1 + a / 3, 1 + b / 3) if p < 1 else 0 for r, p in zip(REWARDS, RATE)]
    close(got, wanted)
    assert got[-1] == 0 and finalize(metrics)["bnpo/a"] == pytest.approx(a)


def test_reductions():
    """Beta(1, 1) is 1. Beta(p; 3/2, 3/2) = (8/π)·√(p(1−p)), and that root is the population's std."""
    close(bnpo(REWARDS, GROUP, parameters=(0.0, 0.0))[0], dr_grpo(REWARDS, GROUP)[0])
    standardised, _ = grpo(REWARDS, GROUP, epsilon=0.0, ddof=0)
    close(bnpo(REWARDS, GROUP, parameters=(1.5, 1.5))[0], math.pi / 8 * standardised)


def test_the_fit_has_the_rates_mean_and_variance():
    """Of Beta(a, b): a/(a+b) and ab/((a+b)²(a+b+1)); every group counts once, whatever its size."""
    rates = jnp.array([0.2, 0.3, 0.55, 0.4, 0.7])
    a, b = (float(x) for x in beta_parameters(batch_statistics(rates, jnp.ones(5, bool))))
    assert a / (a + b) == pytest.approx(float(rates.mean()), rel=1e-5)
    assert a * b / (a + b) ** 2 / (a + b + 1) == pytest.approx(float(np.var(rates, ddof=1)), rel=1e-4)
    s = success_rate_statistics(REWARDS, GROUP)
    assert float(s.size) == 4 and float(s.low + s.rise) == pytest.approx((0.25 + 0.75 + 0.5 + 1) / 4)


def test_pieces_cut_between_groups():
    whole, _ = bnpo(REWARDS, GROUP)
    pieces = [np.isin(GROUP, [3, 2]), np.isin(GROUP, [8, 5])]
    parameters = beta_parameters(
        merge_statistics(*(success_rate_statistics(REWARDS, GROUP, p) for p in pieces))
    )
    for piece in pieces:
        part, _ = bnpo(REWARDS, GROUP, piece, parameters=parameters)
        close(part, np.where(piece, whole, 0))


def test_rates_that_no_beta_fits():
    """One group, groups that are all right or all wrong, and a spread as wide as it can be: Beta(1, 1).
    Equal rates: as narrow as the largest concentration allows, c·(½, ½)."""
    ones, halves = jnp.ones(4), jnp.array([1.0, 0, 1, 0])
    pair = jnp.array([0, 0, 1, 1])
    for rewards, group in [(halves, jnp.zeros(4, int)), (ones, pair), (0 * ones, pair), (1.0 - pair, pair)]:
        a, b = beta_parameters(success_rate_statistics(rewards, group))
        assert float(a) == float(b) == 0
        close(bnpo(rewards, group)[0], dr_grpo(rewards, group)[0])
    a, b = beta_parameters(success_rate_statistics(halves, pair), max_concentration=60.0)
    close([a, b], [30, 30])
    got, _ = bnpo(halves, pair)
    assert np.all(np.sign(got) == [1, -1, 1, -1]) and np.all(np.abs(got) < 0.5)


def test_bounds_are_a_change_of_scale():
    """Rewards of ±1 between −1 and 1 are those of 0 and 1."""
    got, metrics = bnpo(2 * REWARDS - 1, GROUP, bounds=(-1.0, 1.0))
    close(got, bnpo(REWARDS, GROUP)[0])
    assert finalize(metrics)["reward"] == pytest.approx(float(jnp.mean(2 * REWARDS - 1)))


def test_the_weight_has_a_bound():
    """At a = b = 300 the density at ¼ and ¾ is tiny; at ½ it is not."""
    got, metrics = bnpo(REWARDS[:-1], GROUP[:-1], parameters=(300.0, 300.0), max_weight=1e3)
    close(np.abs(got[:8]), 1e3 * np.where(REWARDS[:8] > 0, 1 - RATE[:8], RATE[:8]))
    assert np.all(np.abs(got[8:]) < 0.5) and finalize(metrics)["bnpo/clamped_ratio"] == pytest.approx(2 / 3)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"bounds=\(1.0, 0.0\)"):
        bnpo(REWARDS, GROUP, bounds=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"group \(2,\)"):
        success_rate_statistics(REWARDS, GROUP[:2])
