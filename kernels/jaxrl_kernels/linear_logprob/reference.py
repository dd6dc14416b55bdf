"""The definition: logits in full, in float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class LogprobStats(NamedTuple):
    """Per row, float32[N], in nats: log-prob of the target, entropy, log-sum-exp of the logits."""

    logp: Array
    entropy: Array
    lse: Array


def linear_logprob(
    hidden: Array,
    head: Array,
    targets: Array,
    *,
    temperature: Array | float = 1.0,
    softcap: float | None = None,
    bias: Array | None = None,
) -> LogprobStats:
    """Materialises [N, V] logits; see `api.linear_logprob` for the arguments."""
    z = jnp.einsum("nd,vd->nv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if bias is not None:
        z = z + bias.astype(jnp.float32)
    if softcap is not None:
        z = softcap * jnp.tanh(z / softcap)
    return from_logits(
        z / jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), targets.shape)[:, None], targets
    )


def from_logits(z: Array, targets: Array) -> LogprobStats:
    """The results from logits f32[N, V], temperature applied."""
    peak = jax.lax.stop_gradient(jnp.max(z, axis=1, keepdims=True))
    weights = jnp.exp(z - peak)
    total = jnp.sum(weights, axis=1, keepdims=True)
    lse = peak + jnp.log(total)
    # a sum under a comparison, for the gradient of a lookup is a scatter
    at_target = jnp.arange(z.shape[1])[None, :] == targets[:, None]
    surprise = lse - z
    logp = -jnp.sum(jnp.where(at_target, surprise, 0), axis=1)
    # -Σ p log p rather than lse - E[z], which cancels at large logits
    entropy = jnp.sum(weights / total * surprise, axis=1)
    return LogprobStats(logp, entropy, lse[:, 0])
