"""Surrogates whose tokens keep a gradient beyond the bounds, where the clip of PPO has none."""

import math

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import Array, Metrics, masked, masked_sum
from jaxrl_llm.losses.ratios import Ratio, log_ratio
from jaxrl_llm.losses.surrogates import (
    beyond_bounds,
    bounds,
    check_dual_clip,
    clip_shares,
    token_advantages,
)


def weighted(weight: Array, d: Array) -> Array:
    """A weight as a constant that multiplies the gradient of d: value w, gradient w·∇d."""
    return jax.lax.stop_gradient(weight) * jnp.exp(d - jax.lax.stop_gradient(d))


def cispo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    ratio: Ratio = log_ratio,
) -> tuple[Array, Metrics]:
    """CISPO: REINFORCE under a clipped importance weight, so that no token loses its gradient.

    ℓ = −sg(clip(r, 1−ε, 1+ε_high))·A·log π with r = π/π_old

    Example:
      >>> logp, old_logp = jnp.log(jnp.array([[0.5, 0.25]])), jnp.log(jnp.array([[0.25, 0.25]]))
      >>> loss, _ = cispo(logp, old_logp, jnp.array([[1.0]]), jnp.ones((1, 2), bool))
      >>> [round(x, 4) for x in loss[0].tolist()]  # r = 2 and 1: 1.2·ln 2 and ln 4
      [0.8318, 1.3863]

    Args:
      logp: f[N, T] log-probs (nats) under the policy in training.
      old_logp: f[N, T] log-probs (nats) under the policy before this batch's updates; constants.
      advantages: f[N, T], or f[N, 1] for one per sequence; constants.
      mask: bool[N, T] tokens that count.
      epsilon: lower bound 1−ε of the weight, and upper bound 1+ε unless `epsilon_high` is given; 1 or more
        for no lower bound, as in the paper's experiments.
      epsilon_high: upper bound 1+ε_high. (TRL's option of that name is the bound itself, not this one.)
      ratio: the function that makes log r of logp, old_logp and mask (`RATIOS`).

    Returns:
      f[N, T] token loss, 0 where masked, float32 or wider. Log-ratios are clamped to ±20 nats (`log_ratio`).
      Metrics, as shares of the tokens whatever the advantage: `clip_ratio/low_mean` (r < 1−ε),
      `clip_ratio/high_mean` (r > 1+ε_high), `clip_ratio/region_mean` (either), `clamped_ratio`.

    Raises:
      ValueError: shapes that do not fit, or a negative epsilon.

    References:
      2506.13585 eq. 4 and 5.
    """
    low, high = bounds(epsilon, epsilon_high)
    d, metrics = ratio(jax.lax.stop_gradient(logp), old_logp, mask)
    r = jnp.exp(d)
    is_low, is_high = r < low, r > high
    weight = jnp.where(is_low, low, jnp.where(is_high, high, r))
    loss = -weight * token_advantages(advantages, mask) * masked(logp, mask)
    return loss, metrics | clip_shares(is_low, is_high, mask)


