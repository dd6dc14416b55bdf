"""Advantages from rewards over time: returns and value functions, token by token or turn by turn.

Only tokens that the policy wrote are moments of time: what a tool or a user wrote between two of them (mask
= 0) passes the next moment's value and advantage on, without discount. A reward belongs to a token that the
policy wrote; `at_last_token` puts a row's outcome there. Rows with a NaN or infinite reward get 0 throughout,
and `usable_tokens` says which tokens remain, for the loss and for whitening:

  advantages, returns = gae(rewards, values, mask)
  mask = usable_tokens(rewards, mask)
  advantages = whiten(advantages, batch_statistics(advantages, mask), mask)
"""

import jax
import jax.numpy as jnp

from jaxrl_llm.advantages.whitening import BatchStatistics, batch_statistics, whiten
from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, float_of, masked, masked_sum


def usable_tokens(rewards: Array, mask: Array) -> Array:
    """bool[N, T]: the mask without rows that have a NaN or infinite reward, f[N, T], where `mask`.

    Example:
      >>> rewards = jnp.array([[jnp.nan, 1.0], [jnp.inf, 1.0]])
      >>> usable_tokens(rewards, jnp.array([[True, True], [False, True]])).tolist()
      [[False, False], [False, True]]
    """
    check_same_shape(rewards=rewards, mask=mask)
    mask = jnp.asarray(mask, bool)
    return mask & jnp.all(jnp.isfinite(rewards) | ~mask, axis=1, keepdims=True)


def at_last_token(rewards: Array, mask: Array) -> Array:
    """One reward per row as token rewards: f[N] -> f[N, T], all of it at the last token of `mask`.

    Example:
      >>> at_last_token(jnp.array([2.0]), jnp.array([[True, False, True, False]])).tolist()
      [[0.0, 0.0, 2.0, 0.0]]
    """
    if jnp.shape(rewards) != mask.shape[:1]:
        raise ValueError(f"rewards {jnp.shape(rewards)} must be {mask.shape[:1]}, one per row of the mask")
    so_far = jnp.cumsum(mask, axis=1)
    is_last = mask & (so_far == so_far[:, -1:])
    return jnp.where(is_last, float_of(rewards)[:, None], 0)


def gae(
    rewards: Array, values: Array, mask: Array, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Array, Array]:
    """Generalised advantage estimation over the tokens that the policy wrote.

    δ_t = r_t + γ·V_{t+1} − V_t
    A_t = δ_t + γ·λ·A_{t+1}
    G_t = A_t + V_t

    with t+1 the next token of the mask; V and A are 0 after the last one. λ = 1 makes A the discounted
    return less the value, λ = 0 the one-step error δ.

    Example:
      >>> rewards, values = jnp.array([[0.0, 9.0, 4.0]]), jnp.array([[1.0, 9.0, 2.0]])
      >>> mask = jnp.array([[True, False, True]])  # the middle token is a tool's
      >>> advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
      >>> advantages.tolist()  # δ_2 = 4 − 2; δ_0 = 0.5·2 − 1 = 0 and A_0 = 0 + 0.25·2
      [[0.5, 0.0, 2.0]]
      >>> returns.tolist()
      [[1.5, 0.0, 4.0]]

    Args:
      rewards: f[N, T] reward of every token; constants.
      values: f[N, T] V of the state before every token; constants.
      mask: bool[N, T] tokens that the policy wrote.
      gamma: γ, discount per token.
      lam: λ, 0.95 in TRL and 1 in verl.

    Returns:
      advantages: f[N, T] A, not whitened (verl whitens it over the batch's tokens: `whiten`).
      returns: f[N, T] G, what the value function learns. Both without gradient, float32 or wider, 0 where
        masked and in rows with a NaN or infinite reward.

    Raises:
      ValueError: shapes that differ.

    References:
      1506.02438 eq. 16.
    """
    check_same_shape(rewards=rewards, values=values, mask=mask)
    mask = usable_tokens(rewards, mask)
    r, v = (jax.lax.stop_gradient(masked(x, mask)) for x in (rewards, values))
    advantages = jnp.where(mask, _advantages_to_come(r, v, mask, gamma, lam), 0)
    return advantages, advantages + v


