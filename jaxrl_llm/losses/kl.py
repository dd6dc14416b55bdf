"""Estimators of the KL divergence from a reference policy, as token losses, by name in `KL_ESTIMATORS`.

With x = log π − log π_ref (nats) and r = π/π_old. A token's gradient is weight·∇log π; the expectations are
over one token's distribution, for tokens drawn from π itself:

| name                | loss                       | weight  | expected value       | expected gradient |
|---------------------|----------------------------|---------|----------------------|-------------------|
| k1                  | x                          | 1       | KL(π‖ref)            | 0                 |
| k2                  | x²/2                       | x       | neither KL           | ∇KL(π‖ref)        |
| k3                  | e^−x + x − 1               | 1−e^−x | KL(π‖ref), low noise | ∇KL(ref‖π)        |
| k3_corrected        | r·k3                       | r·x     | KL(π‖ref)            | ∇KL(π‖ref)        |
| k3_score_corrected  | k3·e^(log π − sg(log π))   | x       | KL(π‖ref)            | ∇KL(π‖ref)        |
| k3_straight_through | k2 − sg(k2) + sg(k3)       | x       | KL(π‖ref)            | ∇KL(π‖ref)        |

k1 is a metric or a part of the reward, no loss; k3 has the gradient of the other direction. For tokens drawn
from an older policy π_old, k3_corrected alone keeps its value and its gradient. The expectations of the
others are then Σ π_old·loss and Σ π_old·weight·∇log π, those of no KL to the reference: k1 comes to the
gradient of −KL(π_old‖π). Weights are those inside the clamps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, masked, masked_sum
from jaxrl_llm.losses.ratios import clamp_log_ratio


def _difference(logp: Array, other_logp: Array, mask: Array) -> Array:
    """log π − log π_other, the other a constant; 0 where masked."""
    check_same_shape(logp=logp, other_logp=other_logp, mask=mask)
    return masked(logp, mask) - masked(jax.lax.stop_gradient(other_logp), mask)


def _k3(x: Array) -> Array:
    """e^−x + x − 1; by expm1, as near x = 0 the value is x²/2, which e^−x − 1 would lose to rounding."""
    return jnp.expm1(-x) + x


def kl_k1(
    logp: Array, ref_logp: Array, mask: Array, *, old_logp: Array | None = None
) -> tuple[Array, Metrics]:
    """The log-ratio itself: unbiased for KL(π‖ref), noisy, and without gradient in expectation.

    k1 = log π − log π_ref

    Example:
      >>> loss, _ = kl_k1(jnp.array([[-1.0, -2.0]]), jnp.array([[-1.5, -1.0]]), jnp.ones((1, 2), bool))
      >>> loss.tolist()
      [[0.5, -1.0]]

    Args:
      logp: f[N, T] log-probs (nats) under the policy in training.
      ref_logp: f[N, T] log-probs (nats) under the reference policy; constants.
      mask: bool[N, T] tokens that count.
      old_logp: not used.

    Returns:
      f[N, T] (nats), 0 where masked, float32 or wider; metric `kl`, its mean over tokens.

    Raises:
      ValueError: shapes that differ.
    """
    x = _difference(logp, ref_logp, mask)
    return x, {"kl": masked_sum(x, mask)}


def kl_k2(
    logp: Array, ref_logp: Array, mask: Array, *, old_logp: Array | None = None
) -> tuple[Array, Metrics]:
    """Half the squared log-ratio: the on-policy loss whose expected gradient is that of KL(π‖ref).

    k2 = (log π − log π_ref)² / 2, whose value is biased (the error is of third order in x)

    Example:
      >>> loss, _ = kl_k2(jnp.array([[-1.0, -2.0]]), jnp.array([[-1.5, -1.0]]), jnp.ones((1, 2), bool))
      >>> loss.tolist()
      [[0.125, 0.5]]

    Args, Returns and Raises: as `kl_k1`.
    """
    x = _difference(logp, ref_logp, mask)
    loss = x * x / 2
    return loss, {"kl": masked_sum(loss, mask)}


def kl_k3(
    logp: Array,
    ref_logp: Array,
    mask: Array,
    *,
    old_logp: Array | None = None,
    value_clamp: float | None = None,
) -> tuple[Array, Metrics]:
    """GRPO's estimator: never negative and unbiased for KL(π‖ref), but its gradient is that of KL(ref‖π).

    k3 = e^−x + x − 1 with x = log π − log π_ref, held at ±20 nats with gradient 0 beyond

    Example:
      >>> logp, ref_logp = jnp.log(jnp.array([[0.5, 0.2]])), jnp.log(jnp.array([[0.5, 0.4]]))
      >>> loss, _ = kl_k3(logp, ref_logp, jnp.ones((1, 2), bool))
      >>> [round(k, 4) for k in loss[0].tolist()]  # x = 0 and −ln 2:  2 − ln 2 − 1
      [0.0, 0.3069]

    Args:
      logp, ref_logp, mask, old_logp: as `kl_k1`.
      value_clamp: largest k3 (nats), with gradient 0 beyond; 10 in verl, None for no such clamp. It makes the
        estimate of large divergences too small, and blind to them.

    Returns:
      f[N, T] (nats), 0 where masked, float32 or wider; metrics `kl`, its mean over tokens,
      `kl_clamped_ratio`, the share of tokens with |x| > 20, and with a value clamp
      `kl_value_clamped_ratio`, the share of tokens with k3 beyond it.

    Raises:
      ValueError: shapes that differ, or a value_clamp that is not above 0.

    References:
      2402.03300 eq. 4.
    """
    x, is_clamped = clamp_log_ratio(_difference(logp, ref_logp, mask))
    loss = _k3(x)
    metrics: Metrics = {"kl_clamped_ratio": masked_sum(is_clamped, mask)}
    if value_clamp is not None:
        if value_clamp <= 0:
            raise ValueError(f"value_clamp={value_clamp} must be above 0; None for no clamp")
        is_large = loss > value_clamp
        loss = jnp.where(is_large, value_clamp, loss)
        metrics["kl_value_clamped_ratio"] = masked_sum(is_large, mask)
    return loss, {"kl": masked_sum(loss, mask)} | metrics


def kl_k3_corrected(logp: Array, ref_logp: Array, mask: Array, *, old_logp: Array) -> tuple[Array, Metrics]:
    """k3 times the differentiable ratio: KL(π‖ref) in value and gradient, also for tokens of an older policy.

    ℓ = r·k3 with r = π/π_old; exact as long as neither log-ratio meets the clamp at ±20

    The two derivatives, r·k3 and r·(1 − e^−x), add up to r·x. This is TRL's reference KL by default.

    Example:
      >>> logp, ref_logp = jnp.log(jnp.array([[0.5, 0.2]])), jnp.log(jnp.array([[0.5, 0.4]]))
      >>> old_logp = jnp.log(jnp.array([[0.5, 0.1]]))
      >>> loss, _ = kl_k3_corrected(logp, ref_logp, jnp.ones((1, 2), bool), old_logp=old_logp)
      >>> [round(k, 4) for k in loss[0].tolist()]  # r = 2 at the second token: 2 · 0.3069
      [0.0, 0.6137]

    Args:
      logp, ref_logp, mask: as `kl_k1`.
      old_logp: f[N, T] log-probs (nats) under the policy that the tokens were drawn from; constants.

    Returns:
      f[N, T] (nats), 0 where masked, float32 or wider; metrics `kl`, its mean over tokens, and
      `kl_clamped_ratio`, the share of tokens with |x| or |log r| > 20.

    Raises:
      ValueError: shapes that differ.

    References:
      2512.02556.
    """
    x, is_x_clamped = clamp_log_ratio(_difference(logp, ref_logp, mask))
    d, is_d_clamped = clamp_log_ratio(_difference(logp, old_logp, mask))
    loss = jnp.exp(d) * _k3(x)
    return loss, {
        "kl": masked_sum(loss, mask),
        "kl_clamped_ratio": masked_sum(is_x_clamped | is_d_clamped, mask),
    }


def kl_k3_score_corrected(
    logp: Array, ref_logp: Array, mask: Array, *, old_logp: Array | None = None
) -> tuple[Array, Metrics]:
    """k3 with the score function's part of the gradient: that of KL(π‖ref) for tokens of π itself.

    ℓ = k3·e^(log π − sg(log π)), whose value is k3 and whose gradient is (1 − e^−x + k3)·∇log π = x·∇log π

    Example:
      >>> logp, ref_logp = jnp.log(jnp.array([[0.5, 0.2]])), jnp.log(jnp.array([[0.5, 0.4]]))
      >>> loss = lambda x: kl_k3_score_corrected(x, ref_logp, jnp.ones((1, 2), bool))[0].sum()
      >>> [round(g, 4) for g in jax.grad(loss)(logp)[0].tolist()]  # x
      [0.0, -0.6931]

    Args, Returns and Raises: as `kl_k3`. Beyond the clamp k3 is a constant, and the gradient k3·∇log π.

    References:
      2506.09477; the default in NeMo-RL.
    """
    k3, metrics = kl_k3(logp, ref_logp, mask)
    logp = masked(logp, mask)
    return k3 * jnp.exp(logp - jax.lax.stop_gradient(logp)), metrics


def kl_k3_straight_through(
    logp: Array,
    ref_logp: Array,
    mask: Array,
    *,
    old_logp: Array | None = None,
    value_clamp: float | None = None,
) -> tuple[Array, Metrics]:
    """k3 in value and k2 in gradient: both right for KL(π‖ref), for tokens of π itself.

    ℓ = k2 − sg(k2) + sg(k3); within the clamps the same as `kl_k3_score_corrected`

    Example:
      >>> logp, ref_logp = jnp.log(jnp.array([[0.5, 0.2]])), jnp.log(jnp.array([[0.5, 0.4]]))
      >>> loss, _ = kl_k3_straight_through(logp, ref_logp, jnp.ones((1, 2), bool))
      >>> [round(k, 4) for k in loss[0].tolist()]
      [0.0, 0.3069]

    Args, Returns and Raises: as `kl_k3`; the gradient x·∇log π has no clamp.

    References:
      `k3+` in verl, whose value_clamp is 10.
    """
    k3, metrics = kl_k3(logp, ref_logp, mask, value_clamp=value_clamp)
    k2, _ = kl_k2(logp, ref_logp, mask)
    return jax.lax.stop_gradient(k3) + (k2 - jax.lax.stop_gradient(k2)), metrics


KL_ESTIMATORS: dict[str, Callable[..., tuple[Array, Metrics]]] = {
    "k1": kl_k1,
    "k2": kl_k2,
    "k3": kl_k3,
    "k3_corrected": kl_k3_corrected,
    "k3_score_corrected": kl_k3_score_corrected,
    "k3_straight_through": kl_k3_straight_through,
}
