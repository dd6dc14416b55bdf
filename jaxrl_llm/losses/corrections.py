"""Weights that correct for a sampler whose distribution is not quite the trainer's."""

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import (
    Array,
    Metrics,
    check_same_shape,
    masked,
    masked_max,
    masked_min,
    masked_sum,
)
from jaxrl_llm.losses.ratios import clamp_log_ratio
from jaxrl_llm.losses.surrogates import token_advantages

IMPORTANCE_SAMPLING_CORRECTIONS = (
    "none",
    "token_truncate",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
)


def importance_sampling_correction(
    old_logp: Array,
    behaviour_logp: Array,
    mask: Array,
    *,
    mode: str,
    cap: float = 3.0,
    floor: float = 0.0,
) -> tuple[Array, Metrics]:
    """Importance weights from the sampler's distribution to the trainer's; multiply the token loss by them.

    ρ_t = π_old/π_behaviour at token t, and ρ = Π_t ρ_t over a row's tokens (log-ratios clamped to ±20 nats):

    | mode              | weight of token t                | known as                          |
    |-------------------|----------------------------------|-----------------------------------|
    | none              | 1                                |                                   |
    | token_truncate    | min(max(ρ_t, floor), cap)        | TIS (with floor = 0)              |
    | token_mask        | ρ_t if floor ≤ ρ_t ≤ cap, else 0 | IcePop, 2510.18855 ¹              |
    | sequence_truncate | min(max(ρ, floor), cap)          | sequence-level TIS                |
    | sequence_mask     | ρ if floor ≤ ρ ≤ cap, else 0     | the default in TRL, with cap = 3  |

    ¹ floor = 0.5 and cap = 5 in common use; that these are the paper's own could not be confirmed.

    Example:
      >>> old_logp, behaviour_logp = jnp.log(jnp.array([[0.5, 0.8]])), jnp.log(jnp.array([[0.5, 0.2]]))
      >>> weights, _ = importance_sampling_correction(
      ...     old_logp, behaviour_logp, jnp.ones((1, 2), bool), mode="token_truncate", cap=2.0
      ... )
      >>> weights.tolist()
      [[1.0, 2.0]]

    Args:
      old_logp: f[N, T] log-probs (nats) as the trainer computes them for the params that sampled.
      behaviour_logp: f[N, T] log-probs (nats) of the distribution actually sampled from.
      mask: bool[N, T] tokens that count.
      mode: one of `IMPORTANCE_SAMPLING_CORRECTIONS`.
      cap: largest ratio kept as it is.
      floor: smallest ratio kept as it is.

    Returns:
      weights: f[N, T] without gradient, 1 where masked, float32 or wider.
      metrics: `sampling/importance_sampling_ratio/{min,mean,max}` of the raw ratio, before truncation or
        masking, over tokens or (sequence modes) over rows with a token;
        `sampling/importance_sampling_corrected`, the share of them beyond floor or cap (0 in mode none);
        `sampling/sampling_logp_difference/{mean,max}` of |log π_old − log π_behaviour| (nats) over tokens.

    Raises:
      ValueError: unknown mode, shapes that differ, or not 0 ≤ floor ≤ 1 ≤ cap.
    """
    if mode not in IMPORTANCE_SAMPLING_CORRECTIONS:
        raise ValueError(
            f"unknown importance_sampling_correction {mode!r}; "
            f"one of {', '.join(IMPORTANCE_SAMPLING_CORRECTIONS)}"
        )
    if not 0 <= floor <= 1 <= cap:
        raise ValueError(
            f"floor={floor} and cap={cap} must enclose 1, the ratio of equal policies, and floor be ≥ 0"
        )
    check_same_shape(old_logp=old_logp, behaviour_logp=behaviour_logp, mask=mask)
    d = jax.lax.stop_gradient(masked(old_logp, mask) - masked(behaviour_logp, mask))
    is_sequence = mode.startswith("sequence")
    level_mask = jnp.any(mask, axis=1, keepdims=True) if is_sequence else mask
    ratio = jnp.exp(clamp_log_ratio(jnp.sum(d, axis=1, keepdims=True) if is_sequence else d)[0])
    is_kept = (ratio >= floor) & (ratio <= cap)
    if mode == "none":
        weights, is_kept = jnp.ones_like(ratio), jnp.ones_like(is_kept)
    elif mode.endswith("truncate"):
        weights = jnp.clip(ratio, floor, cap)
    else:
        weights = jnp.where(is_kept, ratio, 0)
    difference = jnp.abs(d)
    return jnp.where(mask, weights, 1), {
        "sampling/importance_sampling_ratio/min": masked_min(ratio, level_mask),
        "sampling/importance_sampling_ratio/mean": masked_sum(ratio, level_mask),
        "sampling/importance_sampling_ratio/max": masked_max(ratio, level_mask),
        "sampling/importance_sampling_corrected": masked_sum(~is_kept, level_mask),
        "sampling/sampling_logp_difference/mean": masked_sum(difference, mask),
        "sampling/sampling_logp_difference/max": masked_max(difference, mask),
    }


def off_policy_sequence_mask(
    logp: Array, behaviour_logp: Array, advantages: Array, mask: Array, *, threshold: float
) -> tuple[Array, Metrics]:
    """Drops what counts against sequences that the policy has left behind; multiply the token loss by it.

    M_t = 0 if A_t < 0 and mean_t (log π_behaviour − log π) > threshold, else 1

    The mean is over the row's tokens. Mistakes that the policy would hardly make any more teach little and
    disturb much; rows with A > 0 stay, however far away.

    Example:
      >>> behaviour_logp, advantages = jnp.full((2, 2), -1.0), jnp.array([[-1.0], [1.0]])
      >>> weights, _ = off_policy_sequence_mask(
      ...     behaviour_logp - 0.75, behaviour_logp, advantages, jnp.ones((2, 2), bool), threshold=0.5
      ... )
      >>> weights.tolist()
      [[0.0, 0.0], [1.0, 1.0]]

    Args:
      logp: f[N, T] log-probs (nats) under the policy in training; constants.
      behaviour_logp: f[N, T] log-probs (nats) of the distribution actually sampled from.
      advantages: f[N, T], or f[N, 1] for one per sequence.
      mask: bool[N, T] tokens that count.
      threshold: δ, nats per token. The paper gives no number; TRL's documentation suggests 0.5.

    Returns:
      weights: f[N, T] of 0 and 1 without gradient, 1 where masked, float32 or wider. The aggregation still
        counts the dropped tokens, as in the paper.
      metrics: `sampling/off_policy_masked`, the share of tokens dropped.

    Raises:
      ValueError: shapes that do not fit.

    References:
      2512.02556 eq. 8 and 9.
    """
    check_same_shape(logp=logp, behaviour_logp=behaviour_logp, mask=mask)
    d = jax.lax.stop_gradient(masked(behaviour_logp, mask) - masked(logp, mask))
    tokens = jnp.sum(mask, axis=1, keepdims=True, dtype=d.dtype)
    is_far = jnp.sum(d, axis=1, keepdims=True) / jnp.maximum(tokens, 1) > threshold
    is_dropped = is_far & (token_advantages(advantages, mask) < 0)
    weights = jnp.where(is_dropped, 0, jnp.ones_like(d))
    return weights, {"sampling/off_policy_masked": masked_sum(is_dropped, mask)}
