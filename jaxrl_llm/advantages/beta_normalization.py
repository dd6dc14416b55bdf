"""BNPO, the paper's: advantages over a Beta density that follows the prompts' success rates.

It has nothing to do with the loss that TRL calls bnpo, a token mean over the local micro-batch.
"""

import jax
import jax.numpy as jnp
from jax.lax import lgamma

from jaxrl_llm.advantages.group import dr_grpo, usable_rows
from jaxrl_llm.advantages.whitening import BatchStatistics, batch_statistics
from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, float_of, masked_sum
from jaxrl_llm.losses.segments import segment_ids, segment_sum


def _success_rates(
    rewards: Array, group: Array, valid: Array | None, bounds: tuple[float, float]
) -> tuple[Array, Array, Array]:
    """Mean reward f[N] of every segment on the scale where the bounds are 0 and 1, its rows f[N], and ids."""
    check_same_shape(rewards=rewards, group=group)
    rewards = jax.lax.stop_gradient(float_of(rewards))
    ids, counts = segment_ids(group), usable_rows(rewards, valid)
    rows = segment_sum(jnp.ones_like(rewards), ids, counts)
    rates = segment_sum((rewards - bounds[0]) / (bounds[1] - bounds[0]), ids, counts) / jnp.maximum(rows, 1)
    return rates, rows, ids


def success_rate_statistics(
    rewards: Array, group: Array, valid: Array | None = None, *, bounds: tuple[float, float] = (0.0, 1.0)
) -> BatchStatistics:
    """Statistics of the groups' mean rewards, each group once, for `beta_parameters`.

    Pieces of a batch, cut between groups, have their own, which `merge_statistics` joins.

    Args: as `bnpo`.
    """
    rates, rows, _ = _success_rates(rewards, group, valid, bounds)
    return batch_statistics(rates, rows > 0)


def beta_parameters(statistics: BatchStatistics, *, max_concentration: float = 1e3) -> tuple[Array, Array]:
    """Beta distribution with the mean and variance of the prompts' success rates.

    a = c·m and b = c·(1 − m) with c = m(1 − m)/v − 1, m the mean and v the sample variance

    Example:
      >>> rewards, group = jnp.array([1.0, 0, 0, 0, 1, 1, 1, 0]), jnp.array([0] * 4 + [1] * 4)
      >>> a, b = beta_parameters(success_rate_statistics(rewards, group))  # ¼ and ¾: m = ½, v = 1/8, c = 1
      >>> float(a), float(b)
      (0.5, 0.5)

    Args:
      statistics: of the batch's success rates, `success_rate_statistics`.
      max_concentration: largest c, which is infinite where all rates are equal.

    Returns:
      a, b: f[], not negative: c is 0 where no Beta distribution is as wide, and with fewer than two groups.
    """
    s: BatchStatistics = jax.lax.stop_gradient(statistics)
    mean = jnp.where(s.size > 0, s.low + s.rise, 0)
    spread = mean * (1 - mean)
    variance = jnp.maximum(s.variance(), spread / (max_concentration + 1))
    c = jnp.where((s.size > 1) & (spread > 0), spread / jnp.where(variance > 0, variance, 1) - 1, 0)
    c = jnp.maximum(c, 0)
    return c * mean, c * (1 - mean)


def bnpo(
    rewards: Array,
    group: Array,
    valid: Array | None = None,
    *,
    parameters: tuple[Array, Array] | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    max_weight: float = 1e6,
) -> tuple[Array, Metrics]:
    """BNPO: the group baseline, over a Beta density at the group's success rate.

    A_i = (r_i − p̂) / Beta(p̂; α, β) with p̂ the mean reward of i's group, α = 1 + a/3 and β = 1 + b/3

    a and b describe how success rates lie over the prompts of the batch (`beta_parameters`). a = b = 0 is
    `dr_grpo`; a = b = 3/2 is GRPO with the population's standard deviation √(p̂(1−p̂)), times π/8.

    Example:
      >>> rewards, group = jnp.array([1.0, 0.0, 0.0, 0.0]), jnp.zeros(4, int)
      >>> a, _ = bnpo(rewards, group, parameters=(3.0, 3.0))  # Beta(¼; 2, 2) = 6·¼·¾ = 1.125
      >>> [round(x, 4) for x in a.tolist()]  # ¾ and −¼ over it
      [0.6667, -0.2222, -0.2222, -0.2222]

    Args:
      rewards: f[N] between the bounds, in the paper 0 or 1; constants.
      group: i[N] any integers; rows with the same one are compared.
      valid: bool[N] rows that count; None for all.
      parameters: a, b of the whole batch; None if these rows are all of it.
      bounds: smallest and largest reward possible.
      max_weight: largest 1/Beta, which has no bound near p̂ = 0 and 1.

    Returns:
      advantages: f[N] without gradient, float32 or wider; exactly 0 in groups of equal rewards.
      metrics: of `dr_grpo`, and over groups `bnpo/a`, `bnpo/b` and `bnpo/clamped_ratio`, the share of groups
        whose weight is the largest.

    Raises:
      ValueError: bounds in the wrong order, or shapes that differ.

    References:
      2506.02864. The fit by the sample variance, α and β of at least 1, the map from the bounds and the
      largest weight are as in the authors' code; the largest concentration is ours.
    """
    if not bounds[0] < bounds[1]:
        raise ValueError(f"bounds={bounds} must be the smallest reward possible, then the largest")
    deviation, metrics = dr_grpo(rewards, group, valid)
    if parameters is None:
        parameters = beta_parameters(success_rate_statistics(rewards, group, valid, bounds=bounds))
    a, b = (jax.lax.stop_gradient(jnp.asarray(x, deviation.dtype)) for x in parameters)
    rates, rows, ids = _success_rates(rewards, group, valid, bounds)
    p = jnp.clip(rates, 0, 1)
    log_p, log_q = jnp.where(a > 0, a / 3 * jnp.log(p), 0), jnp.where(b > 0, b / 3 * jnp.log1p(-p), 0)
    log_weight = lgamma(1 + a / 3) + lgamma(1 + b / 3) - lgamma(2 + (a + b) / 3) - log_p - log_q
    is_clamped = log_weight > jnp.log(max_weight)
    weight = jnp.where(is_clamped, max_weight, jnp.exp(log_weight))
    return deviation / (bounds[1] - bounds[0]) * weight[ids], metrics | {
        "bnpo/a": masked_sum(a, rows > 0),
        "bnpo/b": masked_sum(b, rows > 0),
        "bnpo/clamped_ratio": masked_sum(is_clamped, rows > 0),
    }
