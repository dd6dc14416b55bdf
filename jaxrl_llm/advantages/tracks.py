"""Two rewards of one trajectory, each credited to its own tokens: Dual-Track GRPO of TRUST-SQL."""

import jax.numpy as jnp

from jaxrl_llm.advantages.group import group_advantage
from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, masked_sum


def clipped_grpo(
    rewards: Array, group: Array, valid: Array | None = None, *, clip: float = 10.0, epsilon: float = 1e-6
) -> tuple[Array, Metrics]:
    """GRPO with the population's standard deviation, clipped: one track of `dual_track`.

    A = clip((r − mean)/(std + ε), ±clip) of the group

    With the population's standard deviation a row is at most √(n−1) from the mean of n, so that the default
    clip acts in groups of more than 101 rows alone.

    Example:
      >>> clipped_grpo(jnp.array([0.0, 2.0]), jnp.array([0, 0]), epsilon=0.0)[0].tolist()  # std 1, not √2
      [-1.0, 1.0]

    Args, Returns and Raises: as `grpo`; clip: the bound (standard deviations). The metric
    `clipped_advantages` is the share of the valid rows beyond it.

    References:
      2603.16448, as the released training code has it.
    """
    advantages, metrics = group_advantage(rewards, group, valid, epsilon=epsilon, ddof=0)
    valid = jnp.ones(advantages.shape, bool) if valid is None else jnp.asarray(valid, bool)
    metrics["clipped_advantages"] = masked_sum(jnp.abs(advantages) > clip, valid)
    return jnp.clip(advantages, -clip, clip), metrics


def dual_track(
    outcome_rewards: Array,
    prefix_rewards: Array,
    group: Array,
    mask: Array,
    prefix_end: Array,
    valid: Array | None = None,
    *,
    clip: float = 10.0,
    epsilon: float = 1e-6,
) -> tuple[tuple[Array, Array], Metrics]:
    """Token advantages of two tracks: the outcome's at every token, the prefix's at the prefix's tokens.

    outcome: A_it = z(R^outcome)_i       prefix: A_it = z(R^prefix)_i · 1[t < end_i]

    z is `clipped_grpo` of each reward by itself. In TRUST-SQL the prefix is the exploration of an unknown
    schema, its reward says whether the schema proposed was right, and the loss is the outcome track's PPO
    loss plus λ = 0.25 times the prefix track's, each averaged over its own tokens. Two rows of one outcome
    whose prefixes differ in reward are told apart in the prefix and nowhere else. As rewards are
    standardised, their scale has no effect: only λ weighs the tracks.

    Example:
      >>> group, mask = jnp.array([0, 0]), jnp.ones((2, 3), bool)
      >>> (outcome, prefix), _ = dual_track(
      ...     jnp.array([1.0, 1.0]), jnp.array([0.0, 1.0]), group, mask, jnp.array([2, 1]), epsilon=0.0
      ... )
      >>> outcome.tolist()  # equal rewards
      [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
      >>> prefix.tolist()
      [[-1.0, -1.0, 0.0], [1.0, 0.0, 0.0]]

    Args:
      outcome_rewards: f[N] reward of the whole trajectory; constants.
      prefix_rewards: f[N] reward of the prefix; constants.
      group: i[N] any integers; rows with the same one are compared, wherever they stand.
      mask: bool[N, T] tokens that count; tool tokens do not.
      prefix_end: i[N] position on the token axis behind the prefix's last token; 0 for no prefix.
      valid: bool[N] rows that count, in the statistics too; None for all. Aborted rows do not.
      clip, epsilon: as `clipped_grpo`.

    Returns:
      advantages: f[N, T] of the outcome and f[N, T] of the prefix, without gradient, 0 where masked.
      metrics: those of `clipped_grpo`, named `outcome/…` and `prefix/…`.

    Raises:
      ValueError: shapes that differ.

    References:
      2603.16448. The released code clips both tracks at ±10.
    """
    check_same_shape(outcome_rewards=outcome_rewards, prefix_rewards=prefix_rewards, prefix_end=prefix_end)
    in_prefix = mask & (jnp.arange(mask.shape[1]) < prefix_end[:, None])
    advantages: list[Array] = []
    metrics: Metrics = {}
    for name, rewards, tokens in (("outcome", outcome_rewards, mask), ("prefix", prefix_rewards, in_prefix)):
        rows, more = clipped_grpo(rewards, group, valid, clip=clip, epsilon=epsilon)
        advantages.append(jnp.where(tokens, rows[:, None], 0))
        metrics |= {f"{name}/{key}": value for key, value in more.items()}
    return (advantages[0], advantages[1]), metrics