def dgpo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    left_decay: float = 1.0,
    right_decay: float = 2.0,
    ratio: Ratio = log_ratio,
) -> tuple[Array, Metrics]:
    """DGPO: beyond the bounds the gradient decays with the probability itself instead of stopping.

    ℓ = −A·r̃, where one factor π of r̃ carries the gradient, so that r̃ is also the weight of −A·∇log π:

      r < 1−ε and A < 0:       r̃ = r^(n+1) / (1−ε)^n
      r > 1+ε_high and A > 0:  r̃ = r^(1−1/m)·(1+ε_high)^(1/m)
      else:                    r̃ = r = π/π_old

    r̃ is continuous at both bounds. n = 0 or m → ∞ is no clip on that side, n → ∞ the hard clip, and m = 1
    the constant weight 1+ε_high of GPPO and CISPO. Of the gradient by π itself, −A·r̃/π, the left part
    vanishes as π → 0 once n ≥ 1, and the right part falls as π grows.

    Example:
      >>> r, advantages = jnp.array([[0.1, 4.8]]), jnp.array([[-1.0, 1.0]])
      >>> loss, _ = dgpo(jnp.log(r), jnp.zeros((1, 2)), advantages, jnp.ones((1, 2), bool))
      >>> [round(x, 4) for x in loss[0].tolist()]  # 0.1² / 0.8 and −√(4.8 · 1.2)
      [0.0125, -2.4]

    Args:
      logp: f[N, T] log-probs (nats) under the policy in training.
      old_logp: f[N, T] log-probs (nats) under the policy before this batch's updates; constants.
      advantages: f[N, T], or f[N, 1] for one per sequence; constants.
      mask: bool[N, T] tokens that count.
      epsilon: lower bound 1−ε, and upper bound 1+ε unless `epsilon_high` is given; inf switches it off.
      epsilon_high: upper bound 1+ε_high.
      left_decay: n ≥ 0, any real number; 1 in the released scripts, 2 for their smallest model.
      right_decay: m ≥ 1, any real number; 2 in the released scripts.
      ratio: the function that makes log r of logp, old_logp and mask (`RATIOS`).

    Returns:
      f[N, T] token loss, 0 where masked, float32 or wider. Log-ratios are clamped to ±20 nats (`log_ratio`).
      Metrics, as shares of the tokens: `clip_ratio/low_mean` and `clip_ratio/high_mean` (the two regions),
      `clip_ratio/region_mean` (either), `clamped_ratio`.

    Raises:
      ValueError: shapes that do not fit, a negative epsilon, n < 0 or m < 1.

    References:
      2603.14389, in the form of the authors' code.
    """
    low, high = bounds(epsilon, epsilon_high)
    if left_decay < 0 or right_decay < 1:
        raise ValueError(
            f"left_decay={left_decay} must be at least 0 and right_decay={right_decay} at least 1"
        )
    d, metrics = ratio(logp, old_logp, mask)
    a = token_advantages(advantages, mask)
    r = jnp.exp(d)
    is_low, is_high = beyond_bounds(r, a, low, high)
    # (r/(1−ε))^n and (r/(1+ε_high))^(−1/m), as constants; no ratio is below a bound that is not above 0
    constant = jax.lax.stop_gradient(d)
    left = jnp.exp(left_decay * (constant - (math.log(low) if low > 0 else 0.0)))
    right = jnp.exp((math.log(high) - constant) / right_decay)
    decay = jnp.where(is_low, left, jnp.where(is_high, right, 1))
    return -a * r * decay, metrics | clip_shares(is_low, is_high, mask)


def gppo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    ratio: Ratio = log_ratio,
) -> tuple[Array, Metrics]:
    """GPPO: a token beyond the bounds keeps its gradient, at the weight that it has on the bound.

    `ce_gppo` with β1 = β2 = 1; arguments, metrics and errors as there.

    Example:
      >>> r, advantages = jnp.array([[0.1, 4.8]]), jnp.array([[-1.0, 1.0]])
      >>> loss, _ = gppo(jnp.log(r), jnp.zeros((1, 2)), advantages, jnp.ones((1, 2), bool))
      >>> [round(x, 4) for x in loss[0].tolist()]
      [0.8, -1.2]

    References:
      2508.07629.
    """
    return ce_gppo(
        logp,
        old_logp,
        advantages,
        mask,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        delta=delta,
        beta1=1.0,
        beta2=1.0,
        ratio=ratio,
    )


