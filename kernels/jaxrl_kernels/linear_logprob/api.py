"""`linear_logprob`: one function for every platform, sharded or not."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxrl_kernels import dispatch
from jaxrl_kernels.chunks import dot
from jaxrl_kernels.linear_logprob import pallas_gpu, pallas_tpu, reference, tiles, xla
from jaxrl_kernels.linear_logprob.reference import LogprobStats
from jaxrl_kernels.linear_logprob.tiles import Operands, Sums
from jaxrl_kernels.manual import vary
from jaxrl_kernels.operands import Partition, check_shapes, inverse_temperature

Array = jax.Array


def linear_logprob(
    hidden: Array,
    head: Array,
    targets: Array,
    *,
    temperature: Array | float = 1.0,
    softcap: float | None = None,
    bias: Array | None = None,
    active: Array | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    row_axes: Sequence[str] = (),
    vocab_axis: str | None = None,
    embed_axis: str | None = None,
    implementation: str | None = None,
) -> LogprobStats:
    """log softmax(cap(hidden·headᵀ + bias) / temperature) at the targets, with its entropy; no [N, V] array.

    Differentiable in `hidden`, `head` and `bias` through all three results, once. The backward pass computes
    the logits a second time, skips blocks of rows whose cotangents are all 0 (masked, clipped, without
    advantage), and leaves out the head's gradient where the head is a constant. Only where a device has no
    more than `KEPT_LOGITS` of them, and `implementation` is None, are logits kept instead.

    Example:
      >>> hidden, head = jnp.eye(2), jnp.zeros((4, 2))
      >>> stats = linear_logprob(hidden, head, jnp.array([3, 0]))  # four equal logits
      >>> [round(float(x), 4) for x in (stats.logp[0], stats.entropy[0], stats.lse[0])]
      [-1.3863, 1.3863, 1.3863]

    Args:
      hidden: f[N, D].
      head: f[V, D], cast to hidden's dtype. Products accumulate in float32.
      targets: i32[N] in [0, V). A row whose target lies outside, such as -100, is not active.
      temperature: scalar or f32[N], above 0; a constant.
      softcap: c of cap(z) = c·tanh(z/c), before the temperature; None = off.
      bias: f[V] or None.
      active: bool[N] rows that are wanted; None = all. The others get 0, have no gradient, and may hold
        anything, NaN included; work is saved where they come in blocks.
      mesh: to work on, each device on its part: the Mosaic and Triton kernels cannot be partitioned by the
        compiler. None = the arrays are on one device, or inside a `shard_map` of the caller's.
      row_axes: mesh axes over which N is cut.
      vocab_axis: mesh axis over which V is cut, or None.
      embed_axis: mesh axis, one of `row_axes`, over which the head's D is cut, or None. The head is gathered
        over it here, and its gradient reduced and scattered.
      implementation: "xla", "pallas_tpu", "pallas_gpu" (CUDA), or None for that of the platform compiled for.

    Returns:
      `LogprobStats` of float32[N], in nats; logp ≤ 0.

    Raises:
      ValueError: shapes that do not fit together or are not divided by the mesh, an unknown axis or
        implementation.
    """
    check_shapes(hidden, head, bias, active)
    if targets.shape != hidden.shape[:1] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets {targets.dtype}{targets.shape} must be integers [N], N={hidden.shape[0]}")
    Partition(mesh, tuple(row_axes), vocab_axis, embed_axis).check(hidden, head)
    vocab = head.shape[0]
    wanted = (targets >= 0) & (targets < vocab)
    if active is not None:
        wanted = wanted & active
        hidden = jnp.where(active[:, None], hidden, 0)
    scale = inverse_temperature(temperature, hidden.shape[0])
    scale = None if scale is None else jnp.where(wanted, scale, 1)
    x = Operands(hidden, head.astype(hidden.dtype), targets.astype(jnp.int32), wanted, scale, bias)
    if mesh is None:
        return _of_device(_How(softcap, None, implementation), x)
    return _sharded(x, mesh, tuple(row_axes), vocab_axis, embed_axis, softcap, implementation)


KEPT_LOGITS = 1 << 24
"""So few logits on a device (64 MiB of float32) are kept for the backward pass: three products, not four."""

BODIES: dict[str, Any] = {"xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}


class _How(NamedTuple):
    """What is static."""

    softcap: float | None
    vocab_axis: str | None
    implementation: str | None
    vocab_dim: int = 0
    """Dimension of the head that is the vocabulary; 1 where it was gathered."""

    def body(self, name: str, direction: str, **more: Any) -> Callable[..., Any]:
        """A body's forward or backward function of the operands (and the coefficients)."""
        fn = functools.partial(getattr(BODIES[name], direction), softcap=self.softcap, **more)
        if name == "pallas_tpu":
            return functools.partial(fn, vocab_dim=self.vocab_dim)
        if self.vocab_dim == 0:
            return fn

        def turned(x: Operands, *rows: Any) -> Any:
            out = fn(x._replace(head=x.head.T), *rows)
            if direction == "forward":
                return out
            dhidden, dhead, dbias = out
            return dhidden, None if dhead is None else dhead.T, dbias

        return turned

    def run(self, direction: str, x: Operands, *rows: Any, **more: Any) -> Any:
        """That function for the platform, on this shard of the vocabulary."""
        bodies = {name: self.body(name, direction, **more) for name in BODIES}
        return dispatch.run(self.implementation, _shard(x, self), *rows, **bodies)


