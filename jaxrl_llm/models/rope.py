"""Rotary position embedding, with the scaling kinds of the Llama 3 and Qwen families."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models.config import Rope

Array = jax.Array

KINDS = ("default", "linear", "llama3", "yarn")


def frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """Angular frequencies f32[h/2] (radians per token) and the factor on cos and sin.

    Raises:
      ValueError: unknown `rope.kind`.
    """
    inverse = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scale = 1.0
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    elif rope.kind == "llama3":
        # long wavelengths are stretched, short ones kept, those between blended (Llama 3.1)
        turns = rope.original_max_position * inverse / (2 * math.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        smooth = np.clip((turns - rope.low_freq_factor) / span, 0, 1)
        inverse = (1 - smooth) * inverse / rope.factor + smooth * inverse
    elif rope.kind == "yarn":

        def dimension(turns: float) -> float:
            length = rope.original_max_position / (turns * 2 * math.pi)
            return head_dim * math.log(length) / (2 * math.log(rope.theta))

        low = max(math.floor(dimension(rope.beta_fast)), 0)
        high = min(math.ceil(dimension(rope.beta_slow)), head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0, 1)
        inverse = inverse / rope.factor * ramp + inverse * (1 - ramp)
        scale = 0.1 * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0
        if rope.attention_factor is not None:
            scale = rope.attention_factor
    elif rope.kind != "default":
        raise ValueError(f"unknown rope kind {rope.kind!r}; one of {', '.join(KINDS)}")
    return inverse.astype(np.float32), scale


def table(rope: Rope, head_dim: int, positions: Array) -> tuple[Array, Array]:
    """cos and sin f32[N, T, 1, h] at `positions` i32[N, T]."""
    inverse, scale = frequencies(rope, head_dim)
    angles = positions[..., None].astype(jnp.float32) * inverse
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """x f[N, T, heads, h] turned by its position; halves are paired as in Hugging Face checkpoints."""
    half = x.shape[-1] // 2
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return (x * cos + turned * sin).astype(x.dtype)
