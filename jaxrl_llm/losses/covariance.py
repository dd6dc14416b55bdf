"""Clip-Cov and KL-Cov: against a falling entropy, hold back the few tokens that lower it most.

To first order, a step along the natural policy gradient lowers the entropy by the covariance of log-probs and
advantages, and a few tokens make up most of it. Which ones is a statistic of the whole batch, so it is
computed there, once per update, and each micro-batch of the loss gets its part of the result:

  chosen = clip_cov_tokens(logp, old_logp, advantages, mask, key)      # of the global batch: bool[N, T]
  loss, metrics = clip_cov(logp, old_logp, advantages, mask, chosen)   # of any part of it

and kl_cov_tokens with kl_cov in the same way. Both are of 2505.22617, in the form of the authors' code.
"""

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, masked, masked_sum
from jaxrl_llm.losses.ratios import Ratio, log_ratio
from jaxrl_llm.losses.surrogates import beyond_bounds, bounds, ppo_clip, token_advantages

SHARE = 2e-4


def covariance_means(logp: Array, advantages: Array, mask: Array) -> tuple[Array, Array]:
    """Mean log-prob (nats) and mean advantage of a batch's tokens: two scalars f[], 0 without a token.

    Arguments as `token_covariance`, of the global batch.
    """
    check_same_shape(logp=logp, mask=mask)
    logp = masked(jax.lax.stop_gradient(logp), mask)
    tokens = jnp.maximum(jnp.sum(mask, dtype=logp.dtype), 1)
    return jnp.sum(logp) / tokens, jnp.sum(token_advantages(advantages, mask)) / tokens


def token_covariance(
    logp: Array, advantages: Array, mask: Array, mean_logp: Array, mean_advantage: Array
) -> Array:
    """What each token adds to the covariance of log-probs and advantages.

    cov = (log π − mean log π)·(A − mean A)

    Example:
      >>> logp, advantages, mask = jnp.array([[-1.0, -3.0]]), jnp.array([[2.0, -2.0]]), jnp.ones((1, 2), bool)
      >>> token_covariance(logp, advantages, mask, *covariance_means(logp, advantages, mask)).tolist()
      [[2.0, 2.0]]

    Args:
      logp: f[N, T] log-probs (nats) under the policy in training; constants.
      advantages: f[N, T], or f[N, 1] for one per sequence; constants.
      mask: bool[N, T] tokens that count.
      mean_logp, mean_advantage: f[], of the global batch: `covariance_means`.

    Returns:
      f[N, T] (nats × advantage) without gradient, 0 where masked, float32 or wider.

    Raises:
      ValueError: shapes that do not fit.
    """
    check_same_shape(logp=logp, mask=mask)
    above = masked(jax.lax.stop_gradient(logp), mask) - mean_logp
    return jnp.where(mask, above * (token_advantages(advantages, mask) - mean_advantage), 0)


def kl_cov_tokens(logp: Array, advantages: Array, mask: Array, *, share: float = SHARE) -> Array:
    """The tokens of the largest covariance, for `kl_cov`: max(1, ⌊share·n⌋) of a batch's n.

    Example:
      >>> logp, advantages = jnp.array([[-1.0, -2.0, -3.0]]), jnp.array([[2.0, 0.0, -1.0]])
      >>> kl_cov_tokens(logp, advantages, jnp.ones((1, 3), bool)).tolist()  # covariances 5/3, 0 and 4/3
      [[True, False, False]]

    Args:
      logp, advantages, mask: as `token_covariance`, of the global batch.
      share: of the tokens.

    Returns:
      bool[N, T]; none where masked, none at all in a batch without tokens.

    Raises:
      ValueError: shapes that do not fit, or a share outside (0, 1].
    """
    covariance = token_covariance(logp, advantages, mask, *covariance_means(logp, advantages, mask))
    return _highest(covariance, mask, mask, share)


def clip_cov_tokens(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    key: Array,
    *,
    share: float = SHARE,
    lower: float = 1.0,
    upper: float = 5.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    ratio: Ratio = log_ratio,
) -> Array:
    """Tokens drawn at random from those of high covariance, for `clip_cov`: max(1, ⌊share·n⌋) of n.

    Drawn, without replacement, from the tokens with lower < cov < upper that PPO does not clip; all of them
    if they are fewer.

    Args:
      logp, old_logp, advantages, mask: as `clip_cov`, of the global batch.
      key: of `jax.random`. The draw depends on it and on the tokens' places in the arrays.
      share: of the tokens.
      lower, upper: bounds of the covariance (nats × advantage).
      epsilon, epsilon_high, ratio: as `clip_cov`.

    Returns:
      bool[N, T]; none where masked.

    Raises:
      ValueError: shapes that do not fit, a share outside (0, 1], or a negative epsilon.
    """
    covariance = token_covariance(logp, advantages, mask, *covariance_means(logp, advantages, mask))
    d, _ = ratio(jax.lax.stop_gradient(logp), old_logp, mask)
    a = token_advantages(advantages, mask)
    is_low, is_high = beyond_bounds(jnp.exp(d), a, *bounds(epsilon, epsilon_high))
    candidates = mask & (covariance > lower) & (covariance < upper) & ~(is_low | is_high)
    return _highest(jax.random.uniform(key, mask.shape), candidates, mask, share)


