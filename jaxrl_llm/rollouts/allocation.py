"""How many rollouts each prompt gets: where the gradient is uncertain, more (DynaMO, 2602.19208).

A prompt whose gradient has the standard deviation σ_i per rollout adds σ_i²/n_i to the variance of a batch's
gradient. Under a fixed total the least variance has n_i proportional to σ_i (Neyman), (Σσ)²/total against
M·Σσ²/total of equal shares. For rewards 0 and 1 the proxy is the success rate's own deviation, √(p(1−p)).

Everything here is plain numpy on the host and exact: totals are met, bounds are kept, and equal arguments
give equal results. Advantages take groups of any size.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

PRIORITIES = ("variance", "success_rate")


def success_variance(successes: ArrayLike, trials: ArrayLike) -> Floats:
    """f64[M] k(G−k)/(G(G−1)), unbiased for p(1−p) of k successes in G independent trials.

    Example:
      >>> success_variance([0, 1, 2], [4, 4, 4]).tolist()  # 2·2/(4·3)
      [0.0, 0.25, 0.3333333333333333]

    Raises:
      ValueError: fewer than two trials, or more successes than trials.
    """
    k, g = np.broadcast_arrays(np.asarray(successes, np.float64), np.asarray(trials, np.float64))
    if np.any(g < 2):
        raise ValueError(f"{int(np.sum(g < 2))} prompts have fewer than 2 trials: explore them first")
    if np.any((k < 0) | (k > g)):
        raise ValueError("successes must be from 0 to trials")
    return k * (g - k) / (g * (g - 1))


def neyman_allocation(deviation: ArrayLike, total: int, *, low: int, high: int) -> Counts:
    """Rollouts in proportion to the standard deviation of a prompt's gradient, within bounds.

    n_i = clip(c·σ_i, low, high) with c such that Σn_i = total, then rounded by largest remainder

    Before rounding this has the least Σσ_i²/n_i of all allocations within the bounds. A prompt with σ = 0
    gets `low`, unless all others are at `high` already; such prompts share what is left evenly. Equal σ get
    equal shares, scaling all σ changes nothing, and a larger σ never gets fewer rollouts.

    Example:
      >>> neyman_allocation([1.0, 2.0, 3.0], 12, low=1, high=24).tolist()
      [2, 4, 6]
      >>> neyman_allocation([1.0, 2.0, 3.0], 12, low=1, high=5).tolist()  # 3 at 5, the others 7/3 and 14/3
      [2, 5, 5]
      >>> neyman_allocation([0.0, 1.0], 6, low=1, high=4).tolist()
      [2, 4]

    Args:
      deviation: f[M] σ, finite and at least 0, in any unit.
      total: rollouts to give.
      low, high: bounds of each prompt's rollouts.

    Returns:
      i64[M], which add up to the total. Remainders equal to nine digits go to the larger σ, then to the
      earlier prompt.

    Raises:
      ValueError: a total that the bounds don't allow, bounds out of order, or a σ that is negative or not
        finite.
    """
    sigma = np.asarray(deviation, np.float64)
    if sigma.ndim != 1 or not np.all(np.isfinite(sigma) & (sigma >= 0)):
        raise ValueError(f"deviation {sigma.tolist()} must be a vector of finite numbers of at least 0")
    _check_bounds(len(sigma), total, low, high)
    if len(sigma) == 0:
        return np.zeros(0, np.int64)
    sigma = sigma / max(sigma.max(), np.finfo(float).tiny)
    positive = sigma > 0
    left = total - high * int(positive.sum())  # were all of those at high
    if left >= low * int((~positive).sum()):
        share = np.where(positive, float(high), left / max((~positive).sum(), 1))
    else:
        c = _scale(sigma[positive], total - low * int((~positive).sum()), low, high)
        share = np.clip(c * sigma, low, high)
    return _rounded(share, total, sigma)


def _scale(sigma: Floats, total: int, low: int, high: int) -> float:
    """c with Σclip(c·σ, low, high) = total: the sum is linear in c between the c at which a bound is met."""

    def given(c: float) -> float:
        return float(np.clip(c * sigma, low, high).sum())

    kinks = np.sort(np.concatenate([low / sigma, high / sigma]))
    first, last = 0, len(kinks) - 1
    while last - first > 1:  # bisection: given(kinks[first]) ≤ total ≤ given(kinks[last])
        middle = (first + last) // 2
        first, last = (middle, last) if given(kinks[middle]) <= total else (first, middle)
    c = float(kinks[first])
    slope = sigma[(low / sigma <= kinks[first]) & (high / sigma >= kinks[last])].sum()
    return c + (total - given(c)) / slope if slope > 0 else c


def _rounded(share: Floats, total: int, weight: Floats) -> Counts:
    """Whole numbers by largest remainder: every floor, and one more for the largest fractions."""
    counts = np.floor(share).astype(np.int64)
    fraction = np.round(share - counts, 9)  # so that equal shares do not part ways by rounding
    order = np.lexsort((np.arange(len(share)), -weight, -fraction))
    counts[order[: total - int(counts.sum())]] += 1
    return counts


def _check_bounds(prompts: int, total: int, low: int, high: int) -> None:
    if not 0 <= low <= high:
        raise ValueError(f"low={low} and high={high} must be in this order and not negative")
    if not prompts * low <= total <= prompts * high:
        raise ValueError(
            f"total={total} is not between {prompts}·{low} and {prompts}·{high}: change it or the bounds"
        )


def variance_allocation(
    successes: ArrayLike, trials: ArrayLike, total: int, *, low: int, high: int, power: float = 0.5
) -> Counts:
    """`neyman_allocation` by the prompts' success counts: σ_i = P_i^power, P of `success_variance`.

    Example:
      >>> variance_allocation([0, 2, 4], [4, 4, 4], 12, low=2, high=8).tolist()
      [2, 8, 2]

    Args:
      successes, trials: i[M] so far, at least two trials each.
      total, low, high: as `neyman_allocation`.
      power: 0.5 for the standard deviation, as the theory asks; 1 for the variance, as in the authors' code.

    Raises:
      ValueError: as `success_variance` and `neyman_allocation`, or a power that is not above 0.
    """
    if power <= 0:
        raise ValueError(f"power={power} must be above 0")
    return neyman_allocation(success_variance(successes, trials) ** power, total, low=low, high=high)


def dynamo_priorities(
    successes: ArrayLike,
    trials: ArrayLike,
    *,
    form: str = "variance",
    initial_budget: int = 4,
    solved: float = 0.85,
    least: float = 0.01,
) -> Floats:
    """How much the released DynaMO wants of each prompt, from its success counts.

    variance: max(P + 1e-6·(1 − k/G), least), P of `success_variance`; 0 below `initial_budget` trials
    success_rate: max(4·(k/G)·(1 − k/G), least); 1 without a trial

    and in both `least` for prompts that are solved, k/G ≥ `solved`. So a prompt solved 7 times of 8 has 0.01
    where one solved once of 8 has 0.125, although their deviations are the same.

    Example:
      >>> dynamo_priorities([1, 7, 0], [8, 8, 2]).round(3).tolist()
      [0.125, 0.01, 0.0]

    Args:
      successes, trials: i[M] so far.
      form: one of `PRIORITIES`, as of two modules of the authors' code.
      initial_budget: trials before a prompt competes, at least 2 (variance).
      solved: success rate from which a prompt counts as solved.
      least: priority of what is solved or hopeless.

    Returns:
      f64[M].

    Raises:
      ValueError: unknown form, or more successes than trials.
    """
    if form not in PRIORITIES:
        raise ValueError(f"unknown form {form!r}; one of {', '.join(PRIORITIES)}")
    k, g = np.broadcast_arrays(np.asarray(successes, np.float64), np.asarray(trials, np.float64))
    if np.any((k < 0) | (k > g)):
        raise ValueError("successes must be from 0 to trials")
    rate = k / np.maximum(g, 1)
    if form == "variance":
        wanted = success_variance(k, np.maximum(g, 2)) + 1e-6 * (1 - rate)
        is_known, unknown = g >= max(initial_budget, 2), 0.0
    else:
        wanted = 4 * rate * (1 - rate)
        is_known, unknown = g > 0, 1.0
    return np.where(is_known, np.where(rate >= solved, least, np.maximum(wanted, least)), unknown)


def dynamo_allocation(
    trials: ArrayLike,
    priorities: ArrayLike,
    total: int,
    *,
    low: int = 4,
    high: int = 24,
    initial_budget: int = 4,
) -> Counts:
    """The released DynaMO's allocation: a quota for new prompts, `low` for all, the rest by priority.

    1. Every prompt gets `low`; one with fewer than `initial_budget` trials what it lacks of that, if more.
    2. What is left is shared in proportion to the priorities: floors, then one more for the largest
       fractions, none beyond `high`, and again until nothing is left.
    3. What no prompt of positive priority can take is shared evenly.

    Where the total does not reach for 1, quotas beyond `low` are met in proportion.

    Example:
      >>> dynamo_allocation([8, 8, 0], [0.125, 0.01, 0.0], 24, low=4, high=12).tolist()  # 12 left: 12·0.926
      [12, 8, 4]

    Args:
      trials: i[M] rollouts of each prompt so far.
      priorities: f[M], at least 0, of `dynamo_priorities`; the authors refresh them once per epoch.
      total: rollouts to give, taken to the nearest that the bounds allow.
      low, high: bounds of each prompt's rollouts.
      initial_budget: trials that a prompt is to have before it competes.

    Returns:
      i64[M], which add up to the total. No prompt exceeds `high`; the authors' fallback loop can.

    Raises:
      ValueError: bounds out of order, shapes that differ, or a priority that is negative or not finite.
    """
    g, priority = np.asarray(trials, np.int64), np.asarray(priorities, np.float64)
    if g.shape != priority.shape or g.ndim != 1:
        raise ValueError(f"trials {g.shape} and priorities {priority.shape} must be vectors of one length")
    if not np.all(np.isfinite(priority) & (priority >= 0)):
        raise ValueError("priorities must be finite and at least 0")
    if not 0 <= low <= high:
        raise ValueError(f"low={low} and high={high} must be in this order and not negative")
    total = int(np.clip(total, len(g) * low, len(g) * high))
    counts = np.full(len(g), low, np.int64)
    quota = np.clip(initial_budget - g, low, high)
    counts = _shared(counts, min(total, int(quota.sum())), quota - low, quota)
    counts = _shared(counts, total, priority, np.full_like(quota, high))
    return _shared(counts, total, np.ones(len(g)), np.full_like(quota, high))


def _shared(counts: Counts, total: int, weight: NDArray, most: Counts) -> Counts:
    """`counts` raised towards the total in proportion to the weights, none beyond `most`."""
    counts = counts.copy()
    while (left := total - int(counts.sum())) > 0:
        weight = np.where(counts < most, weight, 0.0)
        if not weight.any():
            break
        share = weight / weight.max()
        extra = _rounded(left * share / share.sum(), left, share)
        counts += np.minimum(extra, most - counts)
    return counts
