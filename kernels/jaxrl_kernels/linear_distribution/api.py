"""Statistics of whole next-token distributions: plain XLA on every platform, sharded or not.

There is no Mosaic or Triton body. Logits come in tiles, as in `linear_logprob`, and are computed a second
time in the backward pass; there is never an array of [N, V].
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxrl_kernels.linear_distribution import statistics
from jaxrl_kernels.linear_distribution.statistics import JSD, KL, Gather, Statistic, TopK, Walk
from jaxrl_kernels.linear_logprob.walk import Caps, Model, Operands, backward
from jaxrl_kernels.manual import vary
from jaxrl_kernels.operands import Partition, check_shapes, inverse_temperature

Array = jax.Array


class Collision(NamedTuple):
    """Of a distribution π over the vocabulary with entropy H, float32[N] each.

    Attributes:
      probability: Σπ², the chance that two draws are equal; 1 − 2π_a + Σπ² is the squared norm of the
        gradient of log π_a with respect to the logits.
      covariance: Σπ²·(log π + H), the covariance of π and log π under π; at least 0.
    """

    probability: Array
    covariance: Array


def linear_gather(
    hidden: Array,
    head: Array,
    ids: Array,
    *,
    temperature: Array | float = 1.0,
    softcap: float | None = None,
    bias: Array | None = None,
    active: Array | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    row_axes: Sequence[str] = (),
    vocab_axis: str | None = None,
    embed_axis: str | None = None,
) -> Array:
    """log softmax(cap(hidden·headᵀ + bias) / temperature) at K ids of each row.

    Differentiable in `hidden`, `head` and `bias`, once.

    Example:
      >>> logp = linear_gather(jnp.eye(2), jnp.zeros((4, 2)), jnp.array([[3, 3], [0, -1]]))  # ln 4
      >>> [[round(float(x), 4) for x in row] for row in logp]
      [[-1.3863, -1.3863], [-1.3863, 0.0]]

    Args:
      hidden: f[N, D].
      head: f[V, D], cast to hidden's dtype. Products accumulate in float32.
      ids: i32[N, K], repeated or not. One outside [0, V) gives 0 and has no gradient.
      temperature: scalar or f32[N], above 0; a constant.
      softcap: c of cap(z) = c·tanh(z/c), before the temperature; None = off.
      bias: f[V] or None.
      active: bool[N] rows that are wanted; None = all. The others get 0, have no gradient, and may hold
        anything, NaN included; work is saved where they come in blocks.
      mesh: to work on, each device on its part. None = the arrays are on one device, or inside a `shard_map`
        of the caller's.
      row_axes: mesh axes over which N is cut.
      vocab_axis: mesh axis over which V is cut, or None.
      embed_axis: mesh axis, one of `row_axes`, over which the head's D is cut, or None. The head is gathered
        over it here, and its gradient reduced and scattered.

    Returns:
      f32[N, K], in nats, at most 0.

    Raises:
      ValueError: shapes that do not fit together or are not divided by the mesh, an unknown axis.
    """
    if ids.ndim != 2 or ids.shape[:1] != hidden.shape[:1] or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids {ids.dtype}{ids.shape} must be integers [N, K], N={hidden.shape[0]}")
    partition = Partition(mesh, tuple(row_axes), vocab_axis, embed_axis)
    model = _model(hidden, head, bias, temperature, active, partition)
    logp, _ = _run(Gather(), (model,), (softcap,), ids.astype(jnp.int32), active, partition)
    return jnp.where((ids >= 0) & (ids < head.shape[0]), logp, 0)


def linear_top_k(
    hidden: Array,
    head: Array,
    k: int,
    *,
    temperature: Array | float = 1.0,
    softcap: float | None = None,
    bias: Array | None = None,
    active: Array | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    row_axes: Sequence[str] = (),
    vocab_axis: str | None = None,
    embed_axis: str | None = None,
) -> tuple[Array, Array]:
    """The k largest log-probs of each row and their ids, as `jax.lax.top_k` of the whole rows.

    Differentiable in `hidden`, `head` and `bias` through the log-probs, once, for fixed ids.

    Example:
      >>> logp, ids = linear_top_k(jnp.eye(2), jnp.array([[0.0, 1.0], [2.0, 1.0], [0.0, 0.0]]), 2)
      >>> ids.tolist()  # among equals the lower id comes first
      [[1, 0], [0, 1]]

    Args:
      k: in [1, V].
      hidden, head, temperature, softcap, bias, active, mesh, row_axes, vocab_axis, embed_axis: as
        `linear_gather`.

    Returns:
      f32[N, k] log-probs in nats, the largest first, and their ids i32[N, k].

    Raises:
      ValueError: as `linear_gather`; k outside [1, V].
    """
    partition = Partition(mesh, tuple(row_axes), vocab_axis, embed_axis)
    model = _model(hidden, head, bias, temperature, active, partition)
    if not 1 <= k <= head.shape[0]:
        raise ValueError(f"k={k} must be from 1 to V={head.shape[0]}")
    logp, ids = _run(TopK(k), (model,), (softcap,), (), active, partition)
    return logp, ids


def linear_kl(
    student: Sequence[Array],
    teacher: Sequence[Array],
    *,
    direction: str,
    temperature: Array | float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    active: Array | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    row_axes: Sequence[str] = (),
    vocab_axis: str | None = None,
    embed_axis: str | None = None,
) -> Array:
    """KL over the whole vocabulary between two models' next-token distributions.

    "forward" is KL(teacher‖student), "reverse" KL(student‖teacher). Differentiable in the student's arrays,
    once; the teacher is a constant (`stop_gradient`).

    Example:
      >>> hidden, head = jnp.ones((1, 1)), jnp.log(jnp.array([[0.5], [0.25], [0.25]]))
      >>> uniform = (hidden, jnp.zeros((3, 1)))
      >>> round(float(linear_kl(uniform, (hidden, head), direction="forward")[0]), 4)  # ln 3 − 1.5·ln 2
      0.0589

    Args:
      student: (hidden f[N, D], head f[V, D]) or (hidden, head, bias f[V]).
      teacher: the same, of the same N and V; its D may differ.
      direction: "forward" or "reverse".
      temperature: of both, scalar or f32[N], above 0; a constant.
      softcap, teacher_softcap: of the one and the other; None = off.
      active, mesh, row_axes, vocab_axis, embed_axis: as `linear_gather`, of both.

    Returns:
      f32[N], in nats, at least 0; 0 where the two are the same.

    Raises:
      ValueError: as `linear_gather`; another direction; N or V that differ.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f'direction {direction!r} must be "forward" or "reverse"')
    partition = Partition(mesh, tuple(row_axes), vocab_axis, embed_axis)
    models = _pair(student, teacher, temperature, active, partition)
    kl, _ = _run(KL(direction == "reverse"), models, (softcap, teacher_softcap), (), active, partition)
    return kl