@jax.jit  # for callers without jit: a scan over a body made anew is compiled anew
def _advantages_to_come(rewards: Array, values: Array, mask: Array, gamma: float, lam: float) -> Array:
    """GAE's A of the next token from every position on, that position included."""
    dtype = jnp.promote_types(rewards.dtype, values.dtype)

    def step(carry: tuple[Array, Array], token: tuple[Array, Array, Array]) -> tuple[tuple, Array]:
        next_value, next_advantage = carry
        reward, value, here = token
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = jnp.where(here, value, next_value), jnp.where(here, advantage, next_advantage)
        return carry, carry[1]

    end = jnp.zeros_like(rewards, dtype, shape=rewards.shape[:1])
    tokens = rewards.T.astype(dtype), values.T.astype(dtype), mask.T
    return jax.lax.scan(step, (end, end), tokens, reverse=True)[1].T


def discounted_returns(rewards: Array, mask: Array, *, gamma: float = 1.0) -> Array:
    """Rewards to come, discounted per token that the policy wrote.

    G_t = r_t + γ·G_{t+1}, with t+1 the next token of the mask

    Example:
      >>> rewards, mask = jnp.array([[1.0, 9.0, 2.0]]), jnp.array([[True, False, True]])
      >>> discounted_returns(rewards, mask, gamma=0.5).tolist()
      [[2.0, 0.0, 2.0]]

    Args:
      rewards, mask, gamma: as `gae`.

    Returns:
      f[N, T] G without gradient, float32 or wider, 0 where masked and in rows with a NaN or infinite reward.

    Raises:
      ValueError: shapes that differ.
    """
    return gae(rewards, jnp.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]


def turns_to_tokens(per_turn: Array, turn: Array, mask: Array) -> Array:
    """Every token gets its turn's number: f[N, K] -> f[N, T].

    Example:
      >>> turn, mask = jnp.array([[0, 0, 1]]), jnp.array([[True, False, True]])
      >>> turns_to_tokens(jnp.array([[5.0, 7.0]]), turn, mask).tolist()
      [[5.0, 0.0, 7.0]]

    Args:
      per_turn: f[N, K].
      turn: i[N, T] turn of every token, from 0; tokens of turns outside 0..K−1 get 0.
      mask: bool[N, T] tokens that count; the others get 0.

    Raises:
      ValueError: shapes that do not fit.
    """
    check_same_shape(turn=turn, mask=mask)
    if jnp.ndim(per_turn) != 2 or per_turn.shape[0] != mask.shape[0] or per_turn.shape[1] == 0:
        raise ValueError(f"per_turn {jnp.shape(per_turn)} must be ({mask.shape[0]}, number of turns)")
    last = per_turn.shape[1] - 1
    here = mask & (turn >= 0) & (turn <= last)
    return masked(jnp.take_along_axis(per_turn, jnp.clip(turn, 0, last), axis=1), here)


def turn_level_gae(
    rewards: Array,
    values: Array,
    turn_mask: Array,
    turn: Array,
    mask: Array,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Array, Array]:
    """GAE with a turn as one moment of time: every token of a turn gets the turn's advantage.

    δ_k = R_k + γ·V(s_{k+1}) − V(s_k)
    A_k = δ_k + γ·λ·A_{k+1}

    with s_k the state before turn k. With one token per turn this is `gae`.

    Example:
      >>> rewards, values = jnp.array([[0.0, 4.0]]), jnp.array([[1.0, 2.0]])
      >>> turn, mask = jnp.array([[0, 0, 1]]), jnp.ones((1, 3), bool)
      >>> a, g = turn_level_gae(rewards, values, jnp.ones((1, 2), bool), turn, mask, gamma=0.5, lam=0.5)
      >>> a.tolist(), g.tolist()  # A_1 = 4 − 2; A_0 = 0.5·2 − 1 + 0.25·2
      ([[0.5, 0.5, 2.0]], [[1.5, 4.0]])

    Args:
      rewards: f[N, K] reward of every turn; constants.
      values: f[N, K] V of the state before every turn; constants.
      turn_mask: bool[N, K] turns that the policy took.
      turn: i[N, T] turn of every token, from 0.
      mask: bool[N, T] tokens that the policy wrote.
      gamma: γ, discount per turn.
      lam: λ.

    Returns:
      advantages: f[N, T] A of the token's turn.
      returns: f[N, K] A + V, what the value function learns. Both without gradient, float32 or wider, 0
        where masked and in rows with a NaN or infinite reward.

    Raises:
      ValueError: shapes that do not fit.

    References:
      Turn-PPO, 2512.17008; that its equations are these could not be confirmed.
    """
    advantages, returns = gae(rewards, values, turn_mask, gamma=gamma, lam=lam)
    return turns_to_tokens(advantages, turn, mask), returns


