"""A cache in int8: every head's keys, and its values, of one column share a scale.

A column holds h numbers in int8 and behind them, along the same axis, the four bytes of their float32 scale.
To all that moves columns about it is one array, and zeros stay zeros.
"""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

SCALE_BYTES = 4


def pack(x: Array, axis: int) -> Array:
    """Rounds to 1/127 of the largest magnitude along `axis`: f[.., h, ..] -> int8[.., h + 4, ..]."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 127
    whole = jnp.round(x / jnp.where(scale == 0, 1.0, scale)).astype(jnp.int8)
    behind = jax.lax.bitcast_convert_type(jnp.squeeze(scale, axis), jnp.int8)
    return jnp.concatenate([whole, jnp.moveaxis(behind, -1, axis)], axis=axis)


def stored(x: Array, axis: int, dtype: Any) -> Array:
    """x f[.., h, ..] as a cache of `dtype` keeps it: packed in int8, or as floats."""
    return pack(x, axis) if dtype == jnp.int8 else x.astype(dtype)


def unpack(x: Array, axis: int) -> tuple[Array, Array]:
    """Numbers and what to multiply them by. Arrays of another type are their own, times 1.

    Args:
      x: int8 from `pack`, or floats.

    Returns:
      The numbers, [.., h, ..], and f32 with 1 in place of h.
    """
    if x.dtype != jnp.int8:
        return x, jnp.ones((1,) * x.ndim, jnp.float32)
    whole, behind = jnp.split(x, [x.shape[axis] - SCALE_BYTES], axis=axis)
    scale = jax.lax.bitcast_convert_type(jnp.moveaxis(behind, axis, -1), jnp.float32)
    return whole, jnp.expand_dims(scale, axis)
