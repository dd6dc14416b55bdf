"""`linear_logprob`: one function, bounded memory."""

import jax
import jax.numpy as jnp

from jaxrl_kernels.linear_logprob import reference
from jaxrl_kernels.linear_logprob.reference import LogprobStats

Array = jax.Array

MAX_LOGITS = 1 << 24
"""Logits in flight at once: 64 MiB of float32. Rows beyond are taken in turn and recomputed backwards."""


def linear_logprob(
    hidden: Array,
    head: Array,
    targets: Array,
    *,
    temperature: Array | float = 1.0,
    softcap: float | None = None,
    bias: Array | None = None,
) -> LogprobStats:
    """log softmax(cap(hidden·headᵀ + bias) / temperature) at the targets, with its entropy.

    Differentiable in `hidden`, `head` and `bias` through all three results.

    Args:
      hidden: f[N, D].  head: f[V, D], cast to hidden's dtype; products accumulate in float32.
      targets: i32[N] in [0, V).
      temperature: scalar or f32[N], above 0.
      softcap: c of c·tanh(z/c), before the temperature; None = off.
      bias: f[V] or None.

    Returns:
      `LogprobStats` of float32[N], in nats.

    Raises:
      ValueError: shapes that do not fit together.
    """
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(f"hidden {hidden.shape} and head {head.shape} must be [N, D] and [V, D]")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {targets.shape} must be [N] with N={hidden.shape[0]}")
    rows, vocab = hidden.shape[0], head.shape[0]
    scale = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), targets.shape)

    def stats(hidden: Array, targets: Array, scale: Array) -> LogprobStats:
        return reference.linear_logprob(hidden, head, targets, temperature=scale, softcap=softcap, bias=bias)

    if rows * vocab <= MAX_LOGITS:
        return stats(hidden, targets, scale)
    chunk = max(1, MAX_LOGITS // vocab)

    def pad(x: Array, fill: float) -> Array:
        width = [(0, -rows % chunk)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, width, constant_values=fill).reshape(-1, chunk, *x.shape[1:])

    def body(_: None, piece: tuple[Array, Array, Array]) -> tuple[None, LogprobStats]:
        return None, jax.checkpoint(stats)(*piece)

    _, out = jax.lax.scan(body, None, (pad(hidden, 0), pad(targets, 0), pad(scale, 1)))
    return LogprobStats(*(x.reshape(-1)[:rows] for x in out))
