"""Statistics of groups by segment sums: one sort of the ids, and work that grows with N alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class GroupStatistics(NamedTuple):
    """For every row, f[N] each, over the rows of its group that count; 0 in a group without any.

    Attributes:
      rows: their number.
      low: smallest reward.
      spread: largest minus smallest reward.
      mean: mean of reward − low.
      square: sum of (reward − low − mean)².
      extra: sum of the second operand.
      first: index of the first of them.
    """

    rows: Array
    low: Array
    spread: Array
    mean: Array
    square: Array
    extra: Array
    first: Array


def segment_ids(group: Array) -> Array:
    """i32[N] numbers in 0..N−1, equal where `group` (any int [N]) is equal."""
    return jnp.searchsorted(jnp.sort(group), group).astype(jnp.int32)


def statistics(rewards: Array, extra: Array, group: Array, counts: Array) -> GroupStatistics:
    """Of rewards f[N], a second operand f[N] that is only added up, group int[N], and counts bool[N]."""
    size, ids = rewards.shape[0], segment_ids(group)

    def total(x: Array) -> Array:
        return jax.ops.segment_sum(jnp.where(counts, x, 0), ids, num_segments=size)[ids]

    def smallest(x: Array) -> Array:
        return jax.ops.segment_min(jnp.where(counts, x, jnp.inf), ids, num_segments=size)[ids]

    rows = total(jnp.ones_like(rewards))
    low = smallest(rewards)
    # Differences from the smallest are small where a float32 sum of large values has already lost them.
    above = rewards - low
    mean = total(above) / jnp.maximum(rows, 1)
    found = GroupStatistics(
        rows=rows,
        low=low,
        spread=-smallest(-above),
        mean=mean,
        square=total((above - mean) ** 2),
        extra=total(extra),
        first=smallest(jnp.arange(size, dtype=rewards.dtype)),
    )
    return GroupStatistics(*(jnp.where(rows > 0, x, 0) for x in found))
