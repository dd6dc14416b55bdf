"""Advantages that train the best of k tries instead of the average one."""

import jax
import jax.numpy as jnp

from jaxrl_llm.advantages.group import usable_rows
from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, float_of, masked_sum
from jaxrl_llm.losses.segments import segment_ids, segment_max, segment_moments, segment_sum


def grpo_pass_at_k(
    rewards: Array,
    group: Array,
    valid: Array | None = None,
    *,
    scale: str = "group",
    epsilon: float = 1e-6,
    ddof: int = 1,
) -> tuple[Array, Metrics]:
    """The best row of a group gets what it adds to the second best, the others nothing.

    A_best = (r_max − r_second) / (σ + ε), 0 elsewhere, and 0 where two rows share the best reward

    This is the leave-one-out advantage of max over the group: without the best row the maximum is r_second,
    without any other it stays.

    Example:
      >>> a, _ = grpo_pass_at_k(jnp.array([0.0, 4.0, 2.0]), jnp.array([0, 0, 0]), epsilon=0.0)
      >>> a.tolist()  # (4 − 2) / 2
      [0.0, 1.0, 0.0]

    Args:
      rewards, group, valid: as `group_advantage`.
      scale: "group" for σ the group's standard deviation, "none" for no denominator.
      epsilon: added to the standard deviation.
      ddof: 1 for the sample standard deviation, 0 for the population's.

    Returns:
      advantages: f[N] without gradient, float32 or wider; 0 for a group of one (an error in verl).
      metrics: `reward`, mean over rows; `nonfinite_rewards`, share of the valid rows.

    Raises:
      ValueError: unknown scale, or shapes that differ.

    References:
      2503.19595, in the form of verl's grpo_passk.
    """
    if scale not in ("group", "none"):
        raise ValueError(f"unknown scale {scale!r}; one of group, none")
    rewards, valid, counts, ids = _prepare(rewards, group, valid)
    best = segment_max(rewards, ids, counts)[ids]
    is_best = counts & (rewards == best)
    # Of several best rows none adds anything; of one, all the others are below it.
    is_alone = segment_sum(jnp.ones_like(rewards), ids, is_best)[ids] == 1
    second = segment_max(rewards, ids, counts & ~is_best)[ids]
    gain = jnp.where(is_best & is_alone & jnp.isfinite(second), rewards - second, 0)
    if scale == "group":
        std = segment_moments(rewards, ids, counts, ddof=ddof).std[ids]
        gain = jnp.where(gain > 0, gain / (std + epsilon), 0)
    return gain, {
        "reward": masked_sum(rewards, counts),
        "nonfinite_rewards": masked_sum(~counts, valid),
    }


def pass_at_k_training(
    rewards: Array, group: Array, valid: Array | None = None, *, k: int, threshold: float = 0.5
) -> tuple[Array, Metrics]:
    """Pass@k training: what a row adds, on average, to k tries that pass if one of them is right.

    Of a group's n rows, n⁻ are wrong. Over all k-subsets of them, each rewarded 1 if it has a right row,
    P is the mean reward and s = √(P(1−P)) its standard deviation; a row's advantage is the mean of
    (reward − P)/s over the subsets that it is in:

    P = 1 − C(n⁻, k)/C(n, k)
    A⁺ = (1 − P)/s
    A⁻ = (1 − P − C(n⁻−1, k−1)/C(n−1, k−1))/s

    and 0 where s = 0. k = 1 is GRPO with the population's standard deviation; larger k weighs hard prompts
    more and lets go of those that k tries solve.

    Example:
      >>> a, metrics = pass_at_k_training(jnp.array([1.0, 0, 0, 0]), jnp.zeros(4, int), k=2)
      >>> a.tolist()  # P = 1 − 3/6, s = ½; A⁺ = ½/½, A⁻ = (½ − 2/3)/½
      [1.0, -0.3333333432674408, -0.3333333432674408, -0.3333333432674408]
      >>> float(metrics["pass_at_k"].sum)
      0.5

    Args:
      rewards, group, valid: as `group_advantage`.
      k: tries, at least 1. Groups with no more than k usable rows have one subset or none and get 0.
      threshold: a row is right if its reward is greater.

    Returns:
      advantages: f[N] without gradient, float32 or wider; they add up to 0 in every group.
      metrics: `pass_at_k`, mean of P over groups of k rows at least; `small_groups`, share of the others;
        `reward`, mean over rows; `nonfinite_rewards`, share of the valid rows.

    Raises:
      ValueError: k < 1, or shapes that differ.

    References:
      2508.10751, the analytical form.
    """
    if k < 1:
        raise ValueError(f"k={k} tries must be at least 1")
    rewards, valid, counts, ids = _prepare(rewards, group, valid)
    is_right = counts & (rewards > threshold)
    n = segment_sum(jnp.ones_like(rewards), ids, counts)
    right = segment_sum(jnp.ones_like(rewards), ids, is_right)
    wrong = n - right
    # Quotients of binomials as products of quotients: C(n⁻−1, k−1)/C(n−1, k−1) here, and
    # C(n⁻, k)/C(n, k) is n⁻/n times it.
    others = jnp.arange(1, k, dtype=rewards.dtype)
    factors = jnp.maximum(wrong[:, None] - others, 0) / jnp.maximum(n[:, None] - others, 1)
    others_fail = jnp.prod(factors, axis=1)
    all_fail = wrong / jnp.maximum(n, 1) * others_fail
    s = jnp.sqrt(all_fail * (1 - all_fail))
    plus, minus = all_fail, -others_fail * right / jnp.maximum(n, 1)
    is_large = n >= k
    advantages = jnp.where(is_right, plus[ids], minus[ids]) / jnp.where(s > 0, s, 1)[ids]
    return jnp.where(counts & (is_large & (s > 0))[ids], advantages, 0), {
        "reward": masked_sum(rewards, counts),
        "pass_at_k": masked_sum(1 - all_fail, is_large & (n > 0)),
        "small_groups": masked_sum(~is_large, n > 0),
        "nonfinite_rewards": masked_sum(~counts, valid),
    }


def _prepare(rewards: Array, group: Array, valid: Array | None) -> tuple[Array, Array, Array, Array]:
    """Rewards with 0 where they do not count, valid rows, rows that count, segment ids."""
    rewards = jax.lax.stop_gradient(float_of(rewards))
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid, bool)
    check_same_shape(rewards=rewards, group=group, valid=valid)
    counts = usable_rows(rewards, valid)
    return jnp.where(counts, rewards, 0), valid, counts, segment_ids(group)
