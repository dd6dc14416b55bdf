"""The entropy bonus."""

from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, masked, masked_sum


def entropy_bonus(entropy: Array, mask: Array) -> tuple[Array, Metrics]:
    """The loss that raises the policy's entropy when added with a positive coefficient.

    ℓ = −H(π(·|context)), the entropy of the whole distribution at each token, no estimate from the sample

    Example:
      >>> import jax.numpy as jnp
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