def linear_jsd(
    student: Sequence[Array],
    teacher: Sequence[Array],
    *,
    beta: float = 0.5,
    temperature: Array | float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    active: Array | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    row_axes: Sequence[str] = (),
    vocab_axis: str | None = None,
    embed_axis: str | None = None,
) -> Array:
    """Generalised Jensen-Shannon divergence over the whole vocabulary (arXiv 2306.13649).

    β·KL(teacher‖m) + (1−β)·KL(student‖m) with m = β·teacher + (1−β)·student. Differentiable in the student's
    arrays, once; the teacher is a constant. Logits are computed once more than for `linear_kl`.

    Args:
      beta: β in (0, 1). At both ends the divergence is 0.
      student, teacher, temperature, softcap, teacher_softcap, active, mesh, row_axes, vocab_axis, embed_axis:
        as `linear_kl`.

    Returns:
      f32[N], in nats, at least 0 and at most −β·ln β − (1−β)·ln(1−β).

    Raises:
      ValueError: as `linear_gather`; beta outside (0, 1); N or V that differ.
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"beta={beta} must be in (0, 1); forward KL (elsewhere beta=0) and reverse KL (1) are linear_kl"
        )
    partition = Partition(mesh, tuple(row_axes), vocab_axis, embed_axis)
    models = _pair(student, teacher, temperature, active, partition)
    jsd, _ = _run(JSD(beta), models, (softcap, teacher_softcap), (), active, partition)
    return jsd


def linear_collision(
    hidden: Array,
    head: Array,
    *,
    temperature: Array | float = 1.0,
    softcap: float | None = None,
    bias: Array | None = None,
    active: Array | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    row_axes: Sequence[str] = (),
    vocab_axis: str | None = None,
    embed_axis: str | None = None,
) -> Collision:
    """Σπ² and Σπ²·Λ with Λ = log π + H, for token weights that are constants (DynaMO, arXiv 2602.19208).

    A step Δz = ξ·(1[a] − π) of the logits changes the entropy by −ξ·(π_a·Λ_a − Σπ²·Λ), to first order. No
    gradient.

    Args:
      hidden, head, temperature, softcap, bias, active, mesh, row_axes, vocab_axis, embed_axis: as
        `linear_gather`.

    Returns:
      `Collision` of f32[N].

    Raises:
      ValueError: as `linear_gather`.
    """
    partition = Partition(mesh, tuple(row_axes), vocab_axis, embed_axis)
    model = _model(hidden, head, bias, temperature, active, partition)
    constant = jax.lax.stop_gradient(model)
    return Collision(*_run(None, (constant,), (softcap,), (), active, partition))


class _How(NamedTuple):
    """What is static. `statistic` None stands for `statistics.collision`, which has no gradient."""

    statistic: Statistic | None
    caps: Caps
    vocab_axis: str | None


def _run(
    statistic: Statistic | None,
    models: tuple[Model, ...],
    caps: Caps,
    rows: Any,
    active: Array | None,
    partition: Partition,
) -> tuple[Array, Any]:
    """The statistic and what comes with it, rows first, of every device's part.

    Args:
      rows: arrays [N, ...] that belong to the rows.

    Gradients add up where a copy is typed as varying or gathered.
    """
    mesh, row_axes, vocab_axis, embed_axis = partition
    if active is None:
        active = jnp.ones(models[0].hidden.shape[:1], bool)

    def local(models: tuple[Model, ...], rows: Any, active: Array) -> Any:
        how = _How(statistic, caps, vocab_axis)
        last = jax.tree.map(lambda a: jnp.moveaxis(a, 0, -1), rows)
        return jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), _evaluate(how, models, last, active))

    if mesh is None:
        return local(models, rows, active)

    def sharded(models: tuple[Model, ...], rows: Any, active: Array) -> Any:
        axes = row_axes if vocab_axis is None else (*row_axes, vocab_axis)
        models = jax.tree.map(lambda a: vary(a, axes), models)
        if embed_axis is not None:
            gather = functools.partial(jax.lax.all_gather, axis_name=embed_axis, axis=1, tiled=True)
            models = tuple(model._replace(head=gather(model.head)) for model in models)
        return local(models, rows, active)

    by_row = PartitionSpec(row_axes or None)
    layout: list[Any] = [by_row, PartitionSpec(vocab_axis, embed_axis), PartitionSpec(vocab_axis), by_row]
    specs = (Model(*layout),) * len(models)
    of_all = jax.shard_map(
        sharded, mesh=mesh, in_specs=(specs, by_row, by_row), out_specs=by_row, check_vma=True
    )
    # symbolic zeros are not implemented in a shard_map outside jit
    return jax.jit(of_all)(models, rows, active)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _evaluate(how: _How, models: tuple[Model, ...], rows: Any, active: Array) -> tuple[Array, Any]:
    """The statistic and what comes with it, [..., N]; the vocabulary may be cut over a mesh axis."""
    result, extra, _ = _value(how, models, rows, active)
    return result, extra


def _value(how: _How, models: tuple[Model, ...], rows: Any, active: Array) -> tuple[Array, Any, Any]:
    walk = _walk(how, models, active)
    if how.statistic is None:
        result, extra = statistics.collision(walk)
        state = None
    else:
        result, extra, state = how.statistic.value(walk, rows)
    result, extra = jax.tree.map(lambda a: jnp.where(active, a, 0), (result, extra))
    return result, extra, state


def _forward(how: _How, *operands: Any) -> tuple[tuple[Array, Any], Any]:
    """With symbolic zeros a leaf is (value, whether it is differentiated)."""
    student = operands[0][0]
    head_gradient = student.head.perturbed or (student.bias is not None and student.bias.perturbed)
    values = jax.tree.map(lambda leaf: leaf.value, operands, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
    result, extra, state = _value(how, *values)
    # what is kept must be arrays: an empty tuple says yes
    return (result, extra), (*values, state, () if head_gradient else None)


def _backward(how: _How, kept: Any, cotangents: Any) -> Any:
    models, rows, active, state, head_gradient = kept
    g = cotangents[0]
    if how.statistic is None or isinstance(g, SymbolicZero):
        return jax.tree.map(lambda _: None, (models, rows, active))
    alive = active & jnp.any((g != 0).reshape(-1, active.shape[0]), axis=0)
    g = jnp.where(alive, g, 0) * (1.0 if models[0].scale is None else models[0].scale)
    walk = _walk(how, models, alive)
    operands = walk.operands._replace(rows=walk.vary(how.statistic.coefficients(walk, state, g)))
    dhidden, dhead, dbias = backward(
        operands, how.caps, how.statistic.gradient, head_gradient=head_gradient is not None
    )
    student: list[Any] = [dhidden, dhead, dbias, None]
    # None instead of a tree of arrays: no gradient
    return (Model(*student), *(None for _ in models[1:])), None, None


_evaluate.defvjp(_forward, _backward, symbolic_zeros=True)


def _walk(how: _How, models: tuple[Model, ...], active: Array) -> Walk:
    walk = Walk(Operands(models, (), active), how.caps, how.vocab_axis)
    return walk._replace(operands=walk.vary(walk.operands))


def _model(
    hidden: Array,
    head: Array,
    bias: Array | None,
    temperature: Array | float,
    active: Array | None,
    partition: Partition,
) -> Model:
    check_shapes(hidden, head, bias, active)
    partition.check(hidden, head)
    scale = inverse_temperature(temperature, hidden.shape[0])
    if active is not None:
        hidden = jnp.where(active[:, None], hidden, 0)
        scale = None if scale is None else jnp.where(active, scale, 1)
    return Model(hidden, head.astype(hidden.dtype), bias, scale)


def _pair(
    student: Sequence[Array],
    teacher: Sequence[Array],
    temperature: Array | float,
    active: Array | None,
    partition: Partition,
) -> tuple[Model, Model]:
    for name, arrays in (("student", student), ("teacher", teacher)):
        if len(arrays) not in (2, 3):
            raise ValueError(
                f"{name} must be (hidden, head) or (hidden, head, bias), not {len(arrays)} arrays"
            )
    first, second = (
        _model(hidden, head, bias[0] if bias else None, temperature, active, partition)
        for hidden, head, *bias in (student, teacher)
    )
    for name, a, b in (("N", first.hidden, second.hidden), ("V", first.head, second.head)):
        if a.shape[0] != b.shape[0]:
            raise ValueError(
                f"student and teacher must have the same {name}, not {a.shape[0]} and {b.shape[0]}"
            )
    return first, jax.lax.stop_gradient(second)
