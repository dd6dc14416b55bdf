"""Which prompts come next, and how many rollouts each of them gets, as pure state.

    schedule = start(seed=0, size=len(source))
    batch, schedule = next_batch(schedule, 32, 512, rule="dynamo", low=8, high=24)
    ...                                    # counts[i] rollouts of row prompts[i] of the source, 512 in all
    schedule = record(schedule, batch.prompts, successes, batch.counts)

A batch may be drawn before the one before it is recorded: the schedule then knows less, and nothing else.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxrl_llm.data.order import Cursor, take
from jaxrl_llm.rollouts.allocation import (
    dynamo_allocation,
    dynamo_priorities,
    neyman_allocation,
    success_variance,
)

Counts = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Where the data stand and what is known of every prompt. Its arrays are not to be written to.

    Attributes:
      cursor: the next prompt in the order of `data.order`.
      successes, trials: i64[P] rollouts so far of each row of the source.
    """

    cursor: Cursor
    successes: Counts
    trials: Counts


class Batch(NamedTuple):
    """M prompts, in the order in which they are visited.

    Attributes:
      prompts: i64[M] rows of the source; one can appear twice where a batch runs across the end of an epoch.
      counts: i64[M] rollouts of each.
    """

    prompts: Counts
    counts: Counts


Allocation = Callable[..., Counts]
"""(successes i64[M], trials i64[M], total, low=, high=) -> i64[M], which add up to the total."""


def uniform(successes: Counts, trials: Counts, total: int, *, low: int, high: int) -> Counts:
    """The same number for every prompt, to within one."""
    return neyman_allocation(np.ones(len(trials)), total, low=low, high=high)


def neyman(
    successes: Counts, trials: Counts, total: int, *, low: int, high: int, power: float = 0.5
) -> Counts:
    """In proportion to the estimated deviation of a prompt's reward, as `allocation.variance_allocation`.

    A prompt of fewer than two trials counts as if half of its rollouts succeeded: it may be worth most.
    """
    if power <= 0:
        raise ValueError(f"power={power} must be above 0")
    is_known = trials >= 2
    variance = success_variance(np.where(is_known, successes, 0), np.where(is_known, trials, 2))
    return neyman_allocation(np.where(is_known, variance, 0.25) ** power, total, low=low, high=high)


def dynamo(
    successes: Counts,
    trials: Counts,
    total: int,
    *,
    low: int,
    high: int,
    form: str = "variance",
    initial_budget: int = 4,
    solved: float = 0.85,
    least: float = 0.01,
) -> Counts:
    """As the released DynaMO; see `allocation.dynamo_priorities` and `dynamo_allocation`.

    The authors refresh priorities once per epoch. An epoch visits each prompt once, so those of its counts at
    the visit are the same, but for a prompt that comes last in one epoch and first in the next.
    """
    priorities = dynamo_priorities(
        successes, trials, form=form, initial_budget=initial_budget, solved=solved, least=least
    )
    return dynamo_allocation(trials, priorities, total, low=low, high=high, initial_budget=initial_budget)


ALLOCATIONS: dict[str, Allocation] = {"uniform": uniform, "neyman": neyman, "dynamo": dynamo}


def start(seed: int, size: int) -> Schedule:
    """Nothing visited yet of `size` prompts, in the order that `seed` chooses.

    Raises:
      ValueError: no prompts.
    """
    if size < 1:
        raise ValueError(f"cannot schedule a source of {size} prompts")
    return Schedule(Cursor(seed), np.zeros(size, np.int64), np.zeros(size, np.int64))


