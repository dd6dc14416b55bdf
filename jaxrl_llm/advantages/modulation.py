"""DynaMO's token factors of the advantage: more for confident successes, less where entropy would jump.

How much of a token's advantage reaches the logits z depends on the distribution π it was drawn from:

  ‖∂ log π_a/∂z‖² = 1 − 2π_a + Σπ²      0 for a certain token; on average over a ~ π 1 − Σπ², at most H
  ΔH = −ξ·(π_a·Λ_a − Σπ²·Λ)             of a step Δz = ξ·(1[a] − π), to first order, with Λ = log π + H

The first is made up for where the advantage is positive, the second bounds what one token may do. A step:

  change, metrics = entropy_change(logp, old_logp, advantages, mask, entropy, covariance)
  extremes = modulation_extremes(entropy, change, mask)              # of the whole batch
  weights, more = modulation_weights(advantages, entropy, change, mask, extremes)
  advantages = advantages * weights

`covariance` is Σπ²·Λ, the second result of `jaxrl_kernels.linear_distribution.linear_collision`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import (
    Array,
    Metrics,
    check_same_shape,
    float_of,
    masked,
    masked_max,
    masked_min,
    masked_sum,
)
from jaxrl_llm.losses.ratios import log_ratio
from jaxrl_llm.losses.surrogates import bounds, token_advantages

EXPECTATIONS = ("exact", "sequence_mean")

MODULATIONS: dict[str, dict[str, float]] = {
    "decay5": {"max_boost": 1.4, "min_stability": 0.6, "steepness": 50.0, "midpoint": 0.9},
    "decay6": {"max_boost": 1.2, "min_stability": 0.6, "steepness": 50.0, "midpoint": 0.99},
}
"""Options of `modulation_weights` under the released code's names; its script runs decay6."""


class Extremes(NamedTuple):
    """What `modulation_weights` needs of the whole batch; of pieces, the least and the greatest.

    Attributes:
      entropy_low, entropy_high: f[] smallest and largest entropy (nats) of a token; inf and −inf without one.
      change_high: f[] largest size of an entropy change; −inf without a token.
    """

    entropy_low: Array
    entropy_high: Array
    change_high: Array


def entropy_change(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    entropy: Array,
    covariance: Array | None = None,
    *,
    expectation: str = "exact",
    epsilon: float = 0.2,
    epsilon_high: float | None = 0.28,
) -> tuple[Array, Metrics]:
    """How a policy-gradient step on one token changes the entropy of its distribution, per unit of step size.

    ΔH = −ξ·(π_a·Λ_a − Σπ²·Λ) with Λ = log π + H, and ξ = r·A but 0 where PPO's clip with these bounds acts

    To first order in the step on the logits of this position. For ξ that does not depend on the token drawn,
    the mean over the distribution is 0.

    Example:
      >>> p = jnp.array([0.75, 0.25])  # H = 0.5623, Λ = (0.2747, −0.8240), Σπ²Λ = 0.1545 − 0.0515
      >>> entropy = -jnp.sum(p * jnp.log(p))[None, None]
      >>> covariance = jnp.sum(p**2 * (jnp.log(p) + entropy))[None, None]
      >>> logp, one = jnp.log(p[:1])[None], jnp.ones((1, 1))
      >>> change, _ = entropy_change(logp, logp, one, one > 0, entropy, covariance)
      >>> round(float(change[0, 0]), 4)  # −(0.75·0.2747 − 0.1030): more of the likely token, less entropy
      -0.103

    Args:
      logp: f[N, T] log-probs (nats) under the policy in training.
      old_logp: f[N, T] log-probs (nats) under the policy before this batch's updates.
      advantages: f[N, T], or f[N, 1] for one per sequence.
      mask: bool[N, T] tokens that count.
      entropy: f[N, T] H (nats) of the distribution that `logp` is of.
      covariance: f[N, T] Σπ²·Λ of the same; not needed for sequence_mean.
      expectation: one of `EXPECTATIONS`. sequence_mean puts the mean of π_a·Λ_a over the row's tokens, which
        are of other distributions, for Σπ²·Λ and needs no pass over the vocabulary.
      epsilon, epsilon_high: as `ppo_clip`; what the authors' script amounts to.

    Returns:
      f[N, T] without gradient, 0 where masked, float32 or wider; metric `clamped_ratio` of `log_ratio`.

    Raises:
      ValueError: unknown expectation, exact without covariance, or shapes that do not fit.

    References:
      2602.19208. The authors' code approximates the expectation from the sample: by the sequence's mean, and
      in the version that could be read by one Σ_t ξ·π_a²·Λ_a for all tokens of a row, which is not offered.
      Its extremes are those of a micro-batch, padding included.
    """
    if expectation not in EXPECTATIONS:
        raise ValueError(f"unknown expectation {expectation!r}; one of {', '.join(EXPECTATIONS)}")
    check_same_shape(logp=logp, entropy=entropy, mask=mask)
    low, high = bounds(epsilon, epsilon_high)
    d, metrics = log_ratio(jax.lax.stop_gradient(logp), old_logp, mask)
    a, r = token_advantages(advantages, mask), jnp.exp(d)
    step = jnp.where(((a > 0) & (r <= high)) | ((a < 0) & (r >= low)), r * a, 0)
    log_p, h = (masked(jax.lax.stop_gradient(x), mask) for x in (logp, entropy))
    own = masked(jnp.exp(log_p) * (log_p + h), mask)
    if expectation == "sequence_mean":
        tokens = jnp.sum(mask, axis=1, keepdims=True, dtype=own.dtype)
        mean = jnp.sum(own, axis=1, keepdims=True) / jnp.maximum(tokens, 1)
    elif covariance is None:
        raise ValueError("expectation='exact' needs covariance, Σπ²Λ; without it pass 'sequence_mean'")
    else:
        check_same_shape(covariance=covariance, mask=mask)
        mean = masked(jax.lax.stop_gradient(covariance), mask)
    return -step * (own - mean), metrics


