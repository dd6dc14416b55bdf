"""Losses of value functions."""

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, masked, masked_sum


def clipped_value_loss(
    values: Array, old_values: Array, returns: Array, mask: Array, *, epsilon: float = 0.2
) -> tuple[Array, Metrics]:
    """PPO's value loss: a squared error without gradient where the value has moved by more than ε towards R.

    ℓ = ½·max((V − R)², (V_old + clip(V − V_old, −ε, ε) − R)²)

    The gradient is V − R, and 0 where the value has moved by more than ε and the clipped value is the worse
    of the two; the bound itself still counts as inside.

    Example:
      >>> values, returns = jnp.array([[1.0, 1.0]]), jnp.array([[2.0, 0.0]])
      >>> mask = jnp.ones((1, 2), bool)
      >>> loss, _ = clipped_value_loss(values, jnp.zeros((1, 2)), returns, mask, epsilon=0.5)
      >>> loss.tolist()  # ½·max((1−2)², (0.5−2)²) and ½·max(1², 0.5²)
      [[1.125, 0.5]]

    Args:
      values: f[N, T] V, in units of the return; the gradient flows here.
      old_values: f[N, T] V_old, values before this batch's updates; constants.
      returns: f[N, T] R, targets; constants.
      mask: bool[N, T] tokens that count.
      epsilon: ε ≥ 0, in units of the return; inf gives the plain squared error ½(V − R)².

    Returns:
      f[N, T] token loss, 0 where masked, float32 or wider; metric `clip_ratio/value`, the share of tokens
      without a gradient for the clip's sake.

    Raises:
      ValueError: shapes that differ, or a negative epsilon.

    References:
      After 1707.06347, in whose code it appears.
    """
    if epsilon < 0:
        raise ValueError(f"epsilon={epsilon} must not be negative; inf for no clip")
    check_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    v = masked(values, mask)
    old, target = (masked(jax.lax.stop_gradient(x), mask) for x in (old_values, returns))
    error = (v - target) ** 2
    # A gate rather than maximum: at a tie, which is every token inside the bounds, JAX halves the gradient.
    bounded = old + jax.lax.stop_gradient(jnp.clip(v - old, -epsilon, epsilon))
    bounded_error = (bounded - target) ** 2
    is_clipped = (jnp.abs(v - old) > epsilon) & (bounded_error > error)
    loss = jnp.where(is_clipped, bounded_error, error) / 2
    return loss, {"clip_ratio/value": masked_sum(is_clipped, mask)}
