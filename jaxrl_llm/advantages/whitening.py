"""Whitening: numbers less their mean over the batch, over their standard deviation.

The statistics are one function and their use another, so that a batch may be cut: each piece makes its own
`batch_statistics`, `merge_statistics` makes them one, and every piece is whitened by the same numbers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import Array, check_same_shape, float_of
from jaxrl_llm.losses.segments import segment_ids, segment_max


class BatchStatistics(NamedTuple):
    """Count, mean and spread of a batch of numbers; all scalars.

    The mean is kept as its distance from the smallest number: numbers near 1e8 keep their differences so.

    Attributes:
      size: f[] how many numbers.
      low: f[] the smallest; inf if there is none.
      high: f[] the largest; −inf if there is none.
      rise: f[] mean − low.
      squares: f[] sum of squared distances from the mean.
    """

    size: Array
    low: Array
    high: Array
    rise: Array
    squares: Array

    def variance(self, ddof: int = 1) -> Array:
        """f[] variance, of the sample (ddof 1) or the population (0); 0 of fewer than two."""
        return self.squares / jnp.maximum(self.size - ddof, 1)

    def std(self, ddof: int = 1) -> Array:
        """f[] the variance's square root."""
        return jnp.sqrt(self.variance(ddof))


def batch_statistics(x: Array, mask: Array, *, weight: Array | None = None) -> BatchStatistics:
    """Statistics of a batch of numbers, for `whiten`.

    Example:
      >>> s = batch_statistics(jnp.array([1.0, 3.0, 99.0]), jnp.array([True, True, False]))
      >>> float(s.size), float(s.low + s.rise), float(s.squares)  # mean 2, squares 1² + 1²
      (2.0, 2.0, 2.0)

    Args:
      x: f[...] numbers, finite where they count; constants.
      mask: bool[...] which of them count.
      weight: i or f[...] how often each counts, for instance the number of tokens that share it; None for
        once. At least 1, or 0 for not at all.

    Returns:
      BatchStatistics, float32 or wider.

    Raises:
      ValueError: shapes that differ.
    """
    weight = jnp.ones(jnp.shape(x)) if weight is None else jax.lax.stop_gradient(weight)
    check_same_shape(x=x, mask=mask, weight=weight)
    x = jax.lax.stop_gradient(float_of(x))
    weight = jnp.where(mask, weight, 0).astype(x.dtype)
    where = weight > 0
    low = jnp.min(jnp.where(where, x, jnp.inf), initial=jnp.inf)
    high = jnp.max(jnp.where(where, x, -jnp.inf), initial=-jnp.inf)
    size = jnp.sum(weight)
    above = jnp.where(where, x - low, 0)
    rise = jnp.sum(weight * above) / jnp.maximum(size, 1)
    squares = jnp.sum(weight * jnp.where(where, above - rise, 0) ** 2)
    return BatchStatistics(size, low, high, rise, squares)


def merge_statistics(a: BatchStatistics, b: BatchStatistics) -> BatchStatistics:
    """Two pieces' statistics as those of both together, in any order and with empty pieces.

    Example:
      >>> pieces = [batch_statistics(jnp.array(x), jnp.array(x) > 0) for x in ([1.0], [3.0, 5.0], [-9.0])]
      >>> s = merge_statistics(merge_statistics(pieces[0], pieces[1]), pieces[2])  # 1, 3 and 5
      >>> float(s.size), float(s.low + s.rise), float(s.squares)
      (3.0, 3.0, 8.0)
    """
    low, size = jnp.minimum(a.low, b.low), a.size + b.size
    rise_a, rise_b = (jnp.where(s.size > 0, s.low - low, 0) + s.rise for s in (a, b))
    share = b.size / jnp.maximum(size, 1)
    return BatchStatistics(
        size,
        low,
        jnp.maximum(a.high, b.high),
        rise_a + (rise_b - rise_a) * share,
        a.squares + b.squares + (rise_b - rise_a) ** 2 * a.size * share,
    )


def whiten(
    x: Array, statistics: BatchStatistics, mask: Array, *, epsilon: float = 1e-6, ddof: int = 1
) -> Array:
    """Numbers less the batch's mean, over its standard deviation.

    A = (x − mean) / (std + ε), and exactly 0 where all numbers of the batch are equal

    Example:
      >>> x, mask = jnp.array([1.0, 3.0, 5.0, 99.0]), jnp.array([True, True, True, False])
      >>> whiten(x, batch_statistics(x, mask), mask, epsilon=0.0).tolist()  # mean 3, std √(8/2)
      [-1.0, 0.0, 1.0, 0.0]

    Args:
      x: f[...] numbers, of the batch or of a piece of it; constants.
      statistics: of the whole batch, from `batch_statistics`.
      mask: bool[...] which numbers count.
      epsilon: added to the standard deviation (1e-4 in TRL; verl adds 1e-8 to the variance).
      ddof: 1 for the sample standard deviation, 0 for the population's.

    Returns:
      f[...] without gradient, 0 where masked.

    Raises:
      ValueError: shapes that differ.
    """
    check_same_shape(x=x, mask=mask)
    s: BatchStatistics = jax.lax.stop_gradient(statistics)
    x = jax.lax.stop_gradient(float_of(x))
    where = jnp.asarray(mask, bool) & (s.high > s.low)
    return jnp.where(where, (x - s.low - s.rise) / (s.std(ddof) + epsilon), 0)


def whiten_groups(
    x: Array,
    group: Array,
    mask: Array,
    *,
    statistics: BatchStatistics | None = None,
    weight: Array | None = None,
    epsilon: float = 1e-6,
    ddof: int = 1,
) -> Array:
    """`whiten` for numbers that groups of rows were compared by: a group of nothing but zeros stays 0.

    Taking off the batch's mean would push a group whose rewards are all equal, and so say nothing.

    Args:
      x: f[N, ...] numbers, constants.
      group: i[N] any integers.
      mask: bool[N, ...] which numbers count.
      statistics: of the whole batch; None if these are all of it.
      weight: f[N, ...] for `batch_statistics`, without `statistics`.
      epsilon, ddof: as `whiten`.

    Returns:
      f[N, ...], 0 where masked.
    """
    if statistics is None:
        statistics = batch_statistics(x, mask, weight=weight)
    ids = segment_ids(group)
    largest = jnp.max(jnp.abs(jnp.where(mask, x, 0)), axis=tuple(range(1, x.ndim)), initial=0)
    speaks = (segment_max(largest, ids, largest >= 0) > 0)[ids]
    where = jnp.asarray(mask, bool) & speaks.reshape(-1, *[1] * (x.ndim - 1))
    return whiten(x, statistics, where, epsilon=epsilon, ddof=ddof)