def modulation_extremes(entropy: Array, change: Array, mask: Array) -> Extremes:
    """`Extremes` over the tokens that count of f[N, T] entropies (nats) and entropy changes.

    Example:
      >>> entropy, change = jnp.array([[0.5, 2.0, 9.0]]), jnp.array([[0.1, -0.3, 9.0]])
      >>> [round(float(x), 1) for x in modulation_extremes(entropy, change, jnp.array([[True, True, False]]))]
      [0.5, 2.0, 0.3]
    """
    check_same_shape(entropy=entropy, change=change, mask=mask)
    entropy, change = jax.lax.stop_gradient((entropy, change))
    return Extremes(
        masked_min(entropy, mask).value,
        masked_max(entropy, mask).value,
        masked_max(jnp.abs(change), mask).value,
    )


def modulation_weights(
    advantages: Array,
    entropy: Array,
    change: Array,
    mask: Array,
    extremes: Extremes,
    *,
    max_boost: float = 1.4,
    min_stability: float = 0.6,
    steepness: float = 50.0,
    midpoint: float = 0.9,
) -> tuple[Array, Metrics]:
    """Factors β_comp·β_stab of the advantages, from the entropy and from what a step would do to it.

      β_comp = 1 + (μ − 1)·(H_max − H)/(H_max − H_min) where A > 0, else 1
      β_stab = λ + (1 − λ)·σ(γ·(x₀ − |ΔH|/max|ΔH|))

    1 ≤ β_comp ≤ μ falls with the entropy, and λ ≤ β_stab ≤ 1 with the change. Where a batch's extremes are
    equal the factor is 1; μ = λ = 1 leaves every advantage exactly as it is; no advantage changes its sign.

    Example:
      >>> advantages, entropy = jnp.array([[1.0, 1.0, -1.0]]), jnp.array([[0.0, 1.0, 0.0]])
      >>> mask, none = jnp.ones((1, 3), bool), jnp.zeros((1, 3))  # no change of entropy: β_stab = 1
      >>> extremes = modulation_extremes(entropy, none, mask)
      >>> modulation_weights(advantages, entropy, none, mask, extremes, max_boost=1.5)[0].tolist()
      [[1.5, 1.0, 1.0]]

    Args:
      advantages: f[N, T], or f[N, 1] for one per sequence; only the signs are used.
      entropy: f[N, T] H (nats) at every token.
      change: f[N, T] ΔH of `entropy_change`; its scale has no effect.
      mask: bool[N, T] tokens that count.
      extremes: of `modulation_extremes`, over the whole batch; entropies beyond count as the extremes.
      max_boost: μ, at least 1.
      min_stability: λ in [0, 1].
      steepness, midpoint: γ and x₀. The defaults are `MODULATIONS["decay5"]`.

    Returns:
      weights: f[N, T] without gradient, 1 where masked, float32 or wider. Multiply the advantages by them.
      metrics: `modulation/compensation`, mean β_comp over the tokens of positive advantage;
        `modulation/stability`, mean β_stab over all.

    Raises:
      ValueError: options out of range, or shapes that do not fit.

    References:
      2602.19208. The values are those of the authors' code.
    """
    if max_boost < 1 or not 0 <= min_stability <= 1:
        raise ValueError(
            f"max_boost={max_boost} must be at least 1 and min_stability={min_stability} in [0, 1]"
        )
    check_same_shape(entropy=entropy, change=change, mask=mask)
    entropy, change = (masked(jax.lax.stop_gradient(x), mask) for x in (entropy, change))
    lowest, highest, largest = (float_of(jax.lax.stop_gradient(x)) for x in extremes)
    is_up = token_advantages(advantages, mask) > 0

    spread = highest - lowest
    confidence = jnp.where(spread > 0, (highest - entropy) / jnp.where(spread > 0, spread, 1), 0)
    compensation = jnp.where(is_up, 1 + (max_boost - 1) * jnp.clip(confidence, 0, 1), 1)
    share = jnp.abs(change) / jnp.where(largest > 0, largest, 1)
    calm = jnp.where(largest > 0, jax.nn.sigmoid(steepness * (midpoint - share)), 1)
    # 1 − (1 − λ)·(1 − σ): exactly 1 for λ = 1
    stability = 1 - (1 - min_stability) * (1 - calm)
    return jnp.where(mask, compensation * stability, 1), {
        "modulation/compensation": masked_sum(compensation, is_up),
        "modulation/stability": masked_sum(stability, mask),
    }