def _highest(score: Array, candidates: Array, mask: Array, share: float) -> Array:
    """bool[N, T]: the max(1, ⌊share·n⌋) candidates with the highest score; n counts `mask`."""
    if not 0 < share <= 1:
        raise ValueError(f"share={share} of the tokens must lie in (0, 1]")
    # 2e-4 of 5000 tokens is one token, however float32 rounds
    count = jnp.maximum(jnp.floor(share * (1 + 1e-6) * jnp.sum(mask)), 1)
    order = jnp.argsort(jnp.where(candidates, -score, jnp.inf), axis=None)
    rank = jnp.zeros(mask.size, int).at[order].set(jnp.arange(mask.size))
    return candidates & (rank < count).reshape(mask.shape)


def clip_cov(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    chosen: Array,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    ratio: Ratio = log_ratio,
) -> tuple[Array, Metrics]:
    """Clip-Cov: PPO's clip, and no loss at all for a few tokens of high covariance.

    ℓ = 0 for the chosen tokens, that of `ppo_clip` for all others

    Example:
      >>> logp, chosen = jnp.log(jnp.array([[0.5, 0.5]])), jnp.array([[True, False]])
      >>> clip_cov(logp, logp, jnp.array([[1.0]]), jnp.ones((1, 2), bool), chosen)[0].tolist()
      [[0.0, -1.0]]

    Args:
      logp: f[N, T] log-probs (nats) under the policy in training.
      old_logp: f[N, T] log-probs (nats) under the policy before this batch's updates; constants.
      advantages: f[N, T], or f[N, 1] for one per sequence; constants.
      mask: bool[N, T] tokens that count.
      chosen: bool[N, T], of `clip_cov_tokens` on the global batch.
      epsilon, epsilon_high: as `ppo_clip`; 1 for both in the released scripts, which leaves the ratio
        next to no clip.
      ratio: the function that makes log r of logp, old_logp and mask (`RATIOS`).

    Returns:
      f[N, T] token loss, 0 where masked, float32 or wider. Metrics: those of `ppo_clip`, and
      `clip_ratio/covariance_mean`, the share of tokens chosen.

    Raises:
      ValueError: shapes that do not fit, or a negative epsilon.

    References:
      2505.22617.
    """
    check_same_shape(mask=mask, chosen=chosen)
    loss, metrics = ppo_clip(
        logp, old_logp, advantages, mask, epsilon=epsilon, epsilon_high=epsilon_high, ratio=ratio
    )
    return jnp.where(chosen, 0, loss), metrics | {"clip_ratio/covariance_mean": masked_sum(chosen, mask)}


def kl_cov(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    chosen: Array,
    *,
    coefficient: float = 1.0,
    ratio: Ratio = log_ratio,
) -> tuple[Array, Metrics]:
    """KL-Cov: no clip, and a few tokens of high covariance are held near the old policy.

    ℓ = −A·r, plus coefficient·|log r| for the chosen tokens

    Example:
      >>> logp, chosen = jnp.array([[-1.0, -1.0]]), jnp.array([[True, False]])
      >>> loss, _ = kl_cov(logp, logp - 0.5, jnp.array([[1.0]]), jnp.ones((1, 2), bool), chosen)
      >>> [round(x, 4) for x in loss[0].tolist()]  # −e^½ + ½ and −e^½
      [-1.1487, -1.6487]

    Args:
      logp: f[N, T] log-probs (nats) under the policy in training.
      old_logp: f[N, T] log-probs (nats) under the policy before this batch's updates; constants.
      advantages: f[N, T], or f[N, 1] for one per sequence; constants.
      mask: bool[N, T] tokens that count.
      chosen: bool[N, T], of `kl_cov_tokens` on the global batch.
      coefficient: of the penalty, whose gradient is 0 at r = 1.
      ratio: the function that makes log r of logp, old_logp and mask (`RATIOS`).

    Returns:
      f[N, T] token loss, 0 where masked, float32 or wider. Log-ratios are clamped to ±20 nats (`log_ratio`).
      Metrics: `kl_cov/chosen_mean`, the share of tokens chosen, and `clamped_ratio`.

    Raises:
      ValueError: shapes that do not fit.

    References:
      2505.22617.
    """
    check_same_shape(mask=mask, chosen=chosen)
    d, metrics = ratio(logp, old_logp, mask)
    size = d * jax.lax.stop_gradient(jnp.sign(d))  # |d| by jnp.abs has the gradient 1 at d = 0
    penalty = coefficient * jnp.where(chosen & mask, size, 0)
    loss = penalty - token_advantages(advantages, mask) * jnp.exp(d)
    return loss, metrics | {"kl_cov/chosen_mean": masked_sum(chosen, mask)}
