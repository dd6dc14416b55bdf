"""The leaves of a state tree as a checkpoint knows them: by name, as plain arrays, with shape and dtype."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any
Leaf = Any
"""An array of jax or numpy, a typed PRNG key array, a `jax.ShapeDtypeStruct`, or a Python number."""


def flatten(tree: Tree) -> tuple[dict[str, Leaf], Any]:
    """The leaves by name (`params/layers/wq`), in the tree's order, and the tree's structure.

    Raises:
      TypeError: a leaf is neither an array nor a number.
      ValueError: two leaves have the same name.
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/") or "value": x for path, x in pairs}
    if len(leaves) < len(pairs):
        raise ValueError(f"two leaves of the state have the same name; the names are {sorted(leaves)}")
    for name, leaf in leaves.items():
        if not hasattr(leaf, "dtype") and not isinstance(leaf, bool | int | float):
            raise TypeError(f"{name} in the state is a {type(leaf).__name__}, not an array or a number")
    return leaves, treedef


def spec(leaf: Leaf) -> str:
    """`float32[3,4]`; typed keys are `key<fry>[]`."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def stored(leaf: Leaf) -> jax.Array | np.ndarray:
    """The array that goes to the disk. Host arrays are copied: the caller may go on writing in them."""
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.array(leaf)


def physical(leaf: Leaf) -> jax.ShapeDtypeStruct | np.ndarray:
    """What `stored` makes of the leaf, without its values: a shape with a sharding, or a host array."""
    if _is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=_sharding(leaf))
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(leaf))
    return np.asarray(leaf)


def loaded(array: jax.Array | np.ndarray, leaf: Leaf) -> Leaf:
    """The array read from the disk, as the kind of thing that `leaf` is."""
    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=_key_impl(leaf))
    if isinstance(leaf, bool | int | float):
        return type(leaf)(array.item())
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and isinstance(array, np.ndarray):
        return jax.device_put(array, _sharding(leaf))
    return array


def differences(saved: Mapping[str, str], wanted: Mapping[str, str], partial: bool) -> list[str]:
    """One line for every leaf whose `spec` differs, or that only one side has.

    Args:
      saved: `spec` by name in the checkpoint.
      wanted: the same of the tree expected.
      partial: whether leaves that only the checkpoint has are none of our business.
    """
    absent = [
        f"{name}: expected {wanted[name]}, not in the checkpoint" for name in wanted if name not in saved
    ]
    extra = [f"{name}: saved {saved[name]}, not expected" for name in saved if name not in wanted]
    other = [
        f"{name}: saved {saved[name]}, expected {wanted[name]}"
        for name in wanted
        if name in saved and saved[name] != wanted[name]
    ]
    return other + absent + ([] if partial else extra)


def _is_key(leaf: Leaf) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Leaf) -> Any:
    found: list[Any] = []  # key_impl takes arrays and tracers, but no shapes
    jax.eval_shape(lambda keys: found.append(jax.random.key_impl(keys)), leaf)
    return found[0]


def _sharding(leaf: Leaf) -> jax.sharding.Sharding:
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
