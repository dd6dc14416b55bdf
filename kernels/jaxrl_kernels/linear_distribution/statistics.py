"""The maths of each statistic: what a tile of logits adds to it, and the gradient of the logits.

Sums over the vocabulary are relative to the largest logit so far, as in `linear_logprob.tiles`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxrl_kernels.linear_logprob.tiles import LOWEST
from jaxrl_kernels.linear_logprob.walk import Caps, Operands, forward
from jaxrl_kernels.manual import vary

Array = jax.Array
Logits = tuple[Array, ...]


class Walk(NamedTuple):
    """The vocabulary of one device, and how to merge with those of the others.

    Attributes:
      operands, caps: the logits.
      axis: mesh axis over which the vocabulary is cut, or None.
    """

    operands: Operands
    caps: Caps
    axis: str | None

    def fold(self, tile: Callable[..., Any], start_from: Callable[[Array], Any], rows: Any = ()) -> Any:
        """As `walk.forward`, of this device's columns."""
        return forward(self.operands._replace(rows=self.vary(rows)), self.caps, tile, start_from)

    def vary(self, tree: Any) -> Any:
        axes = () if self.axis is None else (self.axis,)
        return jax.tree.map(lambda a: vary(a, axes), tree)

    def first(self) -> Array | int:
        """Id of this device's first column."""
        return (
            0 if self.axis is None else jax.lax.axis_index(self.axis) * self.operands.models[0].head.shape[0]
        )

    def max(self, x: Any) -> Any:
        return x if self.axis is None else jax.lax.pmax(x, self.axis)

    def sum(self, x: Any) -> Any:
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def stack(self, x: Array) -> Array:
        """[K, N] of every device, in order, as [devices·K, N] on all."""
        if self.axis is None:
            return x
        # a sum, for what all_gather returns is typed as varying
        own = jnp.arange(jax.lax.axis_size(self.axis)) == jax.lax.axis_index(self.axis)
        return self.sum(jnp.where(own[:, None, None], x, 0)).reshape(-1, x.shape[1])


class Statistic(Protocol):
    """What `api` makes a differentiable function of. Arrays that belong to rows have them last."""

    def value(self, walk: Walk, rows: Any) -> tuple[Array, Any, Any]:
        """The result [..., N], what comes with it without a gradient, and the state for `coefficients`."""

    def coefficients(self, walk: Walk, state: Any, g: Array) -> Any:
        """What `gradient` needs of a row: linear in the cotangent g of the result."""

    def gradient(self, z: Logits, first: Array | int, rows: Any) -> Array:
        """That of the first model's logits z[0] [width, rows], of the columns from `first` on."""


class LogSum(NamedTuple):
    """m = max z and Σ e^(z−m), at least 1, of some columns of each row."""

    peak: Array
    total: Array

    def add(self, z: Array) -> tuple["LogSum", Array, Array]:
        """With more columns; and their z−m and e^(z−m)."""
        peak = jnp.maximum(self.peak, jnp.max(z, axis=0))
        x = z - peak
        weight = jnp.exp(x)
        return LogSum(peak, self.shrunk(peak) + jnp.sum(weight, axis=0)), x, weight

    def shrunk(self, peak: Array) -> Array:
        """The total relative to a higher peak."""
        return jnp.exp(self.peak - peak) * self.total

    def merged(self, walk: Walk) -> "LogSum":
        peak = walk.max(self.peak)
        return LogSum(peak, walk.sum(self.shrunk(peak)))

    def lse(self) -> Array:
        return self.peak + jnp.log(self.total)

    def log_prob(self, z: Array) -> Array:
        """A sum of two numbers that are not positive."""
        return (z - self.peak) - jnp.log(self.total)


def _empty(zero: Array) -> LogSum:
    return LogSum(zero + LOWEST, zero)


class _Picked:
    """d log π(ids): dz = Σ_k g_k·(1[id_k] − π)."""

    def coefficients(self, walk: Walk, state: Any, g: Array) -> Any:
        ids, lse = state
        return ids - walk.first(), g, jnp.sum(g, axis=0), lse

    def gradient(self, z: Logits, first: Array | int, rows: Any) -> Array:
        ids, g, total, lse = rows
        width, size = z[0].shape
        ids = ids - first
        dz = -jnp.exp(z[0] - lse) * total
        # negative ids would count from the end
        places = jnp.where(ids < 0, width, ids), jnp.arange(size)[None, :]
        return dz.at[places].add(g, mode="drop")


