"""Advantages from comparing the rows of one group: the functions behind most names in `ADVANTAGES`."""

import jax
import jax.numpy as jnp

from jaxrl_llm.advantages.whitening import BatchStatistics, batch_statistics, whiten_groups
from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, float_of, masked_sum
from jaxrl_llm.losses.segments import segment_ids, segment_moments, segment_sum

SCALES = ("group", "batch", "none")
BASELINES = ("mean", "leave_one_out")


def usable_rows(rewards: Array, valid: Array | None) -> Array:
    """bool[N]: the valid rows (None for all) whose reward, f[N], is a number."""
    is_finite = jnp.isfinite(float_of(rewards))
    return is_finite if valid is None else is_finite & jnp.asarray(valid, bool)


def group_advantage(
    rewards: Array,
    group: Array,
    valid: Array | None = None,
    *,
    scale: str = "group",
    baseline: str = "mean",
    epsilon: float = 1e-6,
    ddof: int = 1,
    sample_weight: Array | None = None,
    statistics: BatchStatistics | None = None,
) -> tuple[Array, Metrics]:
    """Reward minus the group's baseline, over a standard deviation.

    A_i = (r_i − b_i) / (σ + ε)

      b_i: the mean reward of i's group, or of the others in it (leave_one_out), or with sample weights ω
        the group's mean of ω_j·r_j
      σ: the standard deviation of i's group, or of the whole batch's rewards; scale = none leaves r_i − b_i

    A group whose valid rewards are all equal, a group of one included, gets exactly 0. Rows with a NaN or
    infinite reward are left out of every statistic and get 0.

    Example:
      >>> rewards, group = jnp.array([1.0, 5.0, 3.0]), jnp.array([7, -2, 7])
      >>> group_advantage(rewards, group, scale="none")[0].tolist()  # group 7: 1 and 3; group −2: one row
      [-1.0, 0.0, 1.0]

    Args:
      rewards: f[N] total reward of every row; constants.
      group: i[N] any integers; rows with the same one are compared, wherever they stand.
      valid: bool[N] rows that count; None for all.
      scale: one of `SCALES`.
      baseline: one of `BASELINES`.
      epsilon: added to the standard deviation (1e-4 in TRL).
      ddof: 1 for the sample standard deviation, 0 for the population's.
      sample_weight: f[N] factors of the rewards in the baseline mean alone (`hacpo`); constants.
      statistics: of the whole batch's usable rewards, for scale = batch (`batch_statistics`); None if these
        rows are all of it.

    Returns:
      advantages: f[N] without gradient, float32 or wider, finite for finite rewards up to 1e18 in size.
      metrics: `reward`, mean over rows; `reward_std`, mean over groups of the group's standard deviation;
        `frac_reward_zero_std`, share of groups with equal rewards; `nonfinite_rewards`, share of the
        valid rows whose reward is NaN or infinite. Groups without a usable row are not counted.

    Raises:
      ValueError: unknown scale or baseline, shapes that differ, or sample weights under leave_one_out.

    References:
      2402.03300 §4.1.2 (mean, group); 2503.20783 (mean, none); 2402.14740 (leave_one_out, none).
    """
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; one of {', '.join(SCALES)}")
    if baseline not in BASELINES:
        raise ValueError(f"unknown baseline {baseline!r}; one of {', '.join(BASELINES)}")
    if sample_weight is not None and baseline != "mean":
        raise ValueError(f"sample_weight weighs a mean over the whole group: baseline {baseline!r} has none")
    rewards = jax.lax.stop_gradient(float_of(rewards))
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid, bool)
    check_same_shape(rewards=rewards, group=group, valid=valid)
    is_finite = jnp.isfinite(rewards)
    counts = valid & is_finite
    rewards = jnp.where(counts, rewards, 0)

    ids = segment_ids(group)
    moments = segment_moments(rewards, ids, counts, ddof=ddof)
    advantages = moments.deviation
    if baseline == "leave_one_out":  # r_i − (S − r_i)/(n−1) = (r_i − S/n)·n/(n−1)
        advantages *= (moments.rows / jnp.maximum(moments.rows - 1, 1))[ids]
    if sample_weight is not None:
        # mean(ω·r) = mean(r) + mean((ω−1)·r): weights of 1 change nothing, not even by rounding
        check_same_shape(rewards=rewards, sample_weight=sample_weight)
        extra = (jax.lax.stop_gradient(float_of(sample_weight)) - 1) * rewards
        advantages -= (segment_sum(extra, ids, counts) / jnp.maximum(moments.rows, 1))[ids]
    if scale == "group":
        advantages /= moments.std[ids] + epsilon
    elif scale == "batch":
        batch = batch_statistics(rewards, counts) if statistics is None else jax.lax.stop_gradient(statistics)
        advantages /= batch.std(ddof) + epsilon
    is_equal = moments.spread == 0
    advantages = jnp.where(counts & ~is_equal[ids], advantages, 0)
    return advantages, {
        "reward": masked_sum(rewards, counts),
        "reward_std": masked_sum(moments.std, moments.rows > 0),
        "frac_reward_zero_std": masked_sum(is_equal, moments.rows > 0),
        "nonfinite_rewards": masked_sum(~is_finite, valid),
    }


