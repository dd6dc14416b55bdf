"""Statistics of ragged groups: rows of one group may stand anywhere, and any row may be left out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


def segment_ids(group: Array) -> Array:
    """i32[N] numbers in 0..N−1, equal where `group` (any int [N]) is equal.

    Example:
      >>> segment_ids(jnp.array([7, -3, 7])).tolist()  # where a value first stands in the sorted −3, 7, 7
      [1, 0, 1]
    """
    return jnp.searchsorted(jnp.sort(group), group).astype(jnp.int32)


def segment_sum(x: Array, ids: Array, where: Array) -> Array:
    """f[N] sum of x[N] over the rows of each id where `where`; 0 for an id without rows."""
    return jax.ops.segment_sum(jnp.where(where, x, 0), ids, num_segments=x.shape[0])


def segment_max(x: Array, ids: Array, where: Array) -> Array:
    """f[N] largest x[N] over the rows of each id where `where`; −inf for an id without rows."""
    return jax.ops.segment_max(jnp.where(where, x, -jnp.inf), ids, num_segments=x.shape[0])


class Moments(NamedTuple):
    """Statistics of segments, from `segment_moments`.

    Attributes:
      deviation: f[N] of every row from its segment's mean; exactly 0 in a segment of equal values and at rows
        that do not count.
      std: f[N] standard deviation of every id; 0 with fewer than ddof + 1 rows.
      spread: f[N] largest minus smallest value of every id; 0 without rows.
      rows: f[N] number of rows of every id.
    """

    deviation: Array
    std: Array
    spread: Array
    rows: Array


def segment_moments(x: Array, ids: Array, where: Array, *, ddof: int = 1) -> Moments:
    """Deviations and standard deviations within segments, safe from cancellation.

    Args:
      x: f[N].
      ids: i32[N] in 0..N−1.
      where: bool[N] rows that count.
      ddof: 1 for the sample standard deviation, 0 for the population's.
    """
    rows = segment_sum(jnp.ones_like(x), ids, where)
    # Differences from the smallest are small where a float32 sum of large values has already lost them.
    low = -segment_max(-x, ids, where)
    deviation = jnp.where(where, x - low[ids], 0)
    spread = jnp.maximum(segment_max(deviation, ids, where), 0)
    mean = segment_sum(deviation, ids, where) / jnp.maximum(rows, 1)
    deviation = jnp.where(where, deviation - mean[ids], 0)
    variance = segment_sum(deviation**2, ids, where) / jnp.maximum(rows - ddof, 1)
    return Moments(deviation, jnp.sqrt(variance), spread, rows)
