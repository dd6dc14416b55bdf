"""The entropy bonus, and a coefficient for it that keeps the entropy near a target.

One step with an adaptive coefficient, from the mean entropies of the steps before it:

  loss, metrics = entropy_bonus(entropy, mask)                    # add coefficient·loss
  coefficient = adaptive_entropy_coefficient(state)
  state = adaptive_entropy_update(state, mean_entropy)            # the batch's, from the metric `entropy`
"""

from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, masked, masked_sum


def entropy_bonus(entropy: Array, mask: Array) -> tuple[Array, Metrics]:
    """The loss that raises the policy's entropy when added with a positive coefficient.

    ℓ = −H(π(·|context)), the entropy of the whole distribution at each token, no estimate from the sample

    Example:
      >>> loss, _ = entropy_bonus(jnp.array([[0.5, 1.5]]), jnp.array([[True, False]]))
      >>> loss.tolist()
      [[-0.5, -0.0]]

    Args:
      entropy: f[N, T] entropy (nats) of the policy's distribution at each token; the gradient flows here.
      mask: bool[N, T] tokens that count.

    Returns:
      f[N, T] −entropy, 0 where masked, float32 or wider; metric `entropy`, its mean over tokens (nats).

    Raises:
      ValueError: shapes that differ.
    """
    check_same_shape(entropy=entropy, mask=mask)
    return -masked(entropy, mask), {"entropy": masked_sum(entropy, mask)}


class AdaptiveEntropyState(NamedTuple):
    """What an adaptive coefficient remembers, from `adaptive_entropy_init`.

    Attributes:
      coefficient: f32[] c, of the bonus while it is on.
      entropy: f32[] the last batch's mean entropy (nats per token); −inf before the first.
    """

    coefficient: Array
    entropy: Array


def adaptive_entropy_init(coefficient: float = 0.0) -> AdaptiveEntropyState:
    """The state before the first batch, where the bonus is on with this coefficient."""
    return AdaptiveEntropyState(jnp.asarray(coefficient, jnp.float32), jnp.asarray(-jnp.inf, jnp.float32))


def adaptive_entropy_coefficient(state: AdaptiveEntropyState, *, target: float = 0.2) -> Array:
    """f32[] the coefficient of this step: c while the last mean entropy is at most the target, else 0.

    Example:
      >>> state = adaptive_entropy_init(0.01)
      >>> low, high = (adaptive_entropy_update(state, jnp.float32(entropy)) for entropy in (0.1, 0.3))
      >>> [round(float(adaptive_entropy_coefficient(state)), 4) for state in (low, high)]
      [0.015, 0.0]
    """
    return jnp.where(state.entropy <= target, state.coefficient, 0)


def adaptive_entropy_update(
    state: AdaptiveEntropyState,
    entropy: Array,
    *,
    target: float = 0.2,
    step: float = 0.005,
    minimum: float = 0.0,
    maximum: float = 1.0,
) -> AdaptiveEntropyState:
    """The coefficient after a batch: a fixed step up while the entropy is low, down while it is high.

    c ← c + δ if H ≤ target, else c − δ, held between minimum and maximum

    Example:
      >>> state = adaptive_entropy_init()
      >>> for entropy in (0.1, 0.2, 0.3):  # up, up (the target itself is low), down
      ...     state = adaptive_entropy_update(state, jnp.float32(entropy))
      >>> round(float(state.coefficient), 4)
      0.005

    Args:
      state: of the last step.
      entropy: f[] H, mean entropy (nats) over the tokens of the whole batch; NaN (no token) changes nothing.
      target: of H (nats); 0.2 in the paper, which a policy meets only close to collapse.
      step: δ.
      minimum, maximum: of c; the paper names none, TRL has these.

    Returns:
      The next state.

    Raises:
      ValueError: a step that is not above 0, or a minimum above the maximum.

    References:
      2505.22312 (MAGIC).
    """
    if step <= 0 or minimum > maximum:
        raise ValueError(f"step={step} must be above 0 and minimum={minimum} at most maximum={maximum}")
    h = jnp.asarray(entropy, jnp.float32)
    c = jnp.clip(jnp.where(h <= target, state.coefficient + step, state.coefficient - step), minimum, maximum)
    is_number = ~jnp.isnan(h)
    return AdaptiveEntropyState(
        jnp.where(is_number, c, state.coefficient), jnp.where(is_number, h, state.entropy)
    )
