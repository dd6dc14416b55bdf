"""The definitions: logits in full, in float32 (float64 where the operands are)."""

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy

Array = jax.Array


def log_probs(
    hidden: Array,
    head: Array,
    *,
    temperature: Array | float = 1.0,
    softcap: float | None = None,
    bias: Array | None = None,
) -> Array:
    """log π [N, V]; see `api.linear_gather` for the arguments."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    z = jnp.einsum("nd,vd->nv", hidden, head.astype(hidden.dtype), preferred_element_type=dtype)
    if bias is not None:
        z = z + bias.astype(dtype)
    if softcap is not None:
        z = softcap * jnp.tanh(z / softcap)
    return jax.nn.log_softmax(z / jnp.asarray(temperature, dtype).reshape(-1, 1), axis=1)


def gather(log_p: Array, ids: Array) -> Array:
    """log π at ids [N, K]; 0 outside [0, V)."""
    known = (ids >= 0) & (ids < log_p.shape[1])
    return jnp.where(known, jnp.take_along_axis(log_p, jnp.where(known, ids, 0), axis=1), 0)


def kl(log_p: Array, log_q: Array) -> Array:
    """KL(p‖q) = Σ p·(log p − log q), of [N, V]."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1)


def jsd(student: Array, teacher: Array, beta: float) -> Array:
    """β·KL(teacher‖m) + (1−β)·KL(student‖m) with m = β·teacher + (1−β)·student, of log-probs [N, V]."""
    mixture = jnp.logaddexp(teacher + jnp.log(beta), student + jnp.log1p(-beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def collision(log_p: Array) -> tuple[Array, Array]:
    """Σπ² and Σπ²·(log π + H), of log-probs [N, V]."""
    p = jnp.exp(log_p)
    entropy = -jnp.sum(xlogy(p, p), axis=1, keepdims=True)
    return jnp.sum(p * p, axis=1), jnp.sum(p * p * (log_p + entropy), axis=1)
