"""One description per parameter; initialisation, sharding, import and export all follow from it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Tree = Any
"""A nested dict of arrays (or of `ParamSpec`, or of shardings)."""


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """A parameter before it exists.

    Attributes:
      shape: its shape.
      axes: a logical name for each dimension ('vocab', 'embed', 'heads', 'kv_heads', 'head_dim', 'mlp',
        'layers', or None), which `parallel.ShardingRules` maps to mesh axes.
      init: 'normal' (std 1/sqrt(fan_in)), 'embed' (std 0.02), 'zeros' or 'ones'.
      fan_in: number of inputs that one output sums over.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"
    fan_in: int = 1

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in rank")


def map_specs(fn: Callable[[ParamSpec], Any], specs: Tree) -> Tree:
    """`fn` over every `ParamSpec` of a tree."""
    return jax.tree.map(fn, specs, is_leaf=_is_spec)


def init(key: Array, specs: Tree, dtype: jnp.dtype = jnp.float32) -> Tree:
    """Random params. Pure in `key`: a parameter's values depend on its place in the tree alone."""
    leaves, treedef = jax.tree.flatten(specs, is_leaf=_is_spec)

    def one(index: int, spec: ParamSpec) -> Array:
        if spec.init == "zeros":
            return jnp.zeros(spec.shape, dtype)
        if spec.init == "ones":
            return jnp.ones(spec.shape, dtype)
        std = 0.02 if spec.init == "embed" else 1 / math.sqrt(spec.fan_in)
        return std * jax.random.normal(jax.random.fold_in(key, index), spec.shape, dtype)

    return jax.tree.unflatten(treedef, [one(i, s) for i, s in enumerate(leaves)])


def abstract(specs: Tree, dtype: jnp.dtype = jnp.float32) -> Tree:
    """The tree of `jax.ShapeDtypeStruct`: what a checkpoint holds, without the memory."""
    return map_specs(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), specs)


def count(specs: Tree) -> int:
    """Number of parameters."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(specs, is_leaf=_is_spec))


def _is_spec(x: object) -> bool:
    return isinstance(x, ParamSpec)