def ce_gppo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta1: float = 0.75,
    beta2: float = 1.0,
    ratio: Ratio = log_ratio,
) -> tuple[Array, Metrics]:
    """CE-GPPO: tokens beyond the bounds keep a scaled gradient, which steers the entropy.

    ℓ = −A·w, with gradient −A·w·∇log π:

      r < 1−ε and A < 0:       w = β1·(1−ε)
      r > 1+ε_high and A > 0:  w = β2·(1+ε_high)
      else:                    w = r = π/π_old

    Tokens left of the bounds, already unlikely and pushed further down, lower the entropy as β1 grows; those
    on the right are mostly unlikely ones gaining, and raise it with β2. β1 = β2 = 0 has the gradient of
    `ppo_clip`.

    Example:
      >>> r, advantages = jnp.array([[0.1, 4.8]]), jnp.array([[-1.0, 1.0]])
      >>> loss, _ = ce_gppo(jnp.log(r), jnp.zeros((1, 2)), advantages, jnp.ones((1, 2), bool))
      >>> [round(x, 4) for x in loss[0].tolist()]  # 0.75 · 0.8 and −1 · 1.2
      [0.6, -1.2]

    Args:
      logp: f[N, T] log-probs (nats) under the policy in training.
      old_logp: f[N, T] log-probs (nats) under the policy before this batch's updates; constants.
      advantages: f[N, T], or f[N, 1] for one per sequence; constants.
      mask: bool[N, T] tokens that count.
      epsilon: lower bound 1−ε, and upper bound 1+ε unless `epsilon_high` is given; inf switches it off.
      epsilon_high: upper bound 1+ε_high.
      delta: the dual clip of `ppo_clip`: no gradient where r > δ and A < 0. None, as in the paper, switches
        it off; the released code has 3.
      beta1: β1 ≥ 0; 0.75 for 7B and 0.5 for 1.5B parameters in the released scripts.
      beta2: β2 ≥ 0.
      ratio: the function that makes log r of logp, old_logp and mask (`RATIOS`).

    Returns:
      f[N, T] token loss, 0 where masked, float32 or wider. Log-ratios are clamped to ±20 nats (`log_ratio`).
      Metrics as `ppo_clip`.

    Raises:
      ValueError: shapes that do not fit, a negative epsilon, β1 or β2, or delta ≤ 1.

    References:
      2509.20712.
    """
    low, high = bounds(epsilon, epsilon_high)
    check_dual_clip(delta)
    if beta1 < 0 or beta2 < 0:
        raise ValueError(f"beta1={beta1} and beta2={beta2} must not be negative")
    d, metrics = ratio(logp, old_logp, mask)
    a = token_advantages(advantages, mask)
    r = jnp.exp(d)
    is_low, is_high = beyond_bounds(r, a, low, high)
    weight = jnp.where(is_low, beta1 * low, jnp.where(is_high, beta2 * high, r))
    metrics |= clip_shares(is_low, is_high, mask)
    if delta is not None:
        is_dual = (r > delta) & (a < 0)
        weight, d = jnp.where(is_dual, delta, weight), jnp.where(is_dual, jax.lax.stop_gradient(d), d)
        metrics["clip_ratio/dual_mean"] = masked_sum(is_dual, mask)
    return -a * weighted(weight, d), metrics


