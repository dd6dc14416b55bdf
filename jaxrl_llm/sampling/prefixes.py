"""Contexts as the model has read them, on the device: what decoding begins with."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.models import transformer
from jaxrl_llm.models.attention import row_attention
from jaxrl_llm.models.config import ModelConfig, require_causal
from jaxrl_llm.models.params import Tree
from jaxrl_llm.parallel.sharding import ShardingRules, constrain
from jaxrl_llm.sampling import int8

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """F rows of context that something can be written after. P columns, right-aligned.

    Attributes:
      keys: per layer f[F, K, h, P].  values: per layer f[F, K, P, h]; zero before the context.
      hidden: f[F, D] the last hidden state, from which the next token is drawn.
      lengths: i32[F] tokens.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    hidden: Array
    lengths: Array

    @property
    def columns(self) -> int:
        """P."""
        return self.keys[0].shape[3]


def kinds(cfg: ModelConfig) -> tuple[str, ...]:
    """The kind of each layer."""
    return cfg.layer_kinds or ("global",) * cfg.num_layers


@partial(jax.jit, static_argnames=("cfg", "kv_dtype", "sharding"))
def prefill(
    prepared: Tree,
    past: Prefix | None,
    tokens: Array,
    counts: Array,
    cfg: ModelConfig,
    *,
    kv_dtype: Any = None,
    sharding: ShardingRules | None = None,
) -> Prefix:
    """Reads tokens after what has been read before.

    Args:
      prepared: from `autoregressive.prepare`.
      past: F rows that the tokens continue; None = they begin.
      tokens: i32[F, T] right-aligned.  counts: i32[F] how many of them are tokens, at least 1.
      kv_dtype: what keys and values are rounded to as they are written, floats or int8; they are attended as
        they are read. None = the params' dtype.
      sharding: how heads lie on the mesh in context; rows, which are few, are everywhere. None = one device.

    Returns:
      Past and tokens, in the columns of both together.

    Raises:
      ValueError: a bidirectional model.
    """
    require_causal(cfg, "autoregressive sampling")
    rows, width = tokens.shape
    layout = None if sharding is None else dataclasses.replace(sharding, batch=None)
    dtype = prepared["final_norm"].dtype
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    before = jnp.zeros(rows, jnp.int32) if past is None else past.lengths
    columns = (0 if past is None else past.keys[0].shape[3]) + width
    lengths = before + counts
    positions = jnp.arange(columns, dtype=jnp.int32) - columns + lengths[:, None]
    real = positions >= 0
    positions = jnp.maximum(positions, 0)
    ropes = transformer.rope_tables(cfg, positions[:, -width:])
    x = transformer.embed(prepared, tokens, cfg, dtype)
    keys: list[Array] = []
    values: list[Array] = []

    def after(old: Array, new: Array, axis: int) -> Array:
        """Columns of the past right before the counted ones of `new`, for every row."""

        def one(old: Array, new: Array, count: Array) -> Array:
            around = [(0, 0)] * old.ndim
            around[axis] = (width, width)
            shifted = jax.lax.dynamic_slice_in_dim(jnp.pad(old, around), count, columns, axis)
            mine = jnp.arange(columns) >= columns - count
            new = jnp.pad(new, [(columns - width, 0) if a == axis else (0, 0) for a in range(new.ndim)])
            return jnp.where(jnp.expand_dims(mine, [a for a in range(new.ndim) if a != axis]), new, shifted)

        return jax.vmap(one)(old, new, counts)

    for index, (layer, kind) in enumerate(zip(prepared["layers"], kinds(cfg))):

        def attend(q: Array, k: Array, v: Array, index: int = index, kind: str = kind) -> Array:
            k = int8.stored(k.transpose(0, 2, 3, 1), 2, kv_dtype)
            v = int8.stored(v.transpose(0, 2, 1, 3), 3, kv_dtype)
            if past is not None:
                k, v = after(past.keys[index], k, 2), after(past.values[index], v, 1)
            # what stands before a row is written as zeros, which cannot poison what reads the column
            k = jnp.where(real[:, None, None, :], k, 0)
            v = jnp.where(real[:, None, :, None], v, 0)
            k, v = (constrain(x, ("batch", "kv_heads", None, None), layout) for x in (k, v))
            keys.append(k)
            values.append(v)
            k, v = (jnp.multiply(*int8.unpack(x, axis)).astype(dtype) for x, axis in ((k, 2), (v, 3)))
            return row_attention(
                q,
                k.transpose(0, 3, 1, 2),
                v.transpose(0, 2, 1, 3),
                positions,
                real.astype(jnp.int32),
                None,
                window=cfg.window if kind == "local" else None,
                scale=transformer.score_scale(cfg),
                softcap=cfg.attention_softcap,
                rules=layout,
            )

        x = transformer.block(layer, x, cfg, ropes[kind], attend)
    hidden = transformer.rms_norm(x[:, -1], prepared["final_norm"], cfg)
    return Prefix(tuple(keys), tuple(values), constrain(hidden, ("batch", None), layout), lengths)


@jax.jit
def rows(prefix: Prefix) -> tuple[Prefix, ...]:
    """The rows of a prefix, one by one."""
    count = prefix.lengths.shape[0]
    return tuple(jax.tree.map(lambda x, i=i: x[i : i + 1], prefix) for i in range(count))


@partial(jax.jit, static_argnames=("columns",))
def trim(prefix: Prefix, *, columns: int) -> Prefix:
    """The same context in `columns` columns, at least its length."""
    return dataclasses.replace(
        prefix,
        keys=tuple(fit(x, 3, columns) for x in prefix.keys),
        values=tuple(fit(x, 2, columns) for x in prefix.values),
    )


def fit(x: Array, axis: int, columns: int, after: int = 0) -> Array:
    """Right-aligned columns as `columns` of them, and zeros `after` them; what is cut off is empty."""
    around = [(0, 0, 0)] * x.ndim
    around[axis] = (columns - x.shape[axis], after, 0)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), around)
