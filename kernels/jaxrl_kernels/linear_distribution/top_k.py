"""Forward KL over a teacher's top k, from log-probs."""

import jax
import jax.numpy as jnp

Array = jax.Array

LEAST_TAIL = 2.0**-20
"""A tail's mass below this is rounding of the log-probs, which know a sum of probabilities to about 1e-6."""


def top_k_forward_kl(teacher_logp: Array, student_logp: Array, *, tail: bool) -> Array:
    """Forward KL over K listed tokens S of a distribution q (teacher) against p (student), at each position.

    With a tail, the tokens that are not listed count as one event of mass q̄ = 1 − Σ_S q and p̄ = 1 − Σ_S p:

      Σ_S q·(log q − log p) + q̄·(log q̄ − log p̄),

    which is at least 0, at most the KL over all tokens, and equals that at K = V. Without, it is AOPD's form
    (arXiv 2605.06387, eq. 7), not renormalised and of either sign:

      1/K · Σ_S q·(log q − log p).

    Example:
      >>> q, p = jnp.log(jnp.array([0.5, 0.25])), jnp.log(jnp.array([0.25, 0.25]))
      >>> round(float(top_k_forward_kl(q, p, tail=True)), 4)  # 0.5·ln 2 + 0.25·ln 0.5
      0.1733
      >>> round(float(top_k_forward_kl(q, p, tail=False)), 4)  # 0.5·ln 2 / 2
      0.1733

    Args:
      teacher_logp: f32[..., K] log-probs of distinct tokens, as from `linear_top_k`; a constant.
      student_logp: f32[..., K] log-probs of the same tokens.
      tail: whether the rest counts. Tails of less than `LEAST_TAIL` count as that much, with no gradient.

    Returns:
      f32[...], in nats.

    Raises:
      ValueError: shapes that differ, or K = 0.
    """
    if teacher_logp.shape != student_logp.shape or teacher_logp.ndim == 0 or teacher_logp.shape[-1] == 0:
        raise ValueError(
            f"teacher_logp {teacher_logp.shape} and student_logp {student_logp.shape} must be [..., K], K > 0"
        )
    teacher_logp = jax.lax.stop_gradient(teacher_logp.astype(jnp.float32))
    student_logp = student_logp.astype(jnp.float32)
    if not tail:
        q = jnp.exp(teacher_logp)
        surprise = jnp.where(q > 0, teacher_logp - student_logp, 0)
        return jnp.mean(q * surprise, axis=-1)
    return jnp.sum(_term(teacher_logp, student_logp), axis=-1) + _term(
        _log_rest(teacher_logp), _log_rest(student_logp)
    )


def _term(log_q: Array, log_p: Array) -> Array:
    """q·(log q − log p) + p − q ≥ 0, of an event; p − q sums to 0 over all events."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    ratio = jnp.where(q > 0, log_p - log_q, 0)
    near = jnp.clip(ratio, -1, 1)
    # q·(e^ratio − 1 − ratio) does not cancel, and overflows where q is small against p
    return jnp.where((jnp.abs(ratio) < 1) & (q > 0), q * (jnp.expm1(near) - near), p - q - q * ratio)


def _log_rest(logp: Array) -> Array:
    """log(1 − Σ e^logp), without cancellation where one token has nearly all the mass."""
    is_top = jnp.arange(logp.shape[-1]) == jnp.argmax(logp, axis=-1, keepdims=True)
    rest = -jnp.sum(jnp.where(is_top, jnp.expm1(logp), jnp.exp(logp)), axis=-1)
    return jnp.log(jnp.maximum(rest, LEAST_TAIL))