def aspo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    cap: float = 3.0,
    ratio: Ratio = log_ratio,
) -> tuple[Array, Metrics]:
    """ASPO: where A > 0 the ratio is inverted, so that the tokens that lag behind gain most.

    ℓ = −A·w, with gradient −A·w·∇log π except beyond the bounds of PPO, where it is constant as in PPO:

      A > 0: w = min(1/r, cap) up to r = 1+ε_high, 1/(1+ε_high) beyond
      A < 0: w = min(r, cap) from r = 1−ε on, 1−ε below

    The cap is a soft dual clip: it bounds the weight and keeps the gradient.

    Example:
      >>> r, advantages = jnp.array([[0.5, 0.1, 2.0]]), jnp.array([[1.0]])
      >>> loss, _ = aspo(jnp.log(r), jnp.zeros((1, 3)), advantages, jnp.ones((1, 3), bool), epsilon=0.25)
      >>> [round(x, 4) for x in loss[0].tolist()]  # −1/r, the cap, −1/1.25 without a gradient
      [-2.0, -3.0, -0.8]

    Args:
      logp: f[N, T] log-probs (nats) under the policy in training.
      old_logp: f[N, T] log-probs (nats) under the policy before this batch's updates; constants.
      advantages: f[N, T], or f[N, 1] for one per sequence; constants.
      mask: bool[N, T] tokens that count.
      epsilon: lower bound 1−ε, and upper bound 1+ε unless `epsilon_high` is given; inf switches it off.
      epsilon_high: upper bound 1+ε_high.
      cap: largest weight, at least 1; inf switches it off. The paper's number could not be confirmed: 3 is
        that of the public implementations.
      ratio: the function that makes log r of logp, old_logp and mask (`RATIOS`).

    Returns:
      f[N, T] token loss, 0 where masked, float32 or wider. Log-ratios are clamped to ±20 nats (`log_ratio`).
      Metrics: the clip ratios of `ppo_clip`, `clip_ratio/dual_mean` (share of the tokens beyond the cap) and
      `clamped_ratio`.

    Raises:
      ValueError: shapes that do not fit, a negative epsilon, or a cap below 1.

    References:
      2510.06062.
    """
    low, high = bounds(epsilon, epsilon_high)
    if cap < 1:
        raise ValueError(f"cap={cap} must be at least 1, the weight on-policy; inf for no cap")
    d, metrics = ratio(logp, old_logp, mask)
    a = token_advantages(advantages, mask)
    r = jnp.exp(d)
    is_low, is_high = beyond_bounds(r, a, low, high)
    weight = jnp.exp(jnp.where(a > 0, -d, d))
    is_capped = (weight > cap) & (a != 0)
    weight = jnp.where(is_low, low, jnp.where(is_high, 1 / high, jnp.where(is_capped, cap, weight)))
    d = jnp.where(is_low | is_high, jax.lax.stop_gradient(d), d)
    metrics |= clip_shares(is_low, is_high, mask) | {"clip_ratio/dual_mean": masked_sum(is_capped, mask)}
    return -a * weighted(weight, d), metrics


def sapo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    temperature_pos: float = 1.0,
    temperature_neg: float = 1.05,
    ratio: Ratio = log_ratio,
) -> tuple[Array, Metrics]:
    """SAPO: a smooth gate in place of the clip.

    ℓ = −A·(4/τ)·σ(τ·(r−1)), τ by the sign of A; gradient −A·4σ(1−σ)·r·∇log π

    The gate 4σ(1−σ) is 1 at r = 1 and falls on both sides, faster for a larger τ; τ → 0 is no clip, in the
    gradient.

    Example:
      >>> r, advantages = jnp.array([[1.0, 2.0]]), jnp.array([[1.0]])
      >>> loss, _ = sapo(jnp.log(r), jnp.zeros((1, 2)), advantages, jnp.ones((1, 2), bool))
      >>> [round(x, 4) for x in loss[0].tolist()]  # −4·σ(0) and −4·σ(1)
      [-2.0, -2.9242]

    Args:
      logp: f[N, T] log-probs (nats) under the policy in training.
      old_logp: f[N, T] log-probs (nats) under the policy before this batch's updates; constants.
      advantages: f[N, T], or f[N, 1] for one per sequence; constants.
      mask: bool[N, T] tokens that count.
      temperature_pos: τ > 0 where A > 0.
      temperature_neg: τ > 0 elsewhere; the larger, as lowering one token's probability raises many others'.
      ratio: the function that makes log r of logp, old_logp and mask (`RATIOS`).

    Returns:
      f[N, T] token loss, 0 where masked, float32 or wider; the paper's objective under the aggregation
      seq_mean_token_mean. Log-ratios are clamped to ±20 nats (`log_ratio`); metric `clamped_ratio`.

    Raises:
      ValueError: shapes that do not fit, or a temperature that is not positive.

    References:
      2511.20347.
    """
    if temperature_pos <= 0 or temperature_neg <= 0:
        raise ValueError(
            f"temperature_pos={temperature_pos} and temperature_neg={temperature_neg} must be positive"
        )
    d, metrics = ratio(logp, old_logp, mask)
    a = token_advantages(advantages, mask)
    tau = jnp.where(a > 0, temperature_pos, temperature_neg)
    return -a * (4 / tau) * jax.nn.sigmoid(tau * (jnp.exp(d) - 1)), metrics
