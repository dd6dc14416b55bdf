"""The body for every platform: a walk over tiles of logits in plain XLA."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_kernels.linear_logprob import tiles, walk
from jaxrl_kernels.linear_logprob.tiles import LOWEST, Coefficients, Operands, Sums

Array = jax.Array


def forward(operands: Operands, *, softcap: float | None) -> Sums:
    """Sums over the vocabulary for each row, f32[N] each; anything in rows that are not active."""

    def tile(logits: tuple[Array], first: Array | int, targets: Array, sums: Sums) -> Sums:
        (z,) = logits
        sums = tiles.rebase(sums, jnp.maximum(sums.peak, jnp.max(z, axis=0)))
        weight, moment = tiles.terms(z, sums.peak)
        return Sums(
            sums.peak,
            sums.total + jnp.sum(weight, axis=0),
            sums.moment + jnp.sum(moment, axis=0),
            sums.target + jnp.sum(jnp.where(_at_target(z, first, targets), z, 0), axis=0),
        )

    def start_from(zero: Array) -> Sums:
        return Sums(zero + LOWEST, zero, zero, zero)

    return walk.forward(_walked(operands, operands.targets), (softcap,), tile, start_from)


def backward(
    operands: Operands, rows: Coefficients, *, softcap: float | None, head_gradient: bool
) -> tuple[Array, Array | None, Array | None]:
    """Gradients of hidden, head and bias in their dtypes; the last two None where not asked for.

    Args:
      operands, softcap: as `forward`.
      rows: as `tiles.coefficients`; 0 in rows that are not active.
      head_gradient: whether head and bias have a gradient.
    """

    def gradient(logits: tuple[Array], first: Array | int, of_rows: tuple[Array, Coefficients]) -> Array:
        (z,), (targets, coefficients) = logits, of_rows
        # the walk goes back through the cap
        return tiles.dlogits(z, _at_target(z, first, targets), coefficients, None, None)

    walked = _walked(operands, (operands.targets, rows))
    return walk.backward(walked, (softcap,), gradient, head_gradient=head_gradient)


def _walked(x: Operands, rows: Any) -> walk.Operands:
    return walk.Operands((walk.Model(x.hidden, x.head, x.bias, x.scale),), rows, x.active)


def _at_target(z: Array, first: Array | int, targets: Array) -> Array:
    """Where a logit of [width, rows] is its row's target."""
    return first + jax.lax.broadcasted_iota(jnp.int32, z.shape, 0) == targets