@dataclasses.dataclass(frozen=True)
class Gather(_Picked):
    """log π at ids i32[K, N], which lie anywhere; the result at one outside [0, V) means nothing."""

    def value(self, walk: Walk, rows: Any) -> tuple[Array, Any, Any]:
        def tile(z: Logits, first: Array | int, ids: Array, sums: Any) -> Any:
            some, picked = sums
            ids = ids - first
            here = jnp.take_along_axis(z[0], ids, axis=0, mode="clip")
            inside = (ids >= 0) & (ids < z[0].shape[0])
            return some.add(z[0])[0], picked + jnp.where(inside, here, 0)

        def start_from(zero: Array) -> Any:
            return _empty(zero), jnp.broadcast_to(zero, (rows.shape[0], *zero.shape))

        some, picked = walk.fold(tile, start_from, rows - walk.first())
        everything, picked = some.merged(walk), walk.sum(picked)
        return everything.log_prob(picked), None, (rows, everything.lse())


@dataclasses.dataclass(frozen=True)
class TopK(_Picked):
    """The k largest log π, with their ids; the lower id first among equals."""

    k: int

    def value(self, walk: Walk, rows: Any) -> tuple[Array, Any, Any]:
        keep = min(self.k, walk.operands.models[0].head.shape[0])

        def tile(z: Logits, first: Array | int, _: Any, sums: Any) -> Any:
            some, best, ids = sums
            # those kept have lower ids than the tile, and top_k prefers what comes first
            best, places = jax.lax.top_k(jnp.concatenate([best, z[0]]), keep, axis=0)
            kept = jnp.take_along_axis(ids, places, axis=0, mode="clip")
            return some.add(z[0])[0], best, jnp.where(places < keep, kept, first + places - keep)

        def start_from(zero: Array) -> Any:
            best = jnp.broadcast_to(zero, (keep, *zero.shape))
            return _empty(zero), best + LOWEST, best.astype(jnp.int32)

        some, best, ids = walk.fold(tile, start_from)
        everything, best, ids = some.merged(walk), walk.stack(best), walk.stack(ids + walk.first())
        best, places = jax.lax.top_k(best, self.k, axis=0)
        ids = jnp.take_along_axis(ids, places, axis=0)
        return everything.log_prob(best), ids, (ids, everything.lse())


class _Cross(NamedTuple):
    """Sums for KL(a‖b): x = z−m of each, and Σ e^(x_a)·(x_a − x_b)."""

    a: LogSum
    b: LogSum
    cross: Array

    def moved(self, peak_a: Array, peak_b: Array) -> Array:
        """The cross sum relative to higher peaks."""
        by_a, by_b = self.a.peak - peak_a, self.b.peak - peak_b
        return jnp.exp(by_a) * (self.cross + (by_a - by_b) * self.a.total)


@dataclasses.dataclass(frozen=True)
class KL:
    """KL(teacher‖student), or if reverse KL(student‖teacher), of the models (student, teacher).

    In one pass: KL(a‖b) = Σ e^(x_a)·(x_a − x_b) / Σ e^(x_a) − ln(Σ e^(x_a) / Σ e^(x_b)), x = z−m of each.
    The student's logits have the gradient π_student − π_teacher, and if reverse
    π_student·(log π_student − log π_teacher − KL).
    """

    reverse: bool

    def value(self, walk: Walk, rows: Any) -> tuple[Array, Any, Any]:
        def tile(z: Logits, first: Array | int, _: Any, sums: _Cross) -> _Cross:
            z_a, z_b = z if self.reverse else z[::-1]
            a, x_a, weight = sums.a.add(z_a)
            b, x_b, _ = sums.b.add(z_b)
            return _Cross(a, b, sums.moved(a.peak, b.peak) + jnp.sum(weight * (x_a - x_b), axis=0))

        some = walk.fold(tile, lambda zero: _Cross(_empty(zero), _empty(zero), zero))
        a, b = some.a.merged(walk), some.b.merged(walk)
        cross = walk.sum(some.moved(a.peak, b.peak))
        kl = jnp.maximum(cross / a.total - jnp.log(a.total / b.total), 0)
        student, teacher = (a, b) if self.reverse else (b, a)
        return kl, None, (student.lse(), teacher.lse(), kl)

    def coefficients(self, walk: Walk, state: Any, g: Array) -> Any:
        return (g, *state)

    def gradient(self, z: Logits, first: Array | int, rows: Any) -> Array:
        g, lse, teacher_lse, kl = rows
        log_p, log_q = z[0] - lse, z[1] - teacher_lse
        p = jnp.exp(log_p)
        return g * (p * (log_p - log_q - kl) if self.reverse else p - jnp.exp(log_q))


