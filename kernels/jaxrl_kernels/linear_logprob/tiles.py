"""The maths of a tile of logits: pure elementwise functions that every body shares.

A body walks over vocabulary tiles and keeps, for each row, sums relative to the largest logit so far. It
loads, multiplies and reduces in its platform's own way; what is computed stands here, once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_kernels.linear_logprob.reference import LogprobStats

Array = jax.Array

LOWEST = -1e30
"""Where a running maximum starts, and the logit of a column that is not there. Finite: inf - inf is NaN."""


class Operands(NamedTuple):
    """What the bodies work on.

    Attributes:
      hidden: f[N, D].
      head: f[V, D] of hidden's dtype.
      targets: i32[N]; outside [0, V) where the target is in another shard of the vocabulary.
      active: bool[N]; results of the other rows are never looked at, and they have no gradient.
      scale: f32[N] one over the temperature, or None for 1.
      bias: f[V] or None.
    """

    hidden: Array
    head: Array
    targets: Array
    active: Array
    scale: Array | None = None
    bias: Array | None = None


class Sums(NamedTuple):
    """Sums over some of the columns of logits z of a row, relative to their maximum.

    Attributes:
      peak: m = max z.
      total: Σ e^(z−m), at least 1.
      moment: Σ (z−m)·e^(z−m).
      target: the target's z if it is among the columns, else 0.
    """

    peak: Array
    total: Array
    moment: Array
    target: Array


class Coefficients(NamedTuple):
    """What the gradient of the logits needs of a row, f32[N] each; see `coefficients`."""

    lse: Array
    onehot: Array
    constant: Array
    slope: Array | None


def logits(product: Array, bias: Array | None, softcap: float | None, scale: Array | None) -> Array:
    """z = cap(h·w + bias) / temperature."""
    z = product if bias is None else product + bias
    if softcap is not None:
        z = softcap * jnp.tanh(z * (1 / softcap))
    return z if scale is None else z * scale


def rebase(sums: Sums, peak: Array) -> Sums:
    """The same sums relative to another peak, at least as high."""
    shift = sums.peak - peak
    shrink = jnp.exp(shift)
    return Sums(peak, shrink * sums.total, shrink * (sums.moment + shift * sums.total), sums.target)


def terms(z: Array, peak: Array) -> tuple[Array, Array]:
    """What a logit adds to `total` and to `moment`."""
    x = z - peak
    weight = jnp.exp(x)
    return weight, weight * x


def finish(sums: Sums) -> LogprobStats:
    """The results, from the sums over all columns.

    log π = (z_y − m) − ln Σe^(z−m) is a sum of two numbers that are not positive, and
    H = ln Σe^(z−m) − Σ(z−m)e^(z−m) / Σe^(z−m) does not cancel at large logits as lse − E[z] does.
    """
    log_total = jnp.log(sums.total)
    return LogprobStats(
        sums.target - sums.peak - log_total, log_total - sums.moment / sums.total, sums.peak + log_total
    )


def coefficients(
    stats: LogprobStats,
    cotangents: LogprobStats,
    active: Array,
    scale: Array | None,
    *,
    with_entropy: bool,
) -> Coefficients:
    """What the rows contribute to dz = g_logp·(1[y] − π) − g_entropy·π·(log π + H) + g_lse·π.

    Args:
      stats: results of the forward pass.
      cotangents: of the three results.
      active, scale: as in `Operands`; the gradient is carried back through the scale here, a row at a time.
      with_entropy: whether g_entropy may be anything but 0.
    """
    # a row without results has π = 0: e^z on its own could overflow, and inf·0 is NaN
    stats = stats._replace(lse=jnp.where(active, stats.lse, -LOWEST))
    cotangents = LogprobStats(*(jnp.where(active, g, 0) for g in cotangents))
    constant = cotangents.logp - cotangents.lse
    if with_entropy:
        constant = constant + cotangents.entropy * stats.entropy
    by = 1.0 if scale is None else scale
    return Coefficients(
        stats.lse, cotangents.logp * by, constant * by, cotangents.entropy * by if with_entropy else None
    )


def dlogits(
    z: Array, at_target: Array, rows: Coefficients, softcap: float | None, scale: Array | None
) -> Array:
    """Gradient of the products h·w: onehot·1[y] − π·(constant + slope·log π), back through the cap.

    Args:
      z: logits, as `logits` returns them.
      at_target: where a logit is its row's target.
      rows, scale: broadcast against z.
    """
    log_probs = z - rows.lse
    factor = rows.constant if rows.slope is None else rows.constant + rows.slope * log_probs
    gradient = jnp.where(at_target, rows.onehot, 0) - jnp.exp(log_probs) * factor
    return through_cap(gradient, z, softcap, scale)


def through_cap(gradient: Array, z: Array, softcap: float | None, scale: Array | None) -> Array:
    """A gradient back through the cap of z = cap(product)·scale; the scale is the caller's."""
    if softcap is None:
        return gradient
    capped = z * (1 / softcap) if scale is None else z / (softcap * scale)
    return gradient * (1 - capped * capped)