def remax(rewards: Array, greedy_rewards: Array, valid: Array | None = None) -> tuple[Array, Metrics]:
    """ReMax: what sampling gained over decoding greedily.

    A_i = R_i − R(greedy completion of the same prompt)

    Example:
      >>> remax(jnp.array([1.0, 0.0]), jnp.array([0.25, 0.25]))[0].tolist()
      [0.75, -0.25]

    Args:
      rewards: f[N] reward of every sampled row; constants.
      greedy_rewards: f[N] reward of the greedy completion of the row's prompt; constants.
      valid: bool[N] rows that count; None for all.

    Returns:
      advantages: f[N] without gradient, float32 or wider; 0 where either reward is NaN or infinite.
      metrics: `reward` and `greedy_reward`, means over rows; `nonfinite_rewards`, share of the valid rows.

    Raises:
      ValueError: shapes that differ.

    References:
      2310.10505.
    """
    rewards, greedy = (jax.lax.stop_gradient(float_of(x)) for x in (rewards, greedy_rewards))
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid, bool)
    check_same_shape(rewards=rewards, greedy_rewards=greedy, valid=valid)
    is_finite = jnp.isfinite(rewards) & jnp.isfinite(greedy)
    counts = valid & is_finite
    return masked(rewards, counts) - masked(greedy, counts), {
        "reward": masked_sum(rewards, counts),
        "greedy_reward": masked_sum(greedy, counts),
        "nonfinite_rewards": masked_sum(~is_finite, valid),
    }


def reinforce_plus_plus_returns(
    rewards: Array, kl: Array, mask: Array, *, beta: float, gamma: float = 1.0
) -> tuple[Array, Array]:
    """REINFORCE++ before it whitens: the returns G f[N, T] and bool[N, T] where they count.

    Their `batch_statistics`, of both results, are what the pieces of a cut batch have to merge.

    Args: as `reinforce_plus_plus`.
    """
    check_same_shape(rewards=rewards, kl=kl, mask=mask)
    penalised = float_of(rewards) - beta * float_of(kl)
    return discounted_returns(penalised, mask, gamma=gamma), usable_tokens(penalised, mask)


def reinforce_plus_plus(
    rewards: Array,
    kl: Array,
    mask: Array,
    *,
    beta: float,
    gamma: float = 1.0,
    statistics: BatchStatistics | None = None,
    epsilon: float = 1e-6,
) -> tuple[Array, Metrics]:
    """REINFORCE++: returns of the reward less a KL penalty, whitened over the batch's tokens.

    G_t = Σ_{l≥t} γ^(l−t)·(r_l − β·k1_l)
    A_t = (G_t − mean) / (std + ε)

    Example:
      >>> kl, mask = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.ones((2, 2), bool)
      >>> rewards = at_last_token(jnp.array([3.0, 1.0]), mask)
      >>> a, _ = reinforce_plus_plus(rewards, kl, mask, beta=1.0, epsilon=0.0)
      >>> a.tolist()  # G = 3 − 2, 3, 1, 1: mean 1.5, std √((¼ + 9/4 + ¼ + ¼)/3) = 1
      [[-0.5, 1.5], [-0.5, -0.5]]

    Args:
      rewards: f[N, T] reward of every token; `at_last_token` makes it of outcomes. Constants.
      kl: f[N, T] k1 = log π_old − log π_ref of every token (nats), as in `losses.kl_k1`; constants.
      mask: bool[N, T] tokens that the policy wrote; the others neither count nor end a return.
      beta: β of the penalty.
      gamma: γ, discount per token.
      statistics: of the whole batch's G (`reinforce_plus_plus_returns`); None if these rows are all of it.
      epsilon: added to the standard deviation.

    Returns:
      advantages: f[N, T] without gradient, float32 or wider, 0 where masked and in rows with a NaN or
        infinite reward or penalty.
      metrics: `nonfinite_rewards`, the share of those rows.

    Raises:
      ValueError: shapes that differ.

    References:
      2501.03262.
    """
    returns, usable = reinforce_plus_plus_returns(rewards, kl, mask, beta=beta, gamma=gamma)
    if statistics is None:
        statistics = batch_statistics(returns, usable)
    lost = ~jnp.any(usable, axis=1)
    metrics: Metrics = {"nonfinite_rewards": masked_sum(lost, jnp.any(mask, axis=1))}
    return whiten(returns, statistics, usable, epsilon=epsilon), metrics
