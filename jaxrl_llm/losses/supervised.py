"""Supervised losses: for the warm start and for fine-tuning on given answers."""

from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, masked, masked_sum


def negative_log_likelihood(logp: Array, mask: Array) -> tuple[Array, Metrics]:
    """Cross-entropy of the given tokens.

    ℓ = −log π

    Example:
      >>> import jax.numpy as jnp
      >>> loss, metrics = negative_log_likelihood(jnp.array([[-1.0, -3.0]]), jnp.ones((1, 2), bool))
      >>> loss.tolist(), float(metrics["nll"].sum / metrics["nll"].weight)
      ([[1.0, 3.0]], 2.0)

    Args:
      logp: f[N, T] log-probs (nats) of the tokens.
      mask: bool[N, T] tokens to learn.

    Returns:
      f[N, T] token loss (nats), 0 where masked, float32 or wider; metric `nll`, its mean over tokens.

    Raises:
      ValueError: shapes that differ.
    """
    check_same_shape(logp=logp, mask=mask)
    loss = -masked(logp, mask)
    return loss, {"nll": masked_sum(loss, mask)}
