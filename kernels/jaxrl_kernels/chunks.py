"""Walking over an array piece by piece: what every XLA body is made of."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_kernels.manual import vary, varying_axes

Array = jax.Array


def over(total: int, step: int, body: Callable[[Any, int, Any], Any], carry: Any) -> Any:
    """`body(start, size, carry)` over pieces of `step`, and what remains as a smaller piece of its own."""
    whole = total // step
    if whole == 1:
        carry = body(0, step, carry)
    elif whole:
        carry = jax.lax.fori_loop(0, whole, lambda i, c: body(i * step, step, c), carry)
    return body(whole * step, total % step, carry) if total % step else carry


def cut(x: Array, start: Array | int, size: int, axis: int = 0) -> Array:
    """The piece of `size` from `start` on."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def put(x: Array, piece: Array, start: Array | int, axis: int = 0) -> Array:
    """`x` with the piece written over what was there from `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(x, piece, start, axis)


def zeros(shape: tuple[int, ...], like: Any, dtype: Any = jnp.float32) -> Array:
    """Zeros to carry beside the arrays `like` inside `shard_map`: typed as varying where those are."""
    return vary(jnp.zeros(shape, dtype), tuple(varying_axes(*jax.tree.leaves(like))))


def dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """Product summed over one axis of each, accumulated in float32."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)
