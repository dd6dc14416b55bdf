"""Difference rewards: what a turn added to the score of the answer so far (PRAISE, UnityMAS-O).

Scores are those of the answer after each turn, f[N, K+1], the first one before any. Rows may have fewer turns
than K; what stands behind their last score may be anything. A row with a NaN or infinite score among those it
has gets rewards of 0 throughout and is counted in `nonfinite_rewards`: leave it out of what follows.
"""

import jax
import jax.numpy as jnp

from jaxrl_llm.advantages.returns import at_last_token, turns_to_tokens
from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, float_of, masked_sum


def _scored(scores: Array, turns: Array, valid: Array | None = None) -> tuple[Array, Array, Metrics]:
    """Scores with 0 where there is none, bool[N, K+1] where there is one, and the share of rows lost.

    A row that is not valid has no scores; one with a score that is not finite has lost all of them.
    """
    scores = jax.lax.stop_gradient(float_of(scores))
    if scores.ndim != 2 or jnp.shape(turns) != scores.shape[:1]:
        raise ValueError(f"scores {scores.shape} and turns {jnp.shape(turns)} must be [N, K+1] and [N]")
    valid = jnp.ones(scores.shape[:1], bool) if valid is None else jnp.asarray(valid, bool)
    check_same_shape(turns=turns, valid=valid)
    has_score = (jnp.arange(scores.shape[1]) <= turns[:, None]) & valid[:, None]
    usable = jnp.all(jnp.isfinite(scores) | ~has_score, axis=1)
    has_score &= usable[:, None]
    return jnp.where(has_score, scores, 0), has_score, {"nonfinite_rewards": masked_sum(~usable, valid)}


def _added(v: Array, has_score: Array) -> Array:
    """f[N, K] by how much each score exceeds the one before it."""
    return jnp.where(has_score[:, 1:], v[:, 1:] - v[:, :-1], 0)


def turn_differences(scores: Array, turns: Array, valid: Array | None = None) -> tuple[Array, Metrics]:
    """What each turn added: v_t − v_(t−1), which add up to v_last − v_0.

    Example:
      >>> scores = jnp.array([[0.25, 0.5, 1.0], [0.0, 0.75, jnp.nan]])
      >>> turn_differences(scores, jnp.array([2, 1]))[0].tolist()
      [[0.25, 0.5], [0.75, 0.0]]

    Args:
      scores: f[N, K+1] v_0..v_K; constants.
      turns: i[N] number of turns in the row, at most K.
      valid: bool[N] rows that count; None for all.

    Returns:
      differences: f[N, K] of the turns 1..K, 0 behind a row's last; without gradient, float32 or wider.
      metrics: `nonfinite_rewards`, share of the valid rows with a score that is NaN or infinite.

    Raises:
      ValueError: shapes that do not fit.
    """
    v, has_score, metrics = _scored(scores, turns, valid)
    return _added(v, has_score), metrics


def turn_ends(turn: Array, mask: Array) -> Array:
    """bool[N, T] the last token that counts of every turn.

    Example:
      >>> turn, mask = jnp.array([[1, 1, 1, 2, 2]]), jnp.array([[True, True, False, True, True]])
      >>> turn_ends(turn, mask).tolist()
      [[False, True, False, False, True]]

    Args:
      turn: i[N, T] turn number of every token, not decreasing along the row's tokens that count.
      mask: bool[N, T] tokens that count.
    """
    check_same_shape(turn=turn, mask=mask)
    n, size = mask.shape
    at = jax.lax.cummin(jnp.where(mask, jnp.arange(size), size), axis=1, reverse=True)
    following = jnp.concatenate([at[:, 1:], jnp.full((n, 1), size)], axis=1)  # the next token that counts
    next_turn = jnp.take_along_axis(turn, jnp.minimum(following, size - 1), axis=1)
    return mask & ((following == size) | (next_turn != turn))


def praise_rewards(
    scores: Array, outcome: Array, turns: Array, turn: Array, mask: Array, *, alpha: float = 0.5
) -> tuple[Array, Metrics]:
    """PRAISE: token rewards for what each search turn added to the score of the answer given at that point.

      last token of turn t:      α·(v_t − v_(t−1)),  t = 1..turns
      last token of the row:     the outcome (added, if it is a turn's too)

    v_t is the score, F1 for one, of an answer that the same model gives after turn t, asked apart. The
    rewards add up to outcome + α·(v_last − v_0). Without discount the return from turn t on is
    outcome + α·(v_last − v_(t−1)); v_(t−1) is known before the turn is written and so is a baseline: the
    gradient's mean is that of outcome + α·v_last, with less variance. α = 0 is the outcome alone.

    Example:
      >>> scores, turn = jnp.array([[0.0, 0.5, 0.25]]), jnp.array([[1, 1, 1, 2, 2, 3]])
      >>> mask = jnp.array([[True, True, False, True, False, True]])  # two searches with results, the answer
      >>> praise_rewards(scores, jnp.array([1.0]), jnp.array([2]), turn, mask)[0].tolist()
      [[0.0, 0.25, 0.0, -0.125, 0.0, 1.0]]

    Args:
      scores: f[N, K+1] v_0..v_K, in [0, 1]; constants.
      outcome: f[N] score of the row's final answer; constants.
      turns: i[N] number of search turns, at most K.
      turn: i[N, T] turn number of every token: 1..turns of the searches, any other for the rest.
      mask: bool[N, T] tokens that the policy wrote; a row without one does not count.
      alpha: α. Its value could not be confirmed.

    Returns:
      rewards: f[N, T] without gradient, float32 or wider; a process reward lies in [−α, α].
      metrics: `praise/process`, mean over turns of the process reward; `nonfinite_rewards`, share of the rows
        whose outcome, or one of whose scores, is NaN or infinite.

    Raises:
      ValueError: shapes that do not fit.

    References:
      2604.03675, as described by others.
    """
    check_same_shape(turn=turn, mask=mask)
    check_same_shape(outcome=outcome, turns=turns)
    has_token = jnp.any(mask, axis=1)
    # the outcome is one more score, in front, so that it shares their fate
    both = jnp.concatenate([float_of(outcome)[:, None], float_of(scores)], axis=1)
    v, has_score, metrics = _scored(both, turns + 1, has_token)
    process = alpha * _added(v[:, 1:], has_score[:, 1:])
    by_turn = turns_to_tokens(jnp.pad(process, ((0, 0), (1, 0))), turn, mask)  # column t is turn t
    rewards = jnp.where(turn_ends(turn, mask), by_turn, 0) + at_last_token(v[:, 0], mask)
    return rewards, metrics | {"praise/process": masked_sum(process, has_score[:, 2:])}


