"""LLMBoost: a model that learns to undo the mistakes of the one before it in a chain."""

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, masked, masked_sum


def error_suppression(
    logits: Array,
    targets: Array,
    predecessor_tokens: Array,
    mask: Array,
    *,
    beta: float = 0.5,
    margin: float = 1.0,
    correct_weight: float = 1.0,
) -> tuple[Array, Metrics]:
    """Cross-entropy that also pushes the predecessor's wrong first choice below the right token.

    ℓ = w·CE(z, y) + β·1[e ≠ y]·log(1 + exp(z_e − z_y + margin)), w = κ where e = y, else 1

    z are this model's logits, y the right token and e the predecessor's most probable one. Where the
    predecessor is right everywhere, and κ = 1, this is the cross-entropy.

    Example:
      >>> logits, one = jnp.log(jnp.array([[[0.5, 0.25, 0.25]]])), jnp.ones((1, 1), bool)
      >>> loss, _ = error_suppression(logits, jnp.array([[0]]), jnp.array([[1]]), one, margin=0.0)
      >>> round(float(loss[0, 0]), 4)  # ln 2 + ½·ln(1 + 0.25/0.5)
      0.8959

    Args:
      logits: f[N, T, V] of the model in training.
      targets: i[N, T] y, in 0..V−1 where the mask is True.
      predecessor_tokens: i[N, T] e, the argmax of the predecessor's logits.
      mask: bool[N, T] tokens to learn.
      beta: β ≥ 0.
      margin: by how much (nats) the right token is to exceed the wrong one.
      correct_weight: κ ≥ 0; below 1 the chain attends to what is still wrong, as in boosting.

    Returns:
      f[N, T] token loss (nats), 0 where masked, float32 or wider. Metrics, as means over tokens: `nll`, the
      cross-entropy; `predecessor_error_ratio`, the share with e ≠ y; and over those `suppressed_ratio`, the
      share where this model puts the right token above the wrong one.

    Raises:
      ValueError: shapes that do not fit.

    References:
      2512.22309. The paper's equations could not be read: the form of the second term, β, κ and the margin
      follow its abstract and reviews.
    """
    check_same_shape(targets=targets, predecessor_tokens=predecessor_tokens, mask=mask)
    if jnp.shape(logits)[:-1] != jnp.shape(mask):
        raise ValueError(f"logits {jnp.shape(logits)} must be {(*jnp.shape(mask), 'V')}: tokens of the mask")
    z = masked(logits, mask[..., None])
    z_right, z_guess = (
        jnp.take_along_axis(z, tokens[..., None], axis=-1)[..., 0] for tokens in (targets, predecessor_tokens)
    )
    cross_entropy = jax.nn.logsumexp(z, axis=-1) - z_right
    is_error = mask & (predecessor_tokens != targets)
    weight = jnp.where(is_error, 1.0, correct_weight)
    suppression = masked(jax.nn.softplus(z_guess - z_right + margin), is_error)
    return masked(weight * cross_entropy + beta * suppression, mask), {
        "nll": masked_sum(cross_entropy, mask),
        "predecessor_error_ratio": masked_sum(is_error, mask),
        "suppressed_ratio": masked_sum(z_right > z_guess, is_error),
    }
