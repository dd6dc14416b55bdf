"""`group_advantage`: rewards in, advantages out, whatever the sizes and the order of the groups."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_kernels import dispatch
from jaxrl_kernels.group_advantage import pallas_tpu, xla

Array = jax.Array

MODES = ("grpo", "rloo", "mean_only")
MAX_LOG_WEIGHT = 20.0
"""Bound on |p̂ − C| under the exponential of HA-DW's weight; rewards in [0, 1] stay far inside."""


class GroupAdvantage(NamedTuple):
    """What `group_advantage` returns.

    Attributes:
      advantages: f[N], float32 or wider; 0 in groups of equal rewards and at rows that do not count.
      mean: f[N] mean reward of the row's group; 0 in a group without usable rows, as the next two.
      std: f[N] standard deviation of the row's group.
      weight: f[N] HA-DW's factor Φ, already in the advantages; 1 without an anchor.
      is_equal: bool[N] whether the rewards of the row's group are all equal.
      metrics: (sum, weight) by name: `reward`, mean over rows; `reward_std` and `frac_reward_zero_std`, means
        over groups; `nonfinite_rewards`, share of the valid rows; with an anchor `ha_dw/weight` and
        `ha_dw/clamped_ratio`, means over rows whose advantage is not 0.
    """

    advantages: Array
    mean: Array
    std: Array
    weight: Array
    is_equal: Array
    metrics: dict[str, tuple[Array, Array]]


def _mean(x: Array, where: Array) -> tuple[Array, Array]:
    """A mean before its division: sum of x[N] over `where` and the number of rows in it."""
    total = jnp.sum(jnp.where(where, x, 0))
    return total, jnp.sum(where, dtype=total.dtype)


def group_advantage(
    rewards: Array,
    group: Array,
    valid: Array | None = None,
    *,
    mode: str = "grpo",
    ddof: int = 1,
    epsilon: float = 1e-6,
    sample_weight: Array | None = None,
    anchor: Array | float | None = None,
    weight_scale: float = 1.3,
    implementation: str | None = None,
) -> GroupAdvantage:
    """Reward minus the group's baseline, over its standard deviation, by a static mode.

      grpo: A = Φ·(r − mean(ω·r)) / (std + ε)
      mean_only: A = Φ·(r − mean(ω·r)), Dr.GRPO
      rloo: A = Φ·(r − mean of the group's other rows)

    with HACPO's ω (`sample_weight`) and HA-DW's Φ = λ·exp(−sgn(A)·(mean − C)) (`anchor` C) where they are
    given, else 1. Equal to the functions of these names in `jaxrl_llm.advantages`, which are the definition.

    All N rows are needed at once: a group may lie anywhere among them. Where rows are sharded, gather the
    rewards and ids first (they are N numbers), then keep the advantages of one's own rows.

    Args:
      rewards: f[N] total reward of every row; a constant. Rows with NaN or infinite rewards are left out.
      group: int[N] any integers; rows with the same one are compared.
      valid: bool[N] rows that count; None for all.
      mode: one of `MODES`.
      ddof: 1 for the sample standard deviation, 0 for the population's.
      epsilon: added to the standard deviation.
      sample_weight: f[N] ω, factors of the rewards in the mean; not for rloo.
      anchor: f[] C, the accuracy that a group's mean is compared with; rewards then lie in [0, 1].
      weight_scale: λ.
      implementation: "xla" (segment sums), "pallas_tpu" (comparison of ids, in float32), or None: the
        kernel where the program is compiled for a TPU.

    Raises:
      ValueError: unknown mode or implementation, shapes that differ, or sample weights under rloo.
      TypeError: ids that are no integers.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; one of {', '.join(MODES)}")
    if sample_weight is not None and mode == "rloo":
        raise ValueError("sample_weight weighs a mean over the whole group, and rloo has none")
    rewards, group = jnp.asarray(rewards), jnp.asarray(group)
    if not jnp.issubdtype(group.dtype, jnp.integer):
        raise TypeError(f"group has dtype {group.dtype} and must be integers")
    rewards = jax.lax.stop_gradient(rewards.astype(jnp.promote_types(rewards.dtype, jnp.float32)))
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid, bool)
    weights = jnp.ones_like(rewards) if sample_weight is None else jax.lax.stop_gradient(sample_weight)
    shapes = {"rewards": rewards, "group": group, "valid": valid, "sample_weight": weights}
    if rewards.ndim != 1 or len({x.shape for x in shapes.values()}) > 1:
        named = ", ".join(f"{name} {x.shape}" for name, x in shapes.items())
        raise ValueError(f"shapes must all be [N]: {named}")

    is_finite = jnp.isfinite(rewards)
    counts = valid & is_finite
    rewards = jnp.where(counts, rewards, 0)
    # mean(ω·r) = mean(r) + mean((ω−1)·r): weights of 1 change nothing, not even by rounding
    extra = jnp.where(counts, (weights.astype(rewards.dtype) - 1) * rewards, 0)
    found: xla.GroupStatistics = dispatch.run(
        implementation if rewards.size else "xla",
        *(rewards, extra, group, counts),
        pallas_tpu=pallas_tpu.statistics,
        xla=xla.statistics,
    )

    rows = found.rows
    std = jnp.sqrt(found.square / jnp.maximum(rows - ddof, 1))
    advantages = rewards - found.low - found.mean
    if mode == "rloo":  # r_i − (S − r_i)/(n−1) = (r_i − S/n)·n/(n−1)
        advantages *= rows / jnp.maximum(rows - 1, 1)
    if sample_weight is not None:
        advantages -= found.extra / jnp.maximum(rows, 1)
    if mode == "grpo":
        advantages /= std + epsilon
    is_equal = found.spread == 0
    advantages = jnp.where(counts & ~is_equal, advantages, 0)

    is_first = counts & (found.first == jnp.arange(rewards.size))  # a row that speaks for its group
    metrics = {
        "reward": _mean(rewards, counts),
        "reward_std": _mean(std, is_first),
        "frac_reward_zero_std": _mean(is_equal.astype(rewards.dtype), is_first),
        "nonfinite_rewards": _mean((~is_finite).astype(rewards.dtype), valid),
    }
    mean, weight = found.low + found.mean, jnp.ones_like(rewards)
    if anchor is not None:
        log_weight = -jnp.sign(advantages) * (mean - jax.lax.stop_gradient(anchor))
        weight = weight_scale * jnp.exp(jnp.clip(log_weight, -MAX_LOG_WEIGHT, MAX_LOG_WEIGHT))
        outside = (jnp.abs(log_weight) > MAX_LOG_WEIGHT).astype(rewards.dtype)
        metrics |= {
            "ha_dw/weight": _mean(weight, advantages != 0),
            "ha_dw/clamped_ratio": _mean(outside, advantages != 0),
        }
        advantages *= weight
    return GroupAdvantage(advantages, mean, std, weight, is_equal, metrics)
