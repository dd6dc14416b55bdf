"""What kernels on hidden states [N, D] and a vocabulary matrix [V, D] share: shapes, temperature, mesh."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

Array = jax.Array


def check_shapes(hidden: Array, head: Array, bias: Array | None, active: Array | None) -> None:
    """Raises a ValueError where shapes do not fit together."""
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(f"hidden {hidden.shape} and head {head.shape} must be [N, D] and [V, D]")
    if 0 in hidden.shape or 0 in head.shape:
        raise ValueError(f"hidden {hidden.shape} and head {head.shape} must not be empty")
    if bias is not None and bias.shape != head.shape[:1]:
        raise ValueError(f"bias {bias.shape} must be [V], V={head.shape[0]}")
    if active is not None and (active.shape != hidden.shape[:1] or active.dtype != bool):
        raise ValueError(f"active {active.dtype}{active.shape} must be bool [N], N={hidden.shape[0]}")


def inverse_temperature(temperature: Array | float, rows: int) -> Array | None:
    """f32[N] 1 / temperature, a constant; None where that is 1 for all rows."""
    if isinstance(temperature, (int, float)) and temperature == 1:
        return None
    temperature = jax.lax.stop_gradient(jnp.asarray(temperature, jnp.float32))
    return jnp.broadcast_to(1 / temperature, (rows,))


class Partition(NamedTuple):
    """How the operands lie on a mesh.

    Attributes:
      mesh: to work on; None = the arrays are on one device, or inside a `shard_map` of the caller's.
      row_axes: mesh axes over which N is cut.
      vocab_axis: mesh axis over which V is cut, or None.
      embed_axis: mesh axis, one of `row_axes`, over which the head's D is cut, or None.
    """

    mesh: Mesh | AbstractMesh | None
    row_axes: tuple[str, ...]
    vocab_axis: str | None
    embed_axis: str | None

    def check(self, hidden: Array, head: Array) -> None:
        """Raises a ValueError where the axes are not the mesh's, or do not divide N, V or D."""
        mesh, row_axes, vocab_axis, embed_axis = self
        if mesh is None:
            if row_axes or vocab_axis or embed_axis:
                raise ValueError("row_axes, vocab_axis and embed_axis are axes of a mesh: pass mesh=")
            return
        axes = [*row_axes, *([] if vocab_axis is None else [vocab_axis])]
        unknown = [axis for axis in axes if axis not in mesh.shape]
        if unknown or len(set(axes)) < len(axes):
            raise ValueError(
                f"row_axes {row_axes} and vocab_axis {vocab_axis!r} must be distinct of {mesh.axis_names}"
            )
        if embed_axis is not None and embed_axis not in row_axes:
            raise ValueError(f"embed_axis {embed_axis!r} must be one of row_axes {row_axes}")
        for name, size, cut in (
            ("N", hidden.shape[0], row_axes),
            ("V", head.shape[0], () if vocab_axis is None else (vocab_axis,)),
            ("D", head.shape[1], () if embed_axis is None else (embed_axis,)),
        ):
            pieces = math.prod(mesh.shape[axis] for axis in cut)
            if size % pieces:
                raise ValueError(f"{name}={size} is not divisible by {pieces}, the devices along {cut}")
