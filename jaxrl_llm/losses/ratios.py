"""Log-ratios between two policies: the one clamp of everything exponentiated, and their raw statistics."""

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import (
    Array,
    EffectiveSize,
    Metrics,
    check_same_shape,
    masked,
    masked_max,
    masked_min,
    masked_sum,
)

LOG_RATIO_CLAMP = 20.0  # nats: e^20 = 4.9e8 still squares and sums within float32


def clamp_log_ratio(d: Array, clamp: float = LOG_RATIO_CLAMP) -> tuple[Array, Array]:
    """Clamps log-ratios of any shape to ±clamp nats and says where.

    Returns:
      The clamped values, with gradient 1 inside (the bound included) and 0 outside, and bool "was outside".
      A NaN stays a NaN.
    """
    outside = jnp.abs(d) > clamp
    return jnp.where(outside, jnp.copysign(clamp, jax.lax.stop_gradient(d)), d), outside


def log_ratio(
    logp: Array, old_logp: Array, mask: Array, *, clamp: float = LOG_RATIO_CLAMP
) -> tuple[Array, Metrics]:
    """Log-ratio of two policies at every token, clamped so that its exponential stays finite.

    d = logp − sg(old_logp), held at ±clamp with gradient 0 beyond, and 0 where masked. exp(d) is then the
    importance ratio, between e^−20 and e^20 by default, and 1 where masked.

    Example:
      >>> logp, old_logp = jnp.array([[-1.0, -2.0]]), jnp.array([[-1.5, -900.0]])
      >>> d, metrics = log_ratio(logp, old_logp, jnp.ones((1, 2), bool))
      >>> d.tolist(), float(metrics["clamped_ratio"].sum)
      ([[0.5, 20.0]], 1.0)

    Args:
      logp: f[N, T] log-probs (nats) under the policy in the numerator; the gradient flows here.
      old_logp: f[N, T] log-probs (nats) under the policy in the denominator; a constant.
      mask: bool[N, T] tokens that count.
      clamp: the bound (nats).

    Returns:
      d: f[N, T] (nats), float32 or wider.
      metrics: `clamped_ratio`, the share of tokens beyond the clamp.

    Raises:
      ValueError: shapes that differ.
    """
    check_same_shape(logp=logp, old_logp=old_logp, mask=mask)
    d = masked(logp, mask) - masked(jax.lax.stop_gradient(old_logp), mask)
    d, outside = clamp_log_ratio(d, clamp)
    return d, {"clamped_ratio": masked_sum(outside, mask)}


def sequence_log_ratio(
    logp: Array, old_logp: Array, mask: Array, *, form: str = "sequence", clamp: float = LOG_RATIO_CLAMP
) -> tuple[Array, Metrics]:
    """Log-ratio of two policies per token of a whole sequence, clamped so that its exponential stays finite.

    d_i = mean over the row's tokens of (logp − sg(old_logp)), held at ±clamp with gradient 0 beyond, and 0 in
    a row without tokens. exp(d) is the geometric mean of the row's importance ratios.

    Example:
      >>> logp, old_logp = jnp.array([[-1.0, -2.0]]), jnp.array([[-1.5, -3.5]])
      >>> sequence_log_ratio(logp, old_logp, jnp.ones((1, 2), bool))[0].tolist()  # (0.5 + 1.5) / 2
      [[1.0]]

    Args:
      logp, old_logp, mask, clamp: as `log_ratio`.
      form: "sequence", or "token": the same value at each token, but as sg(d_i) + logp − sg(logp), so that
        the gradient of a token's ratio reaches that token alone.

    Returns:
      d: f[N, 1], or f[N, T] in the token form (nats); float32 or wider.
      metrics: `clamped_ratio`, the share of tokens in sequences beyond the clamp.

    Raises:
      ValueError: shapes that differ, or an unknown form.
    """
    if form not in ("sequence", "token"):
        raise ValueError(f"unknown form {form!r}; one of sequence, token")
    check_same_shape(logp=logp, old_logp=old_logp, mask=mask)
    d = masked(logp, mask) - masked(jax.lax.stop_gradient(old_logp), mask)
    tokens = jnp.sum(mask, axis=1, keepdims=True, dtype=d.dtype)
    d, outside = clamp_log_ratio(jnp.sum(d, axis=1, keepdims=True) / jnp.maximum(tokens, 1), clamp)
    if form == "token":
        own = masked(logp, mask & ~outside)
        d = jax.lax.stop_gradient(d) + (own - jax.lax.stop_gradient(own))
    return d, {"clamped_ratio": masked_sum(outside, mask)}


def ratio_statistics(logp: Array, behaviour_logp: Array, mask: Array) -> Metrics:
    """How far a policy has moved from the one that wrote the tokens, before anything is clipped.

    With w = π/π_behaviour at every token, tokens drawn from π_behaviour:

      effective_sample_size  (Σw)² / (n·Σw²), the share of the n tokens that averages with weights w rest on
      mismatch_kl            mean of w − 1 − ln w (k3): unbiased for KL(π_behaviour ‖ π) and never negative

    Example:
      >>> from jaxrl_llm.losses.aggregation import finalize
      >>> logp, behaviour_logp = jnp.log(jnp.array([[0.2, 0.6]])), jnp.log(jnp.array([[0.4, 0.4]]))
      >>> numbers = finalize(ratio_statistics(logp, behaviour_logp, jnp.ones((1, 2), bool)))
      >>> [round(numbers[f"ratio/{name}"], 4) for name in ("min", "mean", "max")]  # w = 1/2 and 3/2
      [0.5, 1.0, 1.5]
      >>> round(numbers["effective_sample_size"], 4)  # 2² / (2 · (1/4 + 9/4))
      0.8

    Args:
      logp: f[N, T] log-probs (nats) under the policy in training.
      behaviour_logp: f[N, T] log-probs (nats) under the distribution that the tokens were sampled from.
      mask: bool[N, T] tokens that count.

    Returns:
      `ratio/{min,mean,max}`, `effective_sample_size` and `mismatch_kl` (nats per token), without gradient.
      Log-ratios beyond ±20 count as ±20 (`log_ratio`).

    Raises:
      ValueError: shapes that differ.
    """
    d, _ = log_ratio(jax.lax.stop_gradient(logp), behaviour_logp, mask)
    w = jnp.exp(d)
    total, square = masked_sum(w, mask), masked_sum(w * w, mask)
    return {
        "ratio/min": masked_min(w, mask),
        "ratio/mean": total,
        "ratio/max": masked_max(w, mask),
        "effective_sample_size": EffectiveSize(total.sum, square.sum, total.weight),
        # expm1: near d = 0 the value is d²/2, which e^d − 1 would lose to rounding
        "mismatch_kl": masked_sum(jnp.expm1(d) - d, mask),
    }
