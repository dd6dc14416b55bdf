"""Where arrays live: the device mesh, and rules from logical axis names to mesh axes."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
MeshAxes = str | tuple[str, ...] | None
"""One mesh axis, several (the first varies slowest), or none: replicated."""


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes 'data', 'fsdp' and 'tensor'.

    Args:
      data: number of copies of the params, each fed with its own rows.
      fsdp: number of pieces into which every parameter is cut, each fed with its own rows.
      tensor: number of pieces into which heads, MLP and vocabulary are cut.
        At most one of the three may be -1: as many as there are devices left.
      devices: what to build it from; None = all devices of all processes. One process may use fewer than
        it has (the first ones); several processes must use all.

    Returns:
      A mesh whose axes the compiler lays out by itself, guided by `constrain`.

    Raises:
      ValueError: sizes that are not positive or do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    asked = "x".join(map(str, sizes))
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ValueError(f"mesh {asked}: sizes must be positive, at most one of them -1")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes:
        if len(devices) % known:
            raise ValueError(f"mesh {asked}: {len(devices)} devices are no multiple of {known}")
        sizes[sizes.index(-1)] = len(devices) // known
    total = math.prod(sizes)
    if total > len(devices):
        raise ValueError(f"mesh {asked} needs {total} devices, there are {len(devices)}")
    if total < len(devices) and len({d.process_index for d in devices}) > 1:
        raise ValueError(f"mesh {asked} leaves {len(devices) - total} of {len(devices)} devices idle; use -1")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:total])


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis name -> mesh axis, a tuple of them, or None (replicated).

    The default is fully sharded data parallelism crossed with tensor parallelism: rows are spread over
    'data' and 'fsdp', the width of the model over 'fsdp', heads, MLP and vocabulary over 'tensor'.
    A rule set is changed with `dataclasses.replace`, for instance `replace(rules, kv_heads=None)` where
    there are fewer key-value heads than tensor pieces.
    """

    batch: MeshAxes = ("data", "fsdp")
    length: MeshAxes = None
    layers: MeshAxes = None
    vocab: MeshAxes = "tensor"
    embed: MeshAxes = "fsdp"
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    mlp: MeshAxes = "tensor"

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """Logical axes of an array's dimensions (None = replicated) -> its PartitionSpec.

        Raises:
          ValueError: unknown logical name, or one mesh axis used for two dimensions.
        """
        names = [field.name for field in dataclasses.fields(self)]
        used: dict[str, str] = {}
        out: list[MeshAxes] = []
        for axis in axes:
            if axis is None:
                out.append(None)
                continue
            if axis not in names:
                raise ValueError(f"unknown logical axis {axis!r}; one of {', '.join(names)}")
            rule: MeshAxes = getattr(self, axis)
            for mesh_axis in mesh_axes(rule):
                if mesh_axis in used:
                    raise ValueError(
                        f"axes {tuple(axes)}: mesh axis {mesh_axis!r} is used for both {used[mesh_axis]!r} "
                        f"and {axis!r}; give one of them another rule"
                    )
                used[mesh_axis] = axis
            out.append(rule)
        return PartitionSpec(*out)


def shardings(specs: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """A `NamedSharding` for every `ParamSpec` of a tree.

    A dimension that its mesh axes do not divide is an error rather than silently replicated: replication
    costs memory and belongs in the rules, where it can be read.

    Args:
      specs: nested dict of objects with `shape` and `axes`.

    Raises:
      ValueError: as above, naming the parameter; or what `ShardingRules.spec` raises.
    """

    def one(path: tuple[Any, ...], spec: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        partition = rules.spec(spec.axes)
        _check_divides(name, spec.shape, spec.axes, partition, mesh)
        return NamedSharding(mesh, partition)

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=lambda x: hasattr(x, "axes"))


def constrain(x: jax.Array, axes: Sequence[str | None], rules: ShardingRules | None) -> jax.Array:
    """Lays `x` out on the mesh in context (`jax.set_mesh`) as the rules say; identity where rules is None.

    Args:
      x: any array.  axes: a logical name, or None, for each of its dimensions.

    Raises:
      ValueError: rules without a mesh in context, a rank that differs from `axes`, or a dimension that its
        mesh axes do not divide.
    """
    if rules is None:
        return x
    mesh = mesh_in_context()
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} axes {tuple(axes)} for an array of shape {x.shape}")
    partition = rules.spec(axes)
    _check_divides("activation", x.shape, axes, partition, mesh)
    return jax.lax.with_sharding_constraint(x, partition)


def num_shards(axis: str, rules: ShardingRules | None) -> int:
    """Into how many pieces a logical axis is cut on the mesh in context; 1 where rules is None.

    Raises:
      ValueError: rules without a mesh in context.
    """
    if rules is None:
        return 1
    sizes = mesh_in_context().shape
    return math.prod(sizes[name] for name in mesh_axes(getattr(rules, axis)))


def batch_sharding(mesh: Mesh, rules: ShardingRules) -> NamedSharding:
    """How arrays whose first dimension is the batch are fed: [N, ...] with N spread as `rules.batch` says."""
    return NamedSharding(mesh, rules.spec(("batch",)))


def mesh_in_context() -> AbstractMesh:
    """The mesh of `jax.set_mesh`.

    Raises:
      ValueError: there is none.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError(
            "sharding rules need a mesh: call inside `with jax.set_mesh(mesh)`, or pass rules=None"
        )
    return mesh


def mesh_axes(rule: MeshAxes) -> tuple[str, ...]:
    """A rule as the mesh axes it names."""
    return () if rule is None else (rule,) if isinstance(rule, str) else rule


def _check_divides(
    name: str, shape: tuple[int, ...], axes: Sequence[str | None], partition: PartitionSpec, mesh: Any
) -> None:
    for size, axis, rule in zip(shape, axes, partition):
        for mesh_axis in mesh_axes(rule):
            if mesh_axis not in mesh.shape:
                raise ValueError(f"rule for {axis!r} names {mesh_axis!r}; mesh axes: {', '.join(mesh.shape)}")
        pieces = int(np.prod([mesh.shape[a] for a in mesh_axes(rule)], dtype=int))
        if size % pieces:
            raise ValueError(
                f"{name} of shape {shape}: {axis!r} has size {size}, which mesh axes {mesh_axes(rule)} of "
                f"total size {pieces} do not divide; choose another mesh, or replicate it with "
                f"dataclasses.replace(rules, {axis}=None)"
            )
