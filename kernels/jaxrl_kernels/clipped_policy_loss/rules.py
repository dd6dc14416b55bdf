"""The losses as pure functions of arrays, value and closed-form gradient together; every body calls these."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

MAX_LOG_RATIO = 20.0
"""Log-ratios (nats) are held at this before they are exponentiated, with gradient 0 beyond."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is static about a token loss.

    Attributes:
      surrogate: "ppo_clip", "gspo", "cispo" or "dgpo".
      low: lower bound of the ratio, 1−ε.
      high: upper bound of the ratio, 1+ε_high.
      delta: bound of the dual clip (ppo_clip); inf for none.
      left_decay, right_decay: n and m of dgpo.
      beta: weight of the k3 estimate of KL(π‖ref).
    """

    surrogate: str
    low: float
    high: float
    delta: float
    left_decay: float
    right_decay: float
    beta: float


class Operands(NamedTuple):
    """What a loss is computed from.

    Attributes:
      logp, old_logp: f[N, T] (nats).
      ref_logp: f[N, T] (nats), or None for no KL.
      advantages: f[N, T] or f[N, 1].
      mask: bool[N, T] tokens that count; elsewhere the other arrays may hold anything.
    """

    logp: Array
    old_logp: Array
    ref_logp: Array | None
    advantages: Array
    mask: Array


class TokenTerms(NamedTuple):
    """What is added up over a row's tokens; 0 where masked.

    Attributes:
      tokens: 1.
      log_ratio: log π − log π_old, not clamped (nats).
      loss: the token's loss, KL term included; under gspo the KL term alone.
      low, high, dual: 1 beyond the lower bound, the upper one, the dual clip.
      clamped: 1 if the log-ratio was clamped.
      kl: k3 (nats).
      kl_clamped: 1 if the log-ratio under k3 was clamped.
    """

    tokens: Array
    log_ratio: Array
    loss: Array
    low: Array
    high: Array
    dual: Array
    clamped: Array
    kl: Array
    kl_clamped: Array


def _clamp(d: Array) -> tuple[Array, Array]:
    """Log-ratios within the bound, and bool "was outside"; a NaN stays a NaN."""
    outside = jnp.abs(d) > MAX_LOG_RATIO
    return jnp.where(outside, jnp.where(d > 0, MAX_LOG_RATIO, -MAX_LOG_RATIO), d), outside


def _clip(rule: Rule, r: Array, a: Array) -> tuple[Array, Array, Array, Array, Array]:
    """What −A multiplies under PPO's clip, its derivative by log r, and the gates low, high and dual.

    The bounds themselves are inside: at a tie JAX's own derivative of minimum or clip would be a half.
    """
    is_low, is_high = (r < rule.low) & (a < 0), (r > rule.high) & (a > 0)
    is_dual = (r > rule.delta) & (a < 0)
    value = jnp.where(is_low, rule.low, jnp.where(is_high, rule.high, r))
    value = jnp.where(is_dual, rule.delta, value)
    return value, jnp.where(is_low | is_high | is_dual, 0, r), is_low, is_high, is_dual


def token_terms(
    rule: Rule, operands: Operands, *, expm1: Callable[[Array], Array] = jnp.expm1
) -> tuple[TokenTerms, Array]:
    """Terms f[N, T] of every token, and the derivative f[N, T] of its loss by logp.

    Under gspo both lack the policy's part, which `sequence_terms` gives.

    Args:
      rule: static.
      operands: floats of one dtype, float32 or wider.
      expm1: e^x − 1 without loss near 0.
    """
    mask = operands.mask
    logp, old_logp = jnp.where(mask, operands.logp, 0), jnp.where(mask, operands.old_logp, 0)
    a = jnp.where(mask, operands.advantages, 0)
    zero = jnp.zeros_like(logp)
    never = zero > 0
    log_ratio = logp - old_logp
    if rule.surrogate == "gspo":
        loss = slope = zero
        is_low = is_high = is_dual = is_clamped = never
    else:
        d, is_clamped = _clamp(log_ratio)
        r, is_dual = jnp.exp(d), never
        if rule.surrogate == "ppo_clip":
            value, weight, is_low, is_high, is_dual = _clip(rule, r, a)
            weight = jnp.where(is_clamped, 0, weight)
        elif rule.surrogate == "cispo":
            is_low, is_high = mask & (r < rule.low), mask & (r > rule.high)
            weight = jnp.where(is_low, rule.low, jnp.where(is_high, rule.high, r))
            value = weight * logp
        else:
            is_low, is_high = (r < rule.low) & (a < 0), (r > rule.high) & (a > 0)
            # (r/low)^n and (r/high)^(−1/m); no ratio is below a bound that is not above 0
            left = jnp.exp(rule.left_decay * (d - (math.log(rule.low) if rule.low > 0 else 0.0)))
            right = jnp.exp((math.log(rule.high) - d) / rule.right_decay)
            value = r * jnp.where(is_low, left, jnp.where(is_high, right, 1))
            weight = jnp.where(is_clamped, 0, value)
        loss, slope = -a * value, -a * weight
    kl, is_kl_clamped = zero, never
    if operands.ref_logp is not None:
        x, is_kl_clamped = _clamp(logp - jnp.where(mask, operands.ref_logp, 0))
        excess = expm1(-x)
        kl = excess + x
        loss += rule.beta * kl
        slope += jnp.where(is_kl_clamped, 0, -rule.beta * excess)
    terms = TokenTerms(
        tokens=mask.astype(logp.dtype),
        log_ratio=log_ratio,
        loss=loss,
        low=is_low.astype(logp.dtype),
        high=is_high.astype(logp.dtype),
        dual=is_dual.astype(logp.dtype),
        clamped=is_clamped.astype(logp.dtype),
        kl=kl,
        kl_clamped=is_kl_clamped.astype(logp.dtype),
    )
    return terms, slope


def sequence_terms(rule: Rule, sums: TokenTerms, advantages: Array) -> tuple[TokenTerms, Array]:
    """gspo's sums f[N] over the rows' tokens, and the derivative f[N] of a row's sum by each of its tokens.

    Args:
      rule: static.
      sums: f[N] each, of `token_terms`.
      advantages: f[N]; anything in a row without tokens.
    """
    d, is_clamped = _clamp(sums.log_ratio / jnp.maximum(sums.tokens, 1))
    a = jnp.where(sums.tokens > 0, advantages, 0)
    value, weight, is_low, is_high, _ = _clip(rule, jnp.exp(d), a)
    sums = sums._replace(
        loss=sums.loss - sums.tokens * a * value,
        low=sums.tokens * is_low,
        high=sums.tokens * is_high,
        clamped=sums.tokens * is_clamped,
    )
    # n tokens share the row's ratio, whose derivative by the log-prob of one of them is a 1/n of itself
    return sums, jnp.where(is_clamped, 0, -a * weight)
