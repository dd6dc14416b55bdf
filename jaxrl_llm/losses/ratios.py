"""Log-ratios between two policies: the one clamp of everything exponentiated, and their raw statistics."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

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

Ratio: TypeAlias = Callable[[Array, Array, Array], tuple[Array, Metrics]]
"""(logp, old_logp, mask), f or bool[N, T] -> log-ratios f[N, T] or f[N, 1] (nats) and metrics."""

LOG_RATIO_CLAMP = 20.0  # nats: e^20 = 4.9e8 still squares and sums within float32


def clamp_log_ratio(
    d: Array, clamp: float = LOG_RATIO_CLAMP, clamp_high: float | None = None
) -> tuple[Array, Array]:
    """Clamps log-ratios of any shape to ±clamp nats, or from −clamp to clamp_high, and says where.

    Returns:
      The clamped values, with gradient 1 inside (the bound included) and 0 outside, and bool "was outside".
      A NaN stays a NaN.
    """
    high = clamp if clamp_high is None else clamp_high
    is_high, outside = d > high, (d > high) | (d < -clamp)
    return jnp.where(outside, jnp.where(is_high, high, -clamp).astype(d.dtype), d), outside


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
    logp: Array,
    old_logp: Array,
    mask: Array,
    *,
    form: str = "sequence",
    clamp: float = LOG_RATIO_CLAMP,
    clamp_high: float | None = None,
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
      clamp_high: the upper bound (nats) where it is not `clamp`; 10 in verl, whose lower one is infinite.

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
    d, outside = clamp_log_ratio(
        jnp.sum(d, axis=1, keepdims=True) / jnp.maximum(tokens, 1), clamp, clamp_high
    )
    if form == "token":
        own = masked(logp, mask & ~outside)
        d = jax.lax.stop_gradient(d) + (own - jax.lax.stop_gradient(own))
    return d, {"clamped_ratio": masked_sum(outside, mask)}


CLAMP_GRADIENTS = ("differentiable", "straight_through")


def trrd_log_ratio(
    logp: Array,
    old_logp: Array,
    mask: Array,
    *,
    teacher_logp: Array,
    alpha: float = 0.5,
    clamp: float = 1.0,
    clamp_gradient: str = "differentiable",
) -> tuple[Array, Metrics]:
    """RLAD's trust-region ratio: the log-ratio to an anchor between the old policy and a teacher.

    d = α·(log π − log π_old) + (1−α)·clip(log π − log π_teacher, −clamp, clamp)

    Within the clamp e^d = π / (π_old^α · π_teacher^(1−α)). Under PPO's clip the advantage decides what is
    imitated: where A > 0 a token the policy already gives more than the teacher does gets no gradient, and
    one it gives less is never clipped, but weighs less. A = 0 leaves no influence to the teacher.

    ∂d/∂log π = 1, and α where the clamp acts. At π = π_old the ratio is not 1 but
    (π_old/π_teacher)^(1−α), so tokens may be clipped in the very first update.

    Example:
      >>> logp, old_logp = jnp.array([[-1.0, -1.0]]), jnp.array([[-1.5, -1.0]])
      >>> teacher_logp = jnp.array([[-0.5, -4.0]])  # d = (0.5 − 0.5) / 2 and (0 + min(3, 1)) / 2
      >>> d, _ = trrd_log_ratio(logp, old_logp, jnp.ones((1, 2), bool), teacher_logp=teacher_logp)
      >>> d.tolist()
      [[0.0, 0.5]]

    Args:
      logp, old_logp, mask: as `log_ratio`.
      teacher_logp: f[N, T] log-probs (nats) under the teacher; constants.
      alpha: 1 is `log_ratio`, 0 anchors at the teacher alone. (A sentence of the paper has the direction
        reversed; its formula and appendix are followed here.)
      clamp: bound (nats) on the log-ratio to the teacher; inf switches it off.
      clamp_gradient: "differentiable", the formula's own derivative, 0 beyond the clamp; or
        "straight_through", 1 everywhere. The paper does not say which.

    Returns:
      d: f[N, T] (nats), 0 where masked, float32 or wider. The sum is held at ±20 with gradient 0 beyond.
      metrics: shares of the tokens, `clamped_ratio` beyond ±20 and `teacher_clamped_ratio` beyond `clamp`.

    Raises:
      ValueError: shapes that differ, alpha outside [0, 1], a negative clamp or an unknown clamp_gradient.

    References:
      2602.22495; trust-region ratio distillation (TRRD).
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must lie in [0, 1]: 1 is the old policy alone, 0 the teacher alone")
    if clamp < 0:
        raise ValueError(f"clamp={clamp} must not be negative; inf for no clamp")
    if clamp_gradient not in CLAMP_GRADIENTS:
        raise ValueError(f"unknown clamp_gradient {clamp_gradient!r}; one of {', '.join(CLAMP_GRADIENTS)}")
    check_same_shape(logp=logp, old_logp=old_logp, teacher_logp=teacher_logp, mask=mask)
    own = masked(logp, mask)
    to_old = own - masked(jax.lax.stop_gradient(old_logp), mask)
    to_teacher = own - masked(jax.lax.stop_gradient(teacher_logp), mask)
    to_teacher, is_far = clamp_log_ratio(to_teacher, clamp)
    if clamp_gradient == "straight_through":
        to_teacher = jax.lax.stop_gradient(to_teacher) + (own - jax.lax.stop_gradient(own))
    d, outside = clamp_log_ratio(alpha * to_old + (1 - alpha) * to_teacher)
    return d, {
        "clamped_ratio": masked_sum(outside, mask),
        "teacher_clamped_ratio": masked_sum(is_far, mask),
    }


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


RATIOS: dict[str, Callable[..., tuple[Array, Metrics]]] = {
    "token": log_ratio,
    "sequence": sequence_log_ratio,
    "sequence_token": partial(sequence_log_ratio, form="token"),
    "trrd": trrd_log_ratio,
}
"""What a surrogate's `ratio` may be, by name; "trrd" is one once its `teacher_logp` is given."""
