"""Walks over tiles of the logits of one or two models, in plain XLA for every platform.

A tile is [vocabulary, rows]: what belongs to a row then lies along the last dimension, where a processor's
vector instructions find it, and sums over the vocabulary cross no lanes. Active rows are moved to the front,
and the rows behind them cost nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_kernels.chunks import cut, dot, over, put, zeros
from jaxrl_kernels.linear_logprob import tiles

Array = jax.Array

ROWS, COLUMNS = 512, 2048
"""Of a tile at most. 4 MiB of float32: it stays in the cache between the products."""

LEAST_ROWS = 256
"""Of a tile, where four blocks would otherwise have more: the last active block is computed as a whole."""

Caps = tuple[float | None, ...]
"""Soft cap of each model's logits."""


class Model(NamedTuple):
    """Logits cap(hidden·headᵀ + bias)·scale that are never there as a whole.

    Attributes:
      hidden: f[N, D].
      head: f[V, D] of hidden's dtype.
      bias: f[V] or None.
      scale: f32[N] one over the temperature, or None for 1.
    """

    hidden: Array
    head: Array
    bias: Array | None
    scale: Array | None


class Operands(NamedTuple):
    """What the walks work on.

    Attributes:
      models: one or two over the same rows and vocabulary; the first may have a gradient.
      rows: what else the tiles need of a row: arrays [..., N].
      active: bool[N].
    """

    models: tuple[Model, ...]
    rows: Any
    active: Array


def forward(
    operands: Operands, caps: Caps, tile: Callable[..., Any], start_from: Callable[[Array], Any]
) -> Any:
    """Folds the tiles of each row into sums.

    Args:
      operands, caps: the logits.
      tile: (tuple of logits [width, rows], first column, rows, sums) -> sums.
      start_from: zeros [rows] -> sums before the first tile: arrays [..., rows].

    Returns:
      Sums with leaves [..., N]; 1 in rows behind the last block, so that no logarithm or quotient fails.
    """
    x, block, count, place = _active_first(operands)

    def rows(i: Array, out: Any) -> Any:
        start = i * block
        piece = _rows_of(x, start, block)

        def columns(first: Array | int, width: int, sums: Any) -> Any:
            return tile(_logits(piece.models, first, width, caps), first, piece.rows, sums)

        sums = over(x.models[0].head.shape[0], COLUMNS, columns, start_from(zeros((block,), x)))
        return jax.tree.map(lambda whole, some: put(whole, some, start, axis=-1), out, sums)

    empty = jax.eval_shape(start_from, jax.ShapeDtypeStruct(x.active.shape, jnp.float32))
    ones = jax.tree.map(lambda a: zeros(a.shape, x, a.dtype) + 1, empty)
    out = jax.lax.fori_loop(0, count, rows, ones)
    return jax.tree.map(lambda a: a[..., place], out)


def backward(
    operands: Operands, caps: Caps, gradient: Callable[..., Array], *, head_gradient: bool
) -> tuple[Array, Array | None, Array | None]:
    """Gradients of the first model's hidden, head and bias in their dtypes.

    Args:
      operands, caps: the logits.
      gradient: (tuple of logits [width, rows], first column, rows) -> gradient of the first model's logits,
        times its scale; 0 in rows that are not active.
      head_gradient: whether head and bias have one; else None.
    """
    x, block, count, place = _active_first(operands)
    hidden, head, bias, _ = x.models[0]
    dtype = hidden.dtype

    def columns(first: Array | int, width: int, carry: Any) -> Any:
        weights = cut(head, first, width)

        def rows(i: Array, carry: Any) -> Any:
            dhidden, dweights, dpiece = carry
            start = i * block
            piece = _rows_of(x, start, block)
            z = _logits(piece.models, first, width, caps)
            dz = tiles.through_cap(gradient(z, first, piece.rows), z[0], caps[0], piece.models[0].scale)
            if dpiece is not None:
                dpiece = dpiece + jnp.sum(dz, axis=1)
            dz = dz.astype(dtype)
            some = cut(dhidden, start, block, axis=1) + dot(weights, dz, 0, 0)
            dhidden = put(dhidden, some, start, axis=1)
            if dweights is not None:
                dweights = dweights + dot(dz, piece.models[0].hidden, 1, 0)
            return dhidden, dweights, dpiece

        dhidden, dhead, dbias = carry
        dweights = zeros(weights.shape, x) if head_gradient else None
        dpiece = None if dbias is None else zeros((width,), x)
        dhidden, dweights, dpiece = jax.lax.fori_loop(0, count, rows, (dhidden, dweights, dpiece))
        if dweights is not None:
            dhead = put(dhead, dweights.astype(dtype), first)
        if dpiece is not None:
            dbias = put(dbias, dpiece, first)
        return dhidden, dhead, dbias

    carry = (
        zeros(hidden.shape[::-1], x),  # [D, N], which CPUs multiply faster into
        zeros(head.shape, x, dtype) if head_gradient else None,
        zeros(head.shape[:1], x) if head_gradient and bias is not None else None,
    )
    dhidden, dhead, dbias = over(head.shape[0], COLUMNS, columns, carry)
    dhidden = dhidden.astype(dtype).T[place]
    return dhidden, dhead, None if bias is None or dbias is None else dbias.astype(bias.dtype)


def _active_first(x: Operands) -> tuple[Operands, int, Array, Array]:
    """Rows sorted by whether they are active, in blocks of equal size.

    Returns:
      The rows, padded to whole blocks; rows of a block; the number of blocks i32[] with an active row; and
      where each of the rows was moved to, i32[N].
    """
    rows = x.active.shape[0]
    blocks = max(-(-rows // ROWS), min(4, -(-rows // LEAST_ROWS)))
    block = -(-rows // blocks)
    order = jnp.argsort(~x.active, stable=True)
    place = jnp.argsort(order)
    order = jnp.pad(order, (0, blocks * block - rows), constant_values=rows)

    def sort(a: Array, axis: int = -1, beyond: int = 0) -> Array:
        return jnp.take(a, order, axis, mode="fill", fill_value=beyond)

    models = tuple(
        model._replace(
            hidden=sort(model.hidden, 0), scale=None if model.scale is None else sort(model.scale, beyond=1)
        )
        for model in x.models
    )
    count = (jnp.sum(x.active, dtype=jnp.int32) + block - 1) // block
    return Operands(models, jax.tree.map(sort, x.rows), sort(x.active)), block, count, place


def _logits(models: tuple[Model, ...], first: Array | int, width: int, caps: Caps) -> tuple[Array, ...]:
    """Logits [width, rows] of the columns from `first` on."""

    def of(model: Model, softcap: float | None) -> Array:
        product = dot(cut(model.head, first, width), model.hidden, 1, 1)
        bias = None if model.bias is None else cut(model.bias, first, width).astype(jnp.float32)[:, None]
        return tiles.logits(product, bias, softcap, model.scale)

    return tuple(map(of, models, caps))


def _rows_of(x: Operands, start: Array, size: int) -> Operands:
    models = tuple(
        model._replace(
            hidden=cut(model.hidden, start, size),
            scale=None if model.scale is None else cut(model.scale, start, size),
        )
        for model in x.models
    )
    return Operands(
        models, jax.tree.map(lambda a: cut(a, start, size, -1), x.rows), cut(x.active, start, size)
    )
