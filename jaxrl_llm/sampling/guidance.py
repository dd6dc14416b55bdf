"""Guidance by a negative input that hides something: one formula, l + w(l - l⁻), for the whole family.

| what the negative input masks | name                                       |
|-------------------------------|--------------------------------------------|
| nothing                       | plain decoding                             |
| the prompt                    | classifier-free guidance (LLaDA, Dream)    |
| unsure committed tokens       | A-CFG (2505.20199)                         |
| informative committed tokens  | FoCore (2605.01373; see `information`)     |

w = 0 is off. LLaDA writes the same as l_u + (w + 1)(l_c - l_u); Dream's evaluation scales by s = w + 1. The
formula itself is `jaxrl_kernels.denoising_step.contrast`; here is what the negative input masks.
"""

import jax
import jax.numpy as jnp

from jaxrl_llm.sampling.diffusion_commit import ranks

Array = jax.Array

SLACK = 1e-4
"""A share of n tokens that is a whole number stays one whatever the rounding."""


def implausible(logits: Array, least: Array) -> Array:
    """bool[B, W, V]: less likely than `least` f32[B] times the most likely token; nothing where that is 0."""
    floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(least)[:, None, None]
    return (least[:, None, None] > 0) & (logits < floor)


def share_up(count: Array, share: Array) -> Array:
    """min(max(1, ceil(share · n)), n) of n = `count` i32[B]: FoCore's number of informative tokens."""
    wanted = jnp.ceil(count * share - SLACK).astype(jnp.int32)
    return jnp.minimum(jnp.maximum(wanted, 1), count)


def share_down(count: Array, share: Array) -> Array:
    """min(max(1, int(share · n)), n): A-CFG's number of unsure tokens."""
    wanted = jnp.floor(count * share + SLACK).astype(jnp.int32)
    return jnp.minimum(jnp.maximum(wanted, 1), count)


def highest(scores: Array, among: Array, count: Array) -> Array:
    """bool[B, G]: the `count` i32[B] highest scores `among` bool[B, G]; -inf is never one of them."""
    scores = jnp.where(among, scores, -jnp.inf)
    return (ranks(scores) < count[:, None]) & (scores > -jnp.inf)
