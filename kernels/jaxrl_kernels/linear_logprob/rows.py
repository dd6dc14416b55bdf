"""Rows in blocks: padding to whole ones, and which of them have anything to do."""

import jax
import jax.numpy as jnp

from jaxrl_kernels.linear_logprob.tiles import Operands

Array = jax.Array


def pad(x: Operands, rows: int) -> Operands:
    """Up to so many rows; those added are not active."""
    more = rows - x.hidden.shape[0]
    if not more:
        return x
    return Operands(
        jnp.pad(x.hidden, ((0, more), (0, 0))),
        x.head,
        jnp.pad(x.targets, (0, more)),
        jnp.pad(x.active, (0, more)),
        None if x.scale is None else jnp.pad(x.scale, (0, more), constant_values=1),
        x.bias,
    )


def visits(active: Array, block: int) -> tuple[Array, Array]:
    """Blocks i32[N / block], those with an active row first, and the number i32[] of those."""
    is_active = jnp.any(active.reshape(-1, block), axis=1)
    return jnp.argsort(~is_active, stable=True).astype(jnp.int32), jnp.sum(is_active, dtype=jnp.int32)