def _sharded(
    x: Operands,
    mesh: Mesh | AbstractMesh,
    row_axes: tuple[str, ...],
    vocab_axis: str | None,
    embed_axis: str | None,
    softcap: float | None,
    implementation: str | None,
) -> LogprobStats:
    """`_of_device` for every device's part. Gradients add up where a copy is typed as varying or gathered."""
    rows = PartitionSpec(row_axes or None)
    specs: dict[str, Any] = {
        "hidden": PartitionSpec(row_axes or None, None),
        "head": PartitionSpec(vocab_axis, embed_axis),
        "targets": rows,
        "active": rows,
        "scale": None if x.scale is None else rows,
        "bias": None if x.bias is None else PartitionSpec(vocab_axis),
    }

    def local(x: Operands) -> LogprobStats:
        axes = row_axes if vocab_axis is None else (*row_axes, vocab_axis)
        tensors = jax.tree.map(lambda a: vary(a, axes), (x.hidden, x.head, x.bias))
        x = x._replace(hidden=tensors[0], head=tensors[1], bias=tensors[2])
        if embed_axis is None:
            return _of_device(_How(softcap, vocab_axis, implementation), x)
        # as [D, V], so that the pieces lie one behind the other: else TPUs copy what they gather, and sum
        # the gradient on every device instead of scattering it
        x = x._replace(head=jax.lax.all_gather(x.head.T, embed_axis, axis=0, tiled=True))
        return _of_device(_How(softcap, vocab_axis, implementation, vocab_dim=1), x)

    of_all = jax.shard_map(local, mesh=mesh, in_specs=(Operands(**specs),), out_specs=rows, check_vma=True)
    # symbolic zeros are not implemented in a shard_map outside jit
    return jax.jit(of_all)(x)


def _of_device(how: _How, x: Operands) -> LogprobStats:
    """Results of the rows on this device."""
    few = x.hidden.shape[0] * x.head.shape[how.vocab_dim] <= KEPT_LOGITS
    if not few or how.implementation is not None or how.vocab_axis is not None:
        return _stats(how, x)
    head = x.head.T if how.vocab_dim else x.head
    bias = None if x.bias is None else x.bias.astype(jnp.float32)
    scale = None if x.scale is None else x.scale[:, None]
    z = tiles.logits(dot(x.hidden, head, 1, 1), bias, how.softcap, scale)
    return LogprobStats(*(jnp.where(x.active, a, 0) for a in reference.from_logits(z, x.targets)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stats(how: _How, x: Operands) -> LogprobStats:
    """Results of the rows; the vocabulary may be cut over a mesh axis."""
    sums = how.run("forward", x)
    if how.vocab_axis is not None:
        sums = _merge(sums, how.vocab_axis)
    return LogprobStats(*(jnp.where(x.active, value, 0) for value in tiles.finish(sums)))


def _stats_forward(how: _How, x: Any) -> tuple[LogprobStats, Any]:
    """With symbolic zeros a leaf of `x` is (value, whether it is differentiated)."""
    is_differentiated = x.head.perturbed or (x.bias is not None and x.bias.perturbed)
    operands = jax.tree.map(lambda leaf: leaf.value, x, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
    stats = _stats(how, operands)
    # what is kept must be arrays: an empty tuple says yes
    return stats, (operands, stats, () if is_differentiated else None)


def _stats_backward(how: _How, kept: Any, cotangents: LogprobStats) -> tuple[Any]:
    x, stats, head_gradient = kept
    with_entropy = not isinstance(cotangents.entropy, SymbolicZero)
    zero = jnp.zeros_like(stats.logp)
    cotangents = LogprobStats(*(zero if isinstance(g, SymbolicZero) else g for g in cotangents))
    rows = tiles.coefficients(stats, cotangents, x.active, x.scale, with_entropy=with_entropy)
    x = x._replace(active=x.active & functools.reduce(jnp.logical_or, (g != 0 for g in cotangents)))
    axes = () if how.vocab_axis is None else (how.vocab_axis,)
    rows = jax.tree.map(lambda a: vary(a, axes), rows)
    dhidden, dhead, dbias = how.run("backward", x, rows, head_gradient=head_gradient is not None)
    gradients: dict[str, Any] = {name: None for name in Operands._fields}
    return (Operands(**gradients | {"hidden": dhidden, "head": dhead, "bias": dbias}),)


_stats.defvjp(_stats_forward, _stats_backward, symbolic_zeros=True)


def _shard(x: Operands, how: _How) -> Operands:
    """This shard of the vocabulary's view: targets counted from its first column, all typed as varying."""
    axis = how.vocab_axis
    if axis is None:
        return x
    x = x._replace(targets=x.targets - jax.lax.axis_index(axis) * x.head.shape[how.vocab_dim])
    return jax.tree.map(lambda a: vary(a, (axis,)), x)


def _merge(sums: Sums, axis: str) -> Sums:
    """Sums over all shards of the vocabulary: one maximum and one sum of three numbers per row."""
    peak = jax.lax.pmax(sums.peak, axis)
    moved = tiles.rebase(sums, peak)
    total, moment, target = jax.lax.psum(jnp.stack([moved.total, moved.moment, moved.target]), axis)
    return Sums(peak, total, moment, target)