def grpo(
    rewards: Array, group: Array, valid: Array | None = None, *, epsilon: float = 1e-6, ddof: int = 1
) -> tuple[Array, Metrics]:
    """GRPO (2402.03300): A = (r − mean)/(std + ε) of the group; arguments as `group_advantage`.

    Example:
      >>> grpo(jnp.array([0.0, 2.0, 4.0]), jnp.array([0, 0, 0]), epsilon=0.0)[0].tolist()  # std = 2
      [-1.0, 0.0, 1.0]
    """
    return group_advantage(rewards, group, valid, epsilon=epsilon, ddof=ddof)


def dr_grpo(rewards: Array, group: Array, valid: Array | None = None) -> tuple[Array, Metrics]:
    """Dr.GRPO (2503.20783): A = r − mean of the group; arguments as `group_advantage`.

    Example:
      >>> dr_grpo(jnp.array([0.0, 2.0, 4.0]), jnp.array([0, 0, 0]))[0].tolist()
      [-2.0, 0.0, 2.0]
    """
    return group_advantage(rewards, group, valid, scale="none")


def rloo(rewards: Array, group: Array, valid: Array | None = None) -> tuple[Array, Metrics]:
    """RLOO (2402.14740): A = r − mean of the group's other rows; arguments as `group_advantage`.

    Example:
      >>> rloo(jnp.array([0.0, 2.0, 4.0]), jnp.array([0, 0, 0]))[0].tolist()
      [-3.0, 0.0, 3.0]
    """
    return group_advantage(rewards, group, valid, scale="none", baseline="leave_one_out")


def hacpo(
    rewards: Array,
    group: Array,
    valid: Array | None = None,
    *,
    sample_weight: Array | None = None,
    epsilon: float = 1e-6,
    ddof: int = 1,
) -> tuple[Array, Metrics]:
    """HACPO (2603.02604): A = (r − mean of ω·r)/(std + ε) over the pooled rollouts of several agents.

    For the learner k, ω of a row is P̂_k/P̂_j, the learner's recent mean reward over that of the agent j that
    wrote the row: other agents' rewards enter the baseline at the learner's level, so a stronger learner has
    a higher one. The standard deviation is that of the rewards as they are. The baseline is the mean reward
    the learner would have where P̂_k/P̂_j holds prompt by prompt. Scaling all rewards changes nothing (but ε),
    and one agent, or weights of 1 (None), is `grpo`.

    Example:
      >>> rewards, weight = jnp.array([0.0, 2.0, 4.0]), jnp.array([1.0, 1.0, 0.25])
      >>> group = jnp.array([0, 0, 0])  # baseline (0 + 2 + 1) / 3, std 2
      >>> hacpo(rewards, group, sample_weight=weight, epsilon=0.0)[0].tolist()
      [-0.5, 0.5, 1.5]

    Args, Returns and Raises: as `group_advantage`; eq. 6 to 8 of the paper. As in the authors' code a group
    of equal rewards gets 0; its further guard, which replaces a baseline above the largest reward possible
    by the mean of the learner's own rows, is left to the caller.
    """
    return group_advantage(rewards, group, valid, epsilon=epsilon, ddof=ddof, sample_weight=sample_weight)


