"""A step's worth of scored completions, with dynamic sampling where the config asks for it (2503.14476)."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.rewards.pool import Scores
from jaxrl_llm.rollouts.single_turn import Rollout
from jaxrl_llm.trajectory import concatenate


class DegenerateBatch(RuntimeError):
    """No group of a step has rewards that differ, and the config says to fail then."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """N completions and what the reward functions said of them.

    Attributes:
      rollout: N rows in whole groups.
      total: f32[N] weighted reward; NaN where nothing applied.
      values: f32[N] of each function.
      failures: per function, rows without a score by reason.
      failed: bool[N] some function failed.
      valid: bool[N] rows to learn from.
      drawn, kept: groups sampled, and groups with rewards that differ among them.
    """

    rollout: Rollout
    total: np.ndarray
    values: dict[str, np.ndarray]
    failures: dict[str, dict[str, int]]
    failed: np.ndarray
    valid: np.ndarray
    drawn: int
    kept: int


def differing(total: np.ndarray, group: np.ndarray) -> np.ndarray:
    """bool[M]: groups, in the order of their numbers, whose applicable rewards are not all equal.

    Args:
      total: f32[N].  group: i32[N] number of each row's group.
    """
    names, place = np.unique(group, return_inverse=True)
    high, low = np.full(len(names), -np.inf), np.full(len(names), np.inf)
    np.maximum.at(high, place, np.where(np.isfinite(total), total, -np.inf))
    np.minimum.at(low, place, np.where(np.isfinite(total), total, np.inf))
    return high > low


def select(scored: Scored, groups: np.ndarray, group_size: int) -> Scored:
    """Whole groups (i64[M] indices) of a batch, renumbered in that order."""
    rows = (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)
    r = scored.rollout
    t = dataclasses.replace(
        r.trajectories.take(jnp.asarray(rows)),
        group=jnp.repeat(jnp.arange(len(groups), dtype=jnp.int32), group_size),
    )
    return dataclasses.replace(
        scored,
        rollout=Rollout(
            t,
            [r.prompts[i] for i in rows],
            [r.completions[i] for i in rows],
            [r.completion_ids[i] for i in rows],
        ),
        total=scored.total[rows],
        values={name: v[rows] for name, v in scored.values.items()},
        failed=scored.failed[rows],
        valid=scored.valid[rows],
    )


def join(a: Scored, b: Scored) -> Scored:
    """Two batches as one."""
    names = a.failures.keys() | b.failures.keys()
    failures: dict[str, dict[str, int]] = {name: {} for name in sorted(names)}
    for part in (a, b):
        for name, reasons in part.failures.items():
            for reason, count in reasons.items():
                failures[name][reason] = failures[name].get(reason, 0) + count
    return Scored(
        rollout=Rollout(
            concatenate([a.rollout.trajectories, b.rollout.trajectories]),
            a.rollout.prompts + b.rollout.prompts,
            a.rollout.completions + b.rollout.completions,
            a.rollout.completion_ids + b.rollout.completion_ids,
        ),
        total=np.concatenate([a.total, b.total]),
        values={name: np.concatenate([a.values[name], b.values[name]]) for name in a.values},
        failures=failures,
        failed=np.concatenate([a.failed, b.failed]),
        valid=np.concatenate([a.valid, b.valid]),
        drawn=a.drawn + b.drawn,
        kept=a.kept + b.kept,
    )


def collect(
    draw: Callable[[], tuple[Rollout, np.ndarray, Scores]],
    *,
    num_groups: int,
    group_size: int,
    max_attempts: int = 1,
    on_degenerate: str = "train",
) -> Scored | None:
    """A batch of `num_groups` groups to learn from.

    With one attempt: what is drawn, whatever its rewards. With more: groups whose rewards differ are kept
    and more are drawn until there are enough or the attempts are used up; never longer.

    Args:
      draw: samples and scores `num_groups` groups: rollout, f32[N] total rewards, scores per function.
      group_size: rows of a group; with one attempt they may differ in size.
      on_degenerate: when the attempts did not suffice: 'train' on the groups that differ (the batch is filled
        up with others, not valid, so that its shape stays), 'skip' the step if none differs, or 'fail' if
        none differs.

    Returns:
      `Scored` of num_groups · group_size rows; None = skip this step.

    Raises:
      DegenerateBatch: under 'fail'.
    """
    batch: Scored | None = None
    for _ in range(max_attempts):
        rollout, total, scores = draw()
        valid = np.ones(len(total), bool)
        group = np.asarray(rollout.trajectories.group)
        good = differing(np.where(scores.failed, np.nan, total), group)
        fresh = Scored(
            rollout, total, scores.values, scores.failures, scores.failed, valid, len(good), int(good.sum())
        )
        batch = fresh if batch is None else join(batch, fresh)
        if batch.kept >= num_groups:
            break
    assert batch is not None
    if batch.kept == 0 and on_degenerate == "fail":
        raise DegenerateBatch(
            f"none of {batch.drawn} groups has rewards that differ (mean reward "
            f"{np.nanmean(batch.total):.3g}): the task is too easy or too hard for this policy, or the "
            "reward is constant. Change the data, raise rollout.max_attempts, or set "
            "rollout.on_degenerate='skip'"
        )
    if batch.kept == 0 and on_degenerate == "skip":
        return None
    if max_attempts == 1:
        return batch
    group = np.asarray(batch.rollout.trajectories.group)
    good = differing(np.where(batch.failed, np.nan, batch.total), group)
    order = np.argsort(~good, kind="stable")[:num_groups]
    chosen = select(batch, order, group_size)
    return dataclasses.replace(chosen, valid=np.repeat(good[order], group_size))
