"""The body for every platform: plain XLA over tiles of logits.

A tile is [vocabulary, rows]: what belongs to a row then lies along the last dimension, where a processor's
vector instructions find it, and sums over the vocabulary cross no lanes.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_kernels.chunks import dot, over, put, zeros
from jaxrl_kernels.linear_logprob import tiles
from jaxrl_kernels.linear_logprob.tiles import LOWEST, Coefficients, Operands, Sums

Array = jax.Array

ROWS, COLUMNS = 512, 2048
"""Of a tile. 4 MiB of float32: it stays in the cache between the products."""


def forward(operands: Operands, *, softcap: float | None) -> Sums:
    """Sums over the vocabulary for each row, f32[N] each; 0 in blocks of rows of which none is active."""
    vocab = operands.head.shape[0]

    def rows(start: Array | int, size: int, out: Sums) -> Sums:
        x = _rows_of(operands, start, size)

        def columns(first: Array | int, width: int, sums: Sums) -> Sums:
            z, at_target = _logits(x, first, width, softcap)
            sums = tiles.rebase(sums, jnp.maximum(sums.peak, jnp.max(z, axis=0)))
            weight, moment = tiles.terms(z, sums.peak)
            return Sums(
                sums.peak,
                sums.total + jnp.sum(weight, axis=0),
                sums.moment + jnp.sum(moment, axis=0),
                sums.target + jnp.sum(jnp.where(at_target, z, 0), axis=0),
            )

        zero = zeros((size,), operands)
        empty = Sums(zero + LOWEST, zero, zero, zero)
        nothing = Sums(zero, zero, zero, zero)
        sums = jax.lax.cond(jnp.any(x.active), lambda: over(vocab, COLUMNS, columns, empty), lambda: nothing)
        return jax.tree.map(lambda all_rows, some: put(all_rows, some, start), out, sums)

    zero = zeros(operands.targets.shape, operands)
    return over(operands.targets.shape[0], ROWS, rows, Sums(zero, zero, zero, zero))


def backward(
    operands: Operands, coefficients: Coefficients, *, softcap: float | None, head_gradient: bool
) -> tuple[Array, Array | None, Array | None]:
    """Gradients of hidden, head and bias in their dtypes; the last two None where not asked for.

    Args:
      operands, softcap: as `forward`.
      coefficients: as `tiles.coefficients`; 0 in rows that are not active.
      head_gradient: whether head and bias have a gradient.
    """
    hidden, head, bias = operands.hidden, operands.head, operands.bias
    dtype = hidden.dtype

    def columns(first: Array | int, width: int, carry: Any) -> Any:
        weights = jax.lax.dynamic_slice_in_dim(head, first, width)

        def rows(start: Array | int, size: int, carry: Any) -> Any:
            x = _rows_of(operands, start, size)
            coefs = jax.tree.map(lambda c: jax.lax.dynamic_slice_in_dim(c, start, size), coefficients)

            def add(carry: Any) -> Any:
                dhidden, dweights, dbias = carry
                z, at_target = _logits(x, first, width, softcap)
                dz = tiles.dlogits(z, at_target, coefs, softcap, x.scale)
                before = jax.lax.dynamic_slice_in_dim(dhidden, start, size)
                dhidden = put(dhidden, before + dot(dz.astype(dtype), weights, 0, 0), start)
                if head_gradient:
                    dweights = dweights + dot(dz.astype(dtype), x.hidden, 1, 0)
                if dbias is not None:
                    dbias = dbias + jnp.sum(dz, axis=1)
                return dhidden, dweights, dbias

            return jax.lax.cond(jnp.any(x.active), add, lambda carry: carry, carry)

        dhidden, dhead, dbias = carry
        dweights = zeros(weights.shape, operands) if head_gradient else None
        dpiece = None if dbias is None else zeros((width,), operands)
        dhidden, dweights, dpiece = over(hidden.shape[0], ROWS, rows, (dhidden, dweights, dpiece))
        if dweights is not None:
            dhead = put(dhead, dweights.astype(dtype), first)
        if dpiece is not None:
            dbias = put(dbias, dpiece, first)
        return dhidden, dhead, dbias

    carry = (
        zeros(hidden.shape, operands),
        zeros(head.shape, operands, dtype) if head_gradient else None,
        zeros(head.shape[:1], operands) if head_gradient and bias is not None else None,
    )
    dhidden, dhead, dbias = over(head.shape[0], COLUMNS, columns, carry)
    return dhidden.astype(dtype), dhead, None if bias is None or dbias is None else dbias.astype(bias.dtype)


def _logits(x: Operands, first: Array | int, width: int, softcap: float | None) -> tuple[Array, Array]:
    """Logits [width, rows] of the columns from `first` on, and where one is its row's target."""
    z = dot(jax.lax.dynamic_slice_in_dim(x.head, first, width), x.hidden, 1, 1)
    bias = None if x.bias is None else jax.lax.dynamic_slice_in_dim(x.bias, first, width)
    z = tiles.logits(z, None if bias is None else bias.astype(jnp.float32)[:, None], softcap, x.scale)
    column = first + jax.lax.broadcasted_iota(jnp.int32, z.shape, 0)
    return z, column == x.targets


def _rows_of(x: Operands, start: Array | int, size: int) -> Operands:
    by_row = (x.hidden, x.targets, x.active, x.scale)
    some = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), by_row)
    hidden, targets, active, scale = some
    return Operands(hidden, x.head, targets, active, scale, x.bias)
