"""Attention over explicit masks. The kernels are JAX's own."""

import jax
import jax.numpy as jnp

Array = jax.Array


def causal_mask(positions: Array, segment_ids: Array | None = None, window: int | None = None) -> Array:
    """Which keys each query sees in a row of tokens.

    Args:
      positions: i32[N, T] position of each token in its own sequence.
      segment_ids: i32[N, T] which packed sequence a token belongs to; None = one per row.
      window: a token sees itself and window-1 tokens before it; None = all before it.

    Returns:
      bool[N, 1, T, T], True where the query (second to last axis) sees the key.
    """
    query, key = positions[:, None, :, None], positions[:, None, None, :]
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    if segment_ids is not None:
        mask &= segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return mask


def attention(q: Array, k: Array, v: Array, mask: Array, *, scale: float, softcap: float | None) -> Array:
    """softmax(cap(q·k·scale) where mask)·v with grouped queries; scores and softmax in float32.

    Args:
      q: f[N, T, H, h];  k, v: f[N, S, K, h] with K dividing H;  mask: bool[N, 1, T, S].
      scale: multiplies the scores.  softcap: c of c·tanh(score/c); None = off.

    Returns:
      f[N, T, H, h] in q's dtype.
    """
    if softcap is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale)
    n, t, heads, width = q.shape
    grouped = q.reshape(n, t, k.shape[2], heads // k.shape[2], width)
    scores = jnp.einsum("ntkgh,nskh->nkgts", grouped, k, preferred_element_type=jnp.float32) * scale
    scores = softcap * jnp.tanh(scores / softcap)
    weights = jax.nn.softmax(jnp.where(mask[:, :, None], scores, -1e30), axis=-1).astype(v.dtype)
    out = jnp.einsum("nkgts,nskh->ntkgh", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)
