"""Types under `jax.shard_map(check_vma=True)`: their names change between JAX releases, hence one file."""

from collections.abc import Sequence
from typing import Any

import jax

Array = jax.Array


def varying_axes(*arrays: Array) -> frozenset[str]:
    """Mesh axes over which any of the arrays may differ between devices; empty outside `shard_map`."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def out_shape(shape: Sequence[int], dtype: Any, like: Sequence[Array]) -> jax.ShapeDtypeStruct:
    """Shape of a kernel's result, varying over the axes over which its operands do."""
    axes = varying_axes(*like)
    if not axes:
        return jax.ShapeDtypeStruct(tuple(shape), dtype)
    return jax.ShapeDtypeStruct(
        tuple(shape), dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=axes)
    )


def vary(x: Array, axes: Sequence[str]) -> Array:
    """`x` typed as varying over the axes; the gradient of that is a sum over those that it gained."""
    missing = tuple(axis for axis in axes if axis not in varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
