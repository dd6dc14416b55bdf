"""Statistics of groups on a TPU: the ids of a block of rows are compared with those of all rows.

Neither sort nor scatter exists inside a TPU kernel, and groups may lie in any order, so every statistic is a
sum (or an extreme) along the lanes of a comparison [block, N], taken N tile by tile. That is N²/1024 vector
operations per pass, three passes: nothing for the thousands of rows of a step.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrl_kernels.group_advantage.xla import GroupStatistics, segment_ids
from jaxrl_kernels.manual import out_shape, vary, varying_axes

Array = jax.Array

BLOCK_ROWS = 256
BLOCK_COLUMNS = 512
"""A comparison is then 512 KiB of float32; a handful of them are alive at once, of 16 MiB."""


def _body(
    own_group: Any,  # i32[BR, 1]
    group: Any,  # i32[1, BC]
    rewards: Any,  # f32[1, BC]
    extra: Any,  # f32[1, BC]
    counts: Any,  # i32[1, BC]
    rows: Any,  # f32[BR, 1] and so on to the end: the statistics, built up in place
    low: Any,
    high: Any,
    mean: Any,
    square: Any,
    total_extra: Any,
    first: Any,
    *,
    size: int,
) -> None:
    step, tile = pl.program_id(1), pl.program_id(2)
    shape = (own_group.shape[0], group.shape[1])
    column = tile * shape[1] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    # beyond the last row stands anything
    is_mate = (own_group[...] == group[...]) & (counts[...] != 0) & (column < size)
    reward = jnp.broadcast_to(rewards[...], shape)

    def total(x: Array) -> Array:
        return jnp.sum(jnp.where(is_mate, x, jnp.float32(0)), axis=1, keepdims=True)

    def smallest(x: Array) -> Array:
        return jnp.min(jnp.where(is_mate, x, jnp.float32(jnp.inf)), axis=1, keepdims=True)

    @pl.when((step == 0) & (tile == 0))
    def _() -> None:
        for ref in (rows, mean, square, total_extra):
            ref[...] = jnp.zeros(ref.shape, ref.dtype)
        for ref in (low, first):
            ref[...] = jnp.full(ref.shape, jnp.inf, ref.dtype)
        high[...] = jnp.full(high.shape, -jnp.inf, high.dtype)

    @pl.when(step == 0)
    def _() -> None:
        rows[...] += total(jnp.ones(shape, jnp.float32))
        total_extra[...] += total(jnp.broadcast_to(extra[...], shape))
        low[...] = jnp.minimum(low[...], smallest(reward))
        high[...] = jnp.maximum(high[...], -smallest(-reward))
        first[...] = jnp.minimum(first[...], smallest(column.astype(jnp.float32)))

    @pl.when(step == 1)
    def _() -> None:
        mean[...] += total(reward - low[...])

        @pl.when(tile == pl.num_programs(2) - 1)
        def _() -> None:
            mean[...] /= jnp.maximum(rows[...], jnp.float32(1))

    @pl.when(step == 2)
    def _() -> None:
        square[...] += total((reward - low[...] - mean[...]) ** 2)


def statistics(rewards: Array, extra: Array, group: Array, counts: Array) -> GroupStatistics:
    """As `xla.statistics`, computed in float32 and returned in the dtype of `rewards`."""
    size, dtype = rewards.shape[0], rewards.dtype
    if jnp.iinfo(group.dtype).bits > 32:  # the kernel compares 32 bits
        group = segment_ids(group)
    operands = (
        group.astype(jnp.int32),
        jnp.where(counts, rewards, 0).astype(jnp.float32),
        jnp.where(counts, extra, 0).astype(jnp.float32),
        counts.astype(jnp.int32),
    )
    axes = tuple(varying_axes(*operands))
    ids, *others = (vary(x, axes) for x in operands)
    own = pl.BlockSpec((min(BLOCK_ROWS, size), 1), lambda i, step, j: (i, 0))
    other = pl.BlockSpec((1, min(BLOCK_COLUMNS, size)), lambda i, step, j: (0, j))
    rows, low, high, mean, square, total, first = pl.pallas_call(
        partial(_body, size=size),
        grid=(pl.cdiv(size, BLOCK_ROWS), 3, pl.cdiv(size, BLOCK_COLUMNS)),
        in_specs=[own, *[other] * 4],
        out_specs=[own] * 7,
        out_shape=[out_shape((size, 1), jnp.float32, operands)] * 7,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        name="group_statistics",
    )(ids[:, None], ids[None], *(x[None] for x in others))
    found = GroupStatistics(rows, low, high - low, mean, square, total, first)
    return GroupStatistics(*(jnp.where(rows > 0, x, 0)[:, 0].astype(dtype) for x in found))