def allocate(
    successes: ArrayLike,
    trials: ArrayLike,
    total: int,
    *,
    rule: str | Allocation = "dynamo",
    low: int = 4,
    high: int = 24,
    **options: Any,
) -> Counts:
    """How many rollouts each of M prompts gets: i64[M], which add up to `total` exactly.

    Args:
      successes, trials: i[M] so far.
      total: rollouts to give.
      rule: a name in `ALLOCATIONS`, or a function like those.
      low, high: bounds of each prompt's rollouts.
      options: of the rule.

    Raises:
      ValueError: no prompts, an unknown rule, a total that the bounds do not allow, or what the rule refuses.
    """
    won, tried = np.asarray(successes, np.int64), np.asarray(trials, np.int64)
    if isinstance(rule, str) and rule not in ALLOCATIONS:
        raise ValueError(f"unknown rule {rule!r}; one of {', '.join(ALLOCATIONS)}")
    size = len(tried)
    if size < 1 or not size * low <= total <= size * high:
        raise ValueError(
            f"total={total} is not between {size}·{low} and {size}·{high} rollouts: change it, "
            "the number of prompts, or the bounds low and high"
        )
    function = ALLOCATIONS[rule] if isinstance(rule, str) else rule
    counts = np.asarray(function(won, tried, total, low=low, high=high, **options), np.int64)
    if counts.shape != tried.shape or counts.sum() != total or np.any((counts < low) | (counts > high)):
        raise ValueError(
            f"the rule gave {counts.tolist()}, not {size} numbers from {low} to {high} that add up to {total}"
        )
    return counts


def next_batch(
    schedule: Schedule,
    num_prompts: int,
    total: int,
    *,
    rule: str | Allocation = "dynamo",
    low: int = 4,
    high: int = 24,
    **options: Any,
) -> tuple[Batch, Schedule]:
    """The next prompts and how many rollouts each gets, which add up to `total` exactly.

    Args:
      num_prompts: M.
      total: rollouts of the batch.
      rule: a name in `ALLOCATIONS`, or a function like those.
      low, high: bounds of each prompt's rollouts.
      options: of the rule.

    Returns:
      `Batch` and the schedule after it.

    Raises:
      ValueError: an unknown rule, a total that the bounds do not allow, or what the rule refuses.
    """
    prompts, cursor = take(schedule.cursor, num_prompts, len(schedule.trials))
    counts = allocate(
        schedule.successes[prompts], schedule.trials[prompts], total, rule=rule, low=low, high=high, **options
    )
    return Batch(prompts, counts), dataclasses.replace(schedule, cursor=cursor)


def record(schedule: Schedule, prompts: ArrayLike, successes: ArrayLike, trials: ArrayLike) -> Schedule:
    """The schedule after the outcome of some rollouts.

    Args:
      prompts: i[K] rows of the source; one may appear several times.
      successes, trials: i[K] of each. Rollouts without a verdict are no trials.

    Raises:
      ValueError: shapes that differ, a prompt that the source does not have, or more successes than trials.
    """
    rows, won, tried = (np.asarray(x, np.int64) for x in (prompts, successes, trials))
    if rows.ndim != 1 or not rows.shape == won.shape == tried.shape:
        raise ValueError(
            f"prompts {rows.shape}, successes {won.shape}, trials {tried.shape} must be alike, [K]"
        )
    size = len(schedule.trials)
    if np.any((rows < 0) | (rows >= size)):
        raise ValueError(
            f"prompt {rows[(rows < 0) | (rows >= size)][0]} is none of the source's {size}, from 0"
        )
    if np.any((won < 0) | (won > tried)):
        raise ValueError("successes must be from 0 to trials")
    new_successes, new_trials = schedule.successes.copy(), schedule.trials.copy()
    np.add.at(new_successes, rows, won)
    np.add.at(new_trials, rows, tried)
    return dataclasses.replace(schedule, successes=new_successes, trials=new_trials)


def to_json(schedule: Schedule) -> dict[str, Any]:
    """The schedule for a checkpoint: what JSON can hold, of the prompts that have been tried."""
    tried = np.flatnonzero(schedule.trials)
    return {
        "cursor": [int(x) for x in schedule.cursor],
        "size": len(schedule.trials),
        "prompts": tried.tolist(),
        "successes": schedule.successes[tried].tolist(),
        "trials": schedule.trials[tried].tolist(),
    }


def from_json(saved: dict[str, Any]) -> Schedule:
    """The schedule that `to_json` saved."""
    schedule = start(0, saved["size"])
    schedule = record(schedule, saved["prompts"], saved["successes"], saved["trials"])
    return dataclasses.replace(schedule, cursor=Cursor(*saved["cursor"]))