def opo(rewards: Array, group: Array, valid: Array | None = None, *, lengths: Array) -> tuple[Array, Metrics]:
    """OPO (2505.23585): A = r − Σ len_j·r_j / Σ len_j over the group, the baseline of least variance.

    It is the optimal one where a row's squared gradient grows as its length. Rows of equal length make it
    `dr_grpo`.

    Example:
      >>> rewards, lengths = jnp.array([0.0, 2.0, 4.0]), jnp.array([1, 1, 2])  # baseline (0 + 2 + 8) / 4
      >>> opo(rewards, jnp.array([0, 0, 0]), lengths=lengths)[0].tolist()
      [-2.5, -0.5, 1.5]

    Args, Returns and Raises: as `group_advantage`; lengths are i or f[N], the policy's tokens in every row.
    """
    check_same_shape(rewards=rewards, lengths=lengths)
    deviation, metrics = dr_grpo(rewards, group, valid)
    counts = usable_rows(rewards, valid)
    ids = segment_ids(group)
    # baseline − mean = Σ len·(r − mean) / Σ len, which is exactly 0 where all rewards are equal
    weight = jnp.where(counts, jax.lax.stop_gradient(float_of(lengths)), 0).astype(deviation.dtype)
    total = segment_sum(weight, ids, counts)
    shift = segment_sum(weight * deviation, ids, counts) / jnp.where(total > 0, total, 1)
    return jnp.where(counts, deviation - shift[ids], 0), metrics


def reinforce_plus_plus_baseline(
    rewards: Array,
    group: Array,
    valid: Array | None = None,
    *,
    lengths: Array | None = None,
    statistics: BatchStatistics | None = None,
    epsilon: float = 1e-6,
) -> tuple[Array, Metrics]:
    """REINFORCE++ with a group baseline (2501.03262): r − mean of the group, whitened over the batch.

    A_i = (d_i − mean(d)) / (std(d) + ε) with d_i = r_i − mean of i's group; mean and std over the batch's
    tokens, each of which has its row's d

    A group of equal rewards gets 0 rather than −mean/std.

    Example:
      >>> rewards, group = jnp.array([0.0, 2.0, 4.0, 4.0]), jnp.array([0, 0, 1, 1])  # d = −1, 1, 0, 0
      >>> lengths = jnp.array([1, 1, 2, 1])  # over five tokens: mean 0, std √(2/4)
      >>> a, _ = reinforce_plus_plus_baseline(rewards, group, lengths=lengths, epsilon=0.0)
      >>> [round(x, 3) for x in a.tolist()]
      [-1.414, 1.414, 0.0, 0.0]

    Args:
      rewards, group, valid: as `group_advantage`.
      lengths: i[N] the policy's tokens in every row; None to count every row once.
      statistics: of the whole batch's d, weighed by lengths; None if these rows are all of it. A piece makes
        its share as `batch_statistics(dr_grpo(rewards, group)[0], isfinite(rewards), weight=lengths)`.
      epsilon: added to the standard deviation.

    Returns and Raises: as `group_advantage`.
    """
    deviation, metrics = dr_grpo(rewards, group, valid)
    counts = usable_rows(rewards, valid)
    return whiten_groups(
        deviation, group, counts, statistics=statistics, weight=lengths, epsilon=epsilon
    ), metrics