@dataclasses.dataclass(frozen=True)
class JSD:
    """β·KL(q‖m) + (1−β)·KL(p‖m), m = β·q + (1−β)·p, of the models p (student) and q (teacher).

    The mixture is of probabilities, so the first pass is for the two log-sum-exps alone. The student's logits
    have the gradient (1−β)·p·(log p − log m − KL(p‖m)).
    """

    beta: float

    def value(self, walk: Walk, rows: Any) -> tuple[Array, Any, Any]:
        def both(z: Logits, first: Array | int, _: Any, sums: Any) -> Any:
            return tuple(some.add(part)[0] for some, part in zip(sums, z))

        def tile(z: Logits, first: Array | int, lses: Any, sums: Any) -> Any:
            p, q, over_p, over_q = self._parts(z, *lses)
            return sums[0] + jnp.sum(p * over_p, axis=0), sums[1] + jnp.sum(q * over_q, axis=0)

        some = walk.fold(both, lambda zero: (_empty(zero), _empty(zero)))
        lses = tuple(part.merged(walk).lse() for part in some)
        of_p, of_q = walk.sum(walk.fold(tile, lambda zero: (zero, zero), lses))
        return jnp.maximum(self.beta * of_q + (1 - self.beta) * of_p, 0), None, (*lses, of_p)

    def coefficients(self, walk: Walk, state: Any, g: Array) -> Any:
        return (g * (1 - self.beta), *state)

    def gradient(self, z: Logits, first: Array | int, rows: Any) -> Array:
        g, lse, teacher_lse, of_p = rows
        p, _, over_p, _ = self._parts(z, lse, teacher_lse)
        return g * p * (over_p - of_p)

    def _parts(self, z: Logits, lse: Array, teacher_lse: Array) -> Logits:
        """p, q, log p − log m and log q − log m."""
        log_p, log_q = z[0] - lse, z[1] - teacher_lse
        # beyond e^80 the smaller probability is 0 to any precision, and e^difference must not overflow
        difference = jnp.clip(log_p - log_q, -80, 80)
        over_p = -jnp.log1p(self.beta * jnp.expm1(-difference))
        over_q = -jnp.log1p((1 - self.beta) * jnp.expm1(difference))
        return jnp.exp(log_p), jnp.exp(log_q), over_p, over_q


class _Moments(NamedTuple):
    """Sums of x = z−m: Σ e^x, Σ x·e^x, Σ e^(2x), Σ x·e^(2x)."""

    some: LogSum
    moment: Array
    square: Array
    square_moment: Array

    def moved(self, peak: Array) -> tuple[Array, Array, Array]:
        """The last three relative to a higher peak."""
        by = self.some.peak - peak
        shrink = jnp.exp(by)
        return (
            shrink * (self.moment + by * self.some.total),
            shrink**2 * self.square,
            shrink**2 * (self.square_moment + by * self.square),
        )


def collision(walk: Walk) -> tuple[Array, Array]:
    """Σπ² and Σπ²·(log π + H), in which the log-sum-exp cancels: x − Σ x·e^x / Σ e^x stands for log π + H."""

    def tile(z: Logits, first: Array | int, _: Any, sums: _Moments) -> _Moments:
        some, x, weight = sums.some.add(z[0])
        terms = (weight * x, weight**2, weight**2 * x)
        return _Moments(some, *(old + jnp.sum(t, axis=0) for old, t in zip(sums.moved(some.peak), terms)))

    sums = walk.fold(tile, lambda zero: _Moments(_empty(zero), zero, zero, zero))
    peak, total = sums.some.merged(walk)
    moment, square, square_moment = walk.sum(sums.moved(peak))
    return square / total**2, (square_moment - square * (moment / total)) / total**2
