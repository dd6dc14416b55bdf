"""The inputs that every library gets, and what a case is. Imports numpy alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

N, T, V, H = 8, 6, 5, 3
EMPTY_ROW = 5
PAIRS = N // 2
"""Preference losses take the first half of the rows for chosen, the second for rejected."""


class Case(NamedTuple):
    """One function of a library at one setting.

    Attributes:
      run: of the inputs and options by name, arrays of the library's kind; returns a number or an array.
      inputs: the arrays that it reads, names of `make_inputs`.
      options: in the library's own words.
      trains: the inputs by which the (summed) result is differentiated.
    """

    run: Callable[..., Any]
    inputs: tuple[str, ...]
    options: dict[str, Any]
    trains: tuple[str, ...] = ("logp",)


def make_inputs() -> dict[str, np.ndarray]:
    """Log-ratios up to ±1.6, so that every clip acts, masked tails and holes, an empty row, both signs of A.

    Floats have four decimals, which JSON holds as they are; masks are 0 or 1.
    """
    rng = np.random.default_rng(20)

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, shape)

    lengths = np.array([6, 4, 5, 1, 6, 0, 3, 6])
    mask = np.arange(T) < lengths[:, None]
    mask[0, 2] = mask[7, 0] = False  # tool tokens
    assert not mask[EMPTY_ROW].any()
    nonempty_mask = mask.copy()
    nonempty_mask[EMPTY_ROW, 0] = True
    logp = uniform(-2.0, -0.2, N, T)
    ref_logp = logp + uniform(-1.0, 1.0, N, T)
    ref_logp[0, 0] = logp[0, 0] + 3.1  # e^3.1 − 3.1 − 1 = 18.1
    ref_logp[4, 1] = logp[4, 1] - 3.1
    old_logp = logp - uniform(-1.6, 1.6, N, T)
    far_logp = old_logp.copy()  # for clamps at ±20
    far_logp[0, :2] = logp[0, :2] + [25.0, -25.0]
    far_logp[1, 0] = logp[1, 0] + 25.0
    far_logp[3, 0] = logp[3, 0] - 12.0  # the only token of its row: beyond verl's 10 of a sequence
    overflow_logp = old_logp.copy()
    overflow_logp[0, 0] = logp[0, 0] - 1000.0
    behaviour_logp = old_logp + uniform(-0.7, 0.7, N, T)
    for row, ratio in ((2, 3.5), (4, 2.5)):  # of the whole sequence, on both sides of TRL's cap
        behaviour_logp[row, 0] += ((old_logp - behaviour_logp) * mask)[row].sum() - np.log(ratio)
    advantages = np.array([1.2, -0.7, 0.5, -1.5, 0.3, 0.8, -0.2, -0.9])
    counted_advantages = np.where(mask.any(1), advantages, 0)
    token_advantages = advantages[:, None] + uniform(-1.0, 1.0, N, T)
    rewards = np.array([1.0, 0.25, 0.0, -0.5, 2.0, 0.5, 0.75, 0.3])
    arrays = {
        "logp": logp,
        "old_logp": old_logp,
        "far_logp": far_logp,
        "overflow_logp": overflow_logp,
        "garbage_logp": np.where(mask, logp, np.nan),
        "ref_logp": ref_logp,
        "behaviour_logp": behaviour_logp,
        "advantages": advantages,
        "counted_advantages": counted_advantages,  # 0 for the empty row
        "token_advantages": token_advantages,
        "entropy": uniform(0.0, 1.6, N, T),
        "rewards": rewards,
        "more_rewards": np.array([0.1, 0.9, 0.4, 0.4, 0.2, 0.7, 0.6, 1.5]),
        "greedy_rewards": uniform(0.0, 1.0, N),
        "partial_rewards": np.where(np.arange(N) == 6, np.nan, rewards),  # one without a verdict
        "token_rewards": uniform(-1.0, 1.0, N, T) * mask,
        "values": uniform(-1.0, 1.0, N, T),
        "old_values": uniform(-1.0, 1.0, N, T),
        "returns": uniform(-1.0, 1.0, N, T),
        "scores": uniform(-1.0, 2.0, N),
        "margin": uniform(0.0, 1.0, PAIRS),
        "sequence_logp": uniform(-9.0, -2.0, N),
        "mean_logp": uniform(-1.5, -0.1, N),
        "mismatched_ratio": uniform(-0.5, 1.5, N),
        "logits": uniform(-2.0, 2.0, N, T, V),
        "teacher_logits": uniform(-2.0, 2.0, N, T, V),
        "hidden": uniform(-1.5, 1.5, N, T, H),
        "ref_hidden": uniform(-1.5, 1.5, N, T, H),
        "weight": uniform(-1.0, 1.0, V, H),
    }
    return {key: x.round(4) for key, x in arrays.items()} | {
        "mask": mask.astype(int),
        "nonempty_mask": nonempty_mask.astype(int),
        "group": np.array([0, 1, 0, 2, 1, 0, 2, 1]),
        "lonely_group": np.array([9, 1, 0, 2, 1, 0, 2, 1]),  # the first row is a group of its own
        "lengths": np.array([3, 50, 80, 81, 90, 99, 100, 130]),
        "tokens": rng.integers(0, V, (N, T)),
        "desirable": np.array([1, 0, 1, 1, 0, 1, 0, 0]),
    }