def search_role_rewards(
    scores: Array, turns: Array, valid: Array | None = None
) -> tuple[dict[str, Array], Metrics]:
    """UnityMAS-O's rewards for searching together: each turn, search, summary, update and answer.

    answer_t: F_t       search_t, summary_t, update_t: F_t − F_(t−1), 0 at t = 0

    A search that ends the work has no answer behind it and gets 0, like all that comes after the last answer.
    A plan, or a final answer apart, gets its own score and needs no function.

    Example:
      >>> rewards, _ = search_role_rewards(jnp.array([[0.25, 0.75, 0.5]]), jnp.array([1]))
      >>> rewards["answer"].tolist(), rewards["search"].tolist()
      ([[0.25, 0.75, 0.0]], [[0.0, 0.5, 0.0]])

    Args:
      scores: f[N, K+1] F_0..F_K, the F1 of each turn's answer; constants.
      turns: i[N] last turn with an answer, at most K.
      valid: bool[N] rows that count; None for all.

    Returns:
      rewards: f[N, K+1] by role, column t for turn t; without gradient, float32 or wider.
      metrics: `nonfinite_rewards`, as `turn_differences`.

    Raises:
      ValueError: shapes that do not fit.

    References:
      2605.26646, from the authors' code.
    """
    answer, has_score, metrics = _scored(scores, turns, valid)
    added = jnp.pad(_added(answer, has_score), ((0, 0), (1, 0)))
    return {"answer": answer, "search": added, "summary": added, "update": added}, metrics


def coding_role_rewards(
    pass_rates: Array, turns: Array, valid: Array | None = None
) -> tuple[dict[str, Array], Metrics]:
    """UnityMAS-O's rewards for writing code together: each turn, planner and coder, then the reflector.

    planner_t, coder_t: R_t − R_(t−1), R_0 at t = 0       reflector_t: R_(t+1) − R_t, 0 without a next turn

    Example:
      >>> rewards, _ = coding_role_rewards(jnp.array([[0.25, 0.75, 0.5]]), jnp.array([2]))
      >>> rewards["coder"].tolist(), rewards["reflector"].tolist()
      ([[0.25, 0.5, -0.25]], [[0.5, -0.25, 0.0]])

    Args:
      pass_rates: f[N, K+1] R_0..R_K, the share of tests that each turn's program passes; constants.
      turns: i[N] last turn with a program, at most K.
      valid: bool[N] rows that count; None for all.

    Returns, Raises and References: as `search_role_rewards`.
    """
    rates, has_score, metrics = _scored(pass_rates, turns, valid)
    added = _added(rates, has_score)
    author = jnp.concatenate([rates[:, :1], added], axis=1)
    return {"planner": author, "coder": author, "reflector": jnp.pad(added, ((0, 0), (0, 1)))}, metrics


def shared_role_rewards(final: Array, nodes: Array) -> tuple[Array, Metrics]:
    """UnityMAS-O's trajectory-level rewards: the final score for every node that ran.

    Example:
      >>> shared_role_rewards(jnp.array([0.5, 1.0]), jnp.array([[True, True], [True, False]]))[0].tolist()
      [[0.5, 0.5], [1.0, 0.0]]

    Args:
      final: f[N] score of the trajectory; constants.
      nodes: bool[N, R] the model's nodes (roles, turns) that ran; a row without one does not count.

    Returns:
      rewards: f[N, R] without gradient, float32 or wider; metrics: `nonfinite_rewards`.

    Raises:
      ValueError: shapes that do not fit.

    References:
      2605.26646, from the authors' code.
    """
    nodes = jnp.asarray(nodes, bool)
    if nodes.ndim != 2:
        raise ValueError(f"nodes {nodes.shape} must be [N, R]")
    score, _, metrics = _scored(final[:, None], jnp.zeros(nodes.shape[0], jnp.int32), jnp.any(nodes, axis=1))
    return jnp.where(nodes, score, 0), metrics


def with_format_penalty(rewards: Array, is_malformed: Array, *, weight: float) -> Array:
    """UnityMAS-O's total of a node: its task reward, less `weight` where its own output is malformed.

    Example:
      >>> with_format_penalty(jnp.array([0.5, 0.5]), jnp.array([False, True]), weight=1.0).tolist()
      [0.5, -0.5]
    """
    check_same_shape(rewards=rewards, is_malformed=is_malformed)
    return float_of(rewards) - weight * is_malformed
