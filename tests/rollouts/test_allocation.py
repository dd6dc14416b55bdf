"""Allocations against brute force over all integer allocations, and every property that DynaMO's have."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.rollouts.allocation import (
    PRIORITIES,
    dynamo_allocation,
    dynamo_priorities,
    neyman_allocation,
    success_variance,
    variance_allocation,
)

many = settings(max_examples=150, deadline=None, derandomize=True)
sigmas = st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.7, 1.0, 1.0, 3.0, 40.0]), min_size=1, max_size=6)


@st.composite
def problems(draw, sigma=sigmas):
    """σ, bounds, and a total that they allow."""
    deviation = draw(sigma)
    low = draw(st.integers(0, 4))
    high = low + draw(st.integers(0, 8))
    total = draw(st.integers(low * len(deviation), high * len(deviation)))
    return deviation, total, low, high


def exact_share(sigma, total, low, high):
    """The real-valued optimum by trying which prompts stand at which bound; all σ positive, low > 0.

    Of all choices that keep the bounds the one of least Σσ²/n: no bisection, no multiplier.
    """
    best, best_variance = None, np.inf
    for state in itertools.product(("low", "free", "high"), repeat=len(sigma)):
        n = np.select([np.array(state) == "low", np.array(state) == "high"], [low, high], 0.0)
        free = np.array(state) == "free"
        left = total - n.sum()
        if free.any():
            n[free] = left * sigma[free] / sigma[free].sum()
        elif abs(left) > 1e-9:
            continue
        if np.all(n >= low - 1e-9) and np.all(n <= high + 1e-9) and np.sum(sigma**2 / n) < best_variance:
            best, best_variance = n, np.sum(sigma**2 / n)
    return best


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sigma=st.lists(st.floats(0.05, 5), min_size=1, max_size=4),
    low=st.integers(1, 3),
    width=st.integers(0, 5),
    share=st.floats(0, 1),
)
def test_nearest_to_the_optimum_of_all_integer_allocations(sigma, low, width, share):
    """Largest remainder is the integer allocation within the bounds that is nearest to the optimum."""
    sigma, high = np.array(sigma), low + width
    total = round(len(sigma) * (low + share * width))
    got = neyman_allocation(sigma, total, low=low, high=high)
    wanted = exact_share(sigma, total, low, high)
    every = np.array(list(itertools.product(range(low, high + 1), repeat=len(sigma))))
    every = every[every.sum(1) == total]
    distance = np.sum((every - wanted) ** 2, axis=1)
    assert np.sum((got - wanted) ** 2) == pytest.approx(distance.min(), abs=1e-6)
    assert np.all(np.abs(got - wanted) < 1 + 1e-6)
    # no integer allocation can have less variance than the optimum
    assert np.sum(sigma**2 / wanted) <= np.min(np.sum(sigma**2 / every, axis=1)) + 1e-9


def test_variance_of_the_optimum():
    """σ = 1, 2, 5 with 16 rollouts: (Σσ)²/16 = 4 against 3·Σσ²/16 = 5.625 of equal shares."""
    sigma = np.array([1.0, 2.0, 5.0])
    n = neyman_allocation(sigma, 16, low=1, high=16)
    assert n.tolist() == [2, 4, 10]
    assert np.sum(sigma**2 / n) == 4 < np.sum(sigma**2 / (16 / 3)) == pytest.approx(5.625)


@many
@given(problem=problems())
def test_totals_bounds_and_order(problem):
    """Exact totals within bounds; equal σ differ by one at most, a larger one never gets fewer."""
    sigma, total, low, high = problem
    n = neyman_allocation(sigma, total, low=low, high=high)
    assert n.sum() == total and n.min() >= low and n.max() <= high and n.dtype == np.int64
    for i, j in itertools.permutations(range(len(sigma)), 2):
        if sigma[i] == sigma[j]:
            assert abs(n[i] - n[j]) <= 1
        if sigma[i] > sigma[j]:
            assert n[i] >= n[j]
        if sigma[i] == 0 and n[i] > low:
            assert n[j] == high or sigma[j] == 0
    for scale in (1e-9, 3.0, 7e11):
        np.testing.assert_array_equal(
            neyman_allocation(scale * np.array(sigma), total, low=low, high=high), n
        )


@many
@given(problem=problems(), which=st.integers(0, 5), factor=st.floats(1, 10))
def test_raising_one_sigma_never_lowers_its_share(problem, which, factor):
    sigma, total, low, high = problem
    which %= len(sigma)
    raised = np.array(sigma)
    raised[which] = raised[which] * factor + 0.01
    before, after = (neyman_allocation(s, total, low=low, high=high)[which] for s in (sigma, raised))
    assert after >= before


@pytest.mark.parametrize("unit", [1, 0.1, 0.7, 1.1, 1e-5, 1 / 3])
def test_equal_remainders_go_to_the_larger_sigma(unit):
    """2.5 and 7.5 in any unit, which has them a rounding error apart."""
    assert neyman_allocation([unit, 3 * unit], 10, low=1, high=24).tolist() == [2, 8]
    assert neyman_allocation([3 * unit, unit], 10, low=1, high=24).tolist() == [8, 2]


def test_equal_sigma_is_uniform_and_zero_is_low():
    assert neyman_allocation([0.3] * 4, 32, low=1, high=24).tolist() == [8] * 4
    assert neyman_allocation([0.0] * 4, 32, low=1, high=24).tolist() == [8] * 4
    assert neyman_allocation([0.0, 1.0, 2.0], 11, low=2, high=8).tolist() == [2, 3, 6]
    assert neyman_allocation([0.0, 1.0], 6, low=1, high=4).tolist() == [2, 4]  # the other is at high
    assert neyman_allocation([1e-300, 1e300], 10, low=1, high=9).tolist() == [1, 9]
    assert neyman_allocation([], 0, low=1, high=2).tolist() == []


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("trials", [2, 5, 9])
def test_success_variance_is_unbiased(p, trials):
    """Over all numbers of successes: the mean is p(1 − p)."""
    k = np.arange(trials + 1)
    binomial = np.array([np.prod([(trials - i) / (i + 1) for i in range(j)]) for j in k])
    chance = binomial * p**k * (1 - p) ** (trials - k)
    assert chance @ success_variance(k, trials) == pytest.approx(p * (1 - p))


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_most_for_prompts_solved_half_the_time(power):
    """Of 8 trials: symmetric, rising to k = 4 and falling from there; power 1 leans further to the middle."""
    k = np.arange(9)
    n = variance_allocation(k, np.full(9, 8), 400, low=1, high=200, power=power)
    assert np.argmax(n) == 4 and np.all(np.diff(n[:5]) > 0) and np.all(np.diff(n[4:]) < 0)
    assert np.all(np.abs(n - n[::-1]) <= 1)
    share = success_variance(k, 8) ** power
    np.testing.assert_allclose(n[1:8], (398 * share / share.sum())[1:8], atol=1)  # two have the least, 1


def test_power_by_hand():
    """P = 4·4/56 = 2/7 and 1·7/56 = 1/8: ratio 16/7 with power 1, its root 1.512 with power ½."""
    for power, ratio in ((1.0, 16 / 7), (0.5, (16 / 7) ** 0.5)):
        n = variance_allocation([4, 1], [8, 8], 10_000, low=1, high=10_000, power=power)
        assert n[0] / n[1] == pytest.approx(ratio, rel=1e-3)


def test_released_priorities():
    """k of 8: P + 1e-6(1 − k/8) up to k = 6; 7 of 8 is above 0.85, so 0.01 although P is that of 1 of 8.

    So these priorities are not monotone in P, and of prompts with P = 0 the unsolved one wants as much.
    """
    k = np.arange(9)
    got = dynamo_priorities(k, np.full(9, 8))
    wanted = k * (8 - k) / 56 + 1e-6 * (1 - k / 8)
    np.testing.assert_allclose(got[1:7], wanted[1:7], rtol=1e-12)
    assert got[0] == got[7] == got[8] == 0.01 and got[1] == pytest.approx(0.125, rel=1e-4)
    assert dynamo_priorities([1, 1, 0, 1], [3, 4, 0, 1]).tolist() == [0, pytest.approx(0.25, rel=1e-4), 0, 0]
    rates = dynamo_priorities([0, 0, 2, 7], [0, 4, 4, 8], form="success_rate")
    assert rates.tolist() == [1, 0.01, 1, 0.01]  # unseen, hopeless, 4·½·½, solved


def test_released_allocation_by_hand():
    """Quota, floor, largest remainder, cap and again.

    20 − 2·4 = 12 left; 12·(3, 1)/4 = 9 and 3, of which the first takes 6 (its cap of 10); the second takes 3
    and, in the next round, the other 3.
    """
    assert dynamo_allocation([8, 8], [0.3, 0.1], 20, low=4, high=10).tolist() == [10, 10]
    assert dynamo_allocation([8, 8], [0.3, 0.1], 16, low=4, high=12).tolist() == [10, 6]
    # 13 − 8 = 5: 3.75 and 1.25, the larger fraction gets the one that floors leave
    assert dynamo_allocation([8, 8], [0.3, 0.1], 13, low=4, high=12).tolist() == [8, 5]
    # a prompt with 2 of 8 trials gets 6 first, then 13 − 6 − 4 = 3 by priority
    assert dynamo_allocation([2, 8], [0.0, 0.1], 13, low=4, high=12, initial_budget=8).tolist() == [6, 7]
    # quotas of 8 each beyond what 14 allow: 4 each first, the other 6 in proportion
    assert dynamo_allocation([0, 0], [0.0, 0.0], 14, low=4, high=12, initial_budget=8).tolist() == [7, 7]
    # quotas of 8 and 4 of 10: 2 each first, then 6 in the proportion 6 : 2, the half to the larger one
    assert dynamo_allocation([0, 4], [0.0, 0.0], 10, low=2, high=12, initial_budget=8).tolist() == [7, 3]
    # nobody of positive priority has room: evenly, within the caps
    assert dynamo_allocation([9, 9, 9], [1.0, 0.0, 0.0], 22, low=4, high=8).tolist() == [8, 7, 7]


@many
@given(
    counts=st.lists(st.tuples(st.integers(0, 30), st.floats(0, 1)), max_size=7),
    per_prompt=st.integers(0, 30),
    low=st.integers(0, 8),
    width=st.integers(0, 20),
    budget=st.integers(0, 12),
    form=st.sampled_from(PRIORITIES),
)
def test_released_allocation_properties(counts, per_prompt, low, width, budget, form):
    """The total to which the bounds take it, exactly; caps never exceeded; quotas met where they can be."""
    trials = np.array([g for g, _ in counts], np.int64)
    successes = np.array([int(g * rate) for g, rate in counts], np.int64)
    high, total, size = low + width, per_prompt * len(counts), len(counts)
    priorities = dynamo_priorities(successes, trials, form=form, initial_budget=budget)
    n = dynamo_allocation(trials, priorities, total, low=low, high=high, initial_budget=budget)
    assert n.sum() == np.clip(total, low * size, high * size)
    assert np.all(n >= low) and np.all(n <= high)
    quota = np.clip(budget - trials, low, high)
    if quota.sum() <= n.sum():
        assert np.all(n >= quota)
    else:
        assert np.all(n <= quota)


def test_uniform_priorities_are_grpo():
    for priority in (0.2, 0.0):
        assert dynamo_allocation([9] * 4, [priority] * 4, 32).tolist() == [8] * 4


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: neyman_allocation([1.0, 1.0], 1, low=1, high=4), "total=1 is not between 2·1 and 2·4"),
        (lambda: neyman_allocation([1.0, 1.0], 9, low=1, high=4), "total=9"),
        (lambda: neyman_allocation([1.0], 4, low=5, high=4), "low=5 and high=4"),
        (lambda: neyman_allocation([1.0], 0, low=-1, high=4), "low=-1"),
        (lambda: neyman_allocation([-1.0], 4, low=1, high=4), "at least 0"),
        (lambda: neyman_allocation([np.nan], 4, low=1, high=4), "finite"),
        (lambda: success_variance([0, 1], [1, 4]), "1 prompts have fewer than 2 trials: explore them"),
        (lambda: success_variance([5], [4]), "successes must be from 0 to trials"),
        (lambda: variance_allocation([1], [4], 4, low=1, high=4, power=0.0), r"power=0\.0"),
        (lambda: dynamo_priorities([1], [4], form="entropy"), "form 'entropy'; one of variance"),
        (lambda: dynamo_priorities([5], [4]), "successes must be"),
        (lambda: dynamo_allocation([4], [1.0, 1.0], 4), r"trials \(1,\) and priorities \(2,\)"),
        (lambda: dynamo_allocation([4], [-1.0], 4), "priorities must be finite"),
        (lambda: dynamo_allocation([4], [1.0], 4, low=5, high=4), "low=5"),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
