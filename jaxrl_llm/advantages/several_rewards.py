"""Several rewards at once, each standardised before they meet: none drowns the others by its scale."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxrl_llm.advantages.group import grpo
from jaxrl_llm.advantages.returns import discounted_returns, usable_tokens
from jaxrl_llm.advantages.whitening import BatchStatistics, batch_statistics, whiten, whiten_groups
from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, float_of, masked_sum
from jaxrl_llm.losses.segments import segment_ids, segment_max, segment_moments

SCOPES = ("group", "position", "batch")


def gdpo_scores(
    rewards: Array,
    group: Array,
    valid: Array | None = None,
    *,
    weights: Sequence[float] | Array | None = None,
    epsilon: float = 1e-6,
    ddof: int = 1,
) -> tuple[Array, Metrics]:
    """GDPO before its last step: the weighted sum of every reward's own group advantage.

    s_i = Σ_k w_k·(r_ik − mean_k)/(std_k + ε), mean_k and std_k of reward k over i's group

    Args:
      rewards: f[N, M] one column per reward function; NaN (or inf) where a function does not apply to the
        row, which is then left out of that reward's statistics. Constants.
      group: i[N] any integers; rows with the same one are compared.
      valid: bool[N] rows that count; None for all.
      weights: M factors w; None for 1 each.
      epsilon: added to the standard deviations.
      ddof: 1 for the sample standard deviation, 0 for the population's.

    Returns:
      scores: f[N] without gradient, float32 or wider.
      metrics: `nonfinite_rewards`, share of the valid rows' M rewards each; `frac_reward_zero_std`, share of
        groups that have a usable row and no score but 0.

    Raises:
      ValueError: shapes or a number of weights that do not fit.
    """
    if jnp.ndim(rewards) != 2:
        raise ValueError(f"rewards {jnp.shape(rewards)} must be [N, M], one column per reward function")
    rewards = jax.lax.stop_gradient(float_of(rewards))
    valid = jnp.ones(rewards.shape[:1], bool) if valid is None else jnp.asarray(valid, bool)
    check_same_shape(first_column=rewards[:, 0], group=group, valid=valid)
    w = jnp.ones(rewards.shape[1]) if weights is None else jax.lax.stop_gradient(jnp.asarray(weights))
    if w.shape != rewards.shape[1:]:
        raise ValueError(f"weights {w.shape} must be {rewards.shape[1:]}, one per column of the rewards")

    def standardise(column: Array) -> Array:
        return grpo(column, group, valid, epsilon=epsilon, ddof=ddof)[0]

    z = jax.vmap(standardise, in_axes=1, out_axes=1)(rewards)
    scores = jnp.sum(z * w.astype(z.dtype), axis=1)
    ids, counts = segment_ids(group), usable_scores(rewards, valid)
    has_rows = segment_max(jnp.ones_like(scores), ids, counts) > 0
    speaks = segment_max(jnp.abs(scores), ids, counts) > 0
    return scores, {
        "nonfinite_rewards": masked_sum(~jnp.isfinite(rewards), valid[:, None]),
        "frac_reward_zero_std": masked_sum(~speaks, has_rows),
    }


def usable_scores(rewards: Array, valid: Array | None = None) -> Array:
    """bool[N]: the valid rows (None for all) with a number among their rewards, f[N, M]."""
    any_finite = jnp.any(jnp.isfinite(float_of(rewards)), axis=1)
    return any_finite if valid is None else any_finite & jnp.asarray(valid, bool)


def gdpo(
    rewards: Array,
    group: Array,
    valid: Array | None = None,
    *,
    weights: Sequence[float] | Array | None = None,
    lengths: Array | None = None,
    statistics: BatchStatistics | None = None,
    epsilon: float = 1e-6,
    ddof: int = 1,
) -> tuple[Array, Metrics]:
    """GDPO: every reward standardised over its group, added up, and the sum standardised over the batch.

    A_i = (s_i − mean(s)) / (std(s) + ε) with s of `gdpo_scores`; mean and std over the batch's rows, as in
    TRL, or over its tokens, as in verl (`lengths`)

    Rewards of which one is on a larger scale, or rarer, count as their weights say. A group in which every
    score is 0 gets 0.

    Example:
      >>> rewards = jnp.array([[0.0, 300.0], [2.0, 100.0], [1.0, 1.0], [1.0, 3.0]])
      >>> a, _ = gdpo(rewards, jnp.array([0, 0, 1, 1]), weights=[2.0, 1.0], epsilon=0.0)
      >>> [round(x, 3) for x in a.tolist()]  # ∓√½·2 ± √½ and 0 ∓ √½: over the batch's std √(2/3)
      [-0.866, 0.866, -0.866, 0.866]

    Args:
      rewards, group, valid, weights: as `gdpo_scores`.
      lengths: i[N] the policy's tokens in every row, each of which counts once in mean(s) and std(s); None
        to count every row once.
      statistics: of the whole batch's s, weighed by lengths; None if these rows are all of it. A piece makes
        its share as `batch_statistics(scores, usable_scores(rewards, valid), weight=lengths)`.
      epsilon: added to the standard deviations (1e-4 in TRL).
      ddof: 1 for the sample standard deviation, 0 for the population's.

    Returns:
      advantages: f[N] without gradient, float32 or wider; 0 in rows to which no reward applies.
      metrics: of `gdpo_scores`.

    Raises:
      ValueError: as `gdpo_scores`.

    References:
      2601.05242.
    """
    scores, metrics = gdpo_scores(rewards, group, valid, weights=weights, epsilon=epsilon, ddof=ddof)
    counts = usable_scores(rewards, valid)
    advantages = whiten_groups(
        scores, group, counts, statistics=statistics, weight=lengths, epsilon=epsilon, ddof=ddof
    )
    return advantages, metrics


def hian(
    rewards: Array,
    turn_rewards: Array,
    turn_mask: Array,
    group: Array,
    valid: Array | None = None,
    *,
    session_weight: float = 1.0,
    turn_weight: float = 1.0,
    gamma: float = 0.0,
    scope: str = "group",
    turn_statistics: BatchStatistics | None = None,
    whitened: bool = False,
    statistics: BatchStatistics | None = None,
    epsilon: float = 1e-6,
    ddof: int = 1,
) -> tuple[Array, Metrics]:
    """HIAN, of DuCA: a dialogue's outcome and its turns' own rewards, standardised apart, then added.

    A_ik = w_S·(R_i − μ_S)/(σ_S + ε) + w_T·(g_ik − μ_T)/(σ_T + ε) with g_ik = Σ_{l≥k} γ^(l−k)·r_il

    μ_S and σ_S are those of i's group; μ_T and σ_T those of all its turns (scope = group), of its turns at
    the same k (position), or of all turns of the batch (batch). Each term is 0 where all that it compares is
    equal. Changing R or r by a positive factor and a constant changes nothing (but ε), so the horizons count
    as w_S and w_T say; GRPO on R_i + Σ_k r_ik would hear only the louder. w_T = 0 is GRPO on R.

    Example:
      >>> rewards, group = jnp.array([100.0, 0.0]), jnp.array([0, 0])
      >>> turn_rewards = jnp.array([[0.0, 1.0], [1.0, 0.0]])
      >>> a, _ = hian(rewards, turn_rewards, jnp.ones((2, 2), bool), group, epsilon=0.0)
      >>> [[round(x, 3) for x in row] for row in a.tolist()]  # ±√½ and ∓½/√⅓
      [[-0.159, 1.573], [0.159, -1.573]]

    Args:
      rewards: f[N] R, the session's reward; constants.
      turn_rewards: f[N, K] r, the turns' rewards; constants.
      turn_mask: bool[N, K] turns that the policy took.
      group: i[N] any integers; dialogues with the same one are compared.
      valid: bool[N] rows that count; None for all.
      session_weight: w_S.
      turn_weight: w_T.
      gamma: γ, discount per turn; 0 for the turn's own reward alone.
      scope: one of `SCOPES`.
      turn_statistics: of g over the whole batch's turns, for scope = batch; None if these rows are all of it.
      whitened: whether A is standardised over the batch's turns at the end (as in GDPO; not by default).
      statistics: of the whole batch's A, for that; None if these rows are all of it.
      epsilon: added to the standard deviations.
      ddof: 1 for the sample standard deviation, 0 for the population's.

    Returns:
      advantages: f[N, K] per turn, without gradient, float32 or wider; `turns_to_tokens` gives them to the
        turns' tokens. 0 where masked and in rows with a NaN or infinite reward of either kind.
      metrics: `reward`, mean over rows; `reward_std` and `frac_reward_zero_std` of the session's rewards over
        groups; `turn_reward`, mean over turns; `nonfinite_rewards`, share of the valid rows left out.

    Raises:
      ValueError: unknown scope, or shapes that do not fit.

    References:
      2603.01481, known by its abstract alone: the formulas are a reconstruction that could not be confirmed.
    """
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}; one of {', '.join(SCOPES)}")
    check_same_shape(turn_rewards=turn_rewards, turn_mask=turn_mask)
    rewards, turn_rewards = float_of(rewards), float_of(turn_rewards)
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid, bool)
    check_same_shape(rewards=rewards, group=group, valid=valid, first_turn=turn_mask[:, 0])
    turn_mask = jnp.asarray(turn_mask, bool) & valid[:, None]
    complete = jnp.all(usable_tokens(turn_rewards, turn_mask) == turn_mask, axis=1)
    counts = valid & jnp.isfinite(rewards) & complete
    turns = turn_mask & counts[:, None]

    session, metrics = grpo(rewards, group, counts, epsilon=epsilon, ddof=ddof)
    to_come = discounted_returns(turn_rewards, turns, gamma=gamma)
    if scope == "batch":
        if turn_statistics is None:
            turn_statistics = batch_statistics(to_come, turns)
        turn_term = whiten(to_come, turn_statistics, turns, epsilon=epsilon, ddof=ddof)
    else:
        size = turns.shape[1]
        ids = segment_ids(group)[:, None] * size + (jnp.arange(size) if scope == "position" else 0)
        ids = jnp.broadcast_to(ids, turns.shape).ravel()
        moments = segment_moments(to_come.ravel(), ids, turns.ravel(), ddof=ddof)
        scale = jnp.where(moments.spread > 0, moments.std + epsilon, 1)
        turn_term = (moments.deviation / scale[ids]).reshape(turns.shape)
    fused = jnp.where(turns, session_weight * session[:, None] + turn_weight * turn_term, 0)
    if whitened:
        fused = whiten_groups(fused, group, turns, statistics=statistics, epsilon=epsilon, ddof=ddof)
    return fused, metrics | {
        "turn_reward": masked_sum(turn_rewards, turns),
        "nonfinite_rewards": masked_sum(~counts, valid),
    }
