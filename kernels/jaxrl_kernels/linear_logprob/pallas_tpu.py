"""TPU bodies in Pallas: a tile of logits lives in VMEM and nowhere else.

Forward: grid (core, row block, vocabulary tile). Every lane keeps its own running sums, so that nothing
crosses lanes within the loop; they are merged once per row block.

Backward: grid (core, vocabulary tile, row block), one pass: the logits are recomputed, the head's gradient
gathers in VMEM, and the hidden gradient in HBM, by reading and writing a float32 buffer that is input and
output at once. Each core of a device has a part of the vocabulary and a buffer of its own. Without a head
gradient: grid (core, row block, vocabulary tile), and the hidden gradient gathers in VMEM.

Row blocks without an active row take no step: a prefetched list says which blocks to visit, and their number
is the bound of the grid.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrl_kernels.linear_logprob import tiles
from jaxrl_kernels.linear_logprob.blocks import LANES, SUBLANES, Plan, Tile, plan
from jaxrl_kernels.linear_logprob.tiles import LOWEST, Coefficients, Operands, Sums
from jaxrl_kernels.manual import out_shape, vary, varying_axes

Array = jax.Array
Ref = Any

LEAST_BLOCKS = 3
"""A block of the hidden gradient is read again one vocabulary tile after it was written. The pipeline
fetches the next block while it writes the last: with fewer blocks it would read what is not there yet."""


def forward(
    operands: Operands, *, softcap: float | None, vocab_dim: int = 0, using: Plan | None = None
) -> Sums:
    """Sums over the vocabulary for each row, f32[N] each; anything in rows that are not active.

    Args:
      operands: the arrays.
      softcap: c of c·tanh(z/c), or None.
      vocab_dim: 1 if the head is [D, V] instead of [V, D].
      using: tiles; None for those of the chip.
    """
    num_rows, vocab = operands.hidden.shape[0], operands.head.shape[vocab_dim]
    using = using or _plan(operands)
    tile = _fit(using.forward, num_rows, vocab, using.cores)
    x = _pad(operands, tile.rows, using.cores)
    columns = _without_none(target=x.targets, scale=x.scale)
    n = x.hidden.shape[0]
    order, count = _visits(x, tile, using.cores)
    out = pl.pallas_call(
        functools.partial(
            _forward_kernel,
            names=tuple(columns),
            has_bias=x.bias is not None,
            softcap=softcap,
            vocab=vocab,
            vocab_dim=vocab_dim,
        ),
        out_shape=out_shape((n, len(Sums._fields)), jnp.float32, jax.tree.leaves(x)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(using.cores, count, pl.cdiv(vocab, tile.columns)),
            in_specs=_in_specs(x, tile, len(columns), vocab_dim, _rows_outside),
            out_specs=pl.BlockSpec(
                (tile.rows, len(Sums._fields)), lambda *step: (_rows_outside(*step)[0], 0)
            ),
            scratch_shapes=[pltpu.VMEM((tile.rows, LANES), jnp.float32)] * len(Sums._fields),
        ),
        compiler_params=_compiler_params(using),
        cost_estimate=_cost(1, x, n * vocab),
        name="linear_logprob_forward",
    )(order, *_tensors(x, columns))
    return Sums(*(out[:num_rows, k] for k in range(len(Sums._fields))))


def backward(
    operands: Operands,
    rows: Coefficients,
    *,
    softcap: float | None,
    head_gradient: bool,
    vocab_dim: int = 0,
    using: Plan | None = None,
) -> tuple[Array, Array | None, Array | None]:
    """Gradients of hidden, head and bias in their dtypes; the last two None where not asked for.

    Args:
      operands, softcap, vocab_dim, using: as `forward`.
      rows: as `tiles.coefficients`; 0 in rows that are not active.
      head_gradient: whether head and bias have a gradient.
    """
    num_rows, vocab = operands.hidden.shape[0], operands.head.shape[vocab_dim]
    using = using or _plan(operands)
    tile = _fit(using.backward, num_rows, vocab, LEAST_BLOCKS if head_gradient else using.cores)
    x = _pad(operands, tile.rows, *((1, LEAST_BLOCKS) if head_gradient else (using.cores, 1)))
    n, d = x.hidden.shape
    more = n - num_rows
    columns = _without_none(target=x.targets, scale=x.scale) | {
        name: jnp.pad(value, (0, more)) for name, value in _without_none(**rows._asdict()).items()
    }
    pieces = pl.cdiv(vocab, tile.columns)
    like = jax.tree.leaves((x, rows))
    kernel: dict[str, Any] = {
        "names": tuple(columns),
        "has_bias": x.bias is not None,
        "softcap": softcap,
        "vocab": vocab,
        "vocab_dim": vocab_dim,
    }
    cost = _cost(3 if head_gradient else 2, x, n * vocab)
    if not head_gradient:
        order, count = _visits(x, tile, using.cores)
        dhidden = pl.pallas_call(
            functools.partial(_hidden_kernel, **kernel),
            out_shape=out_shape((n, d), operands.hidden.dtype, like),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(using.cores, count, pieces),
                in_specs=_in_specs(x, tile, len(columns), vocab_dim, _rows_outside),
                out_specs=pl.BlockSpec((tile.rows, d), lambda *step: (_rows_outside(*step)[0], 0)),
                scratch_shapes=[pltpu.VMEM((tile.rows, d), jnp.float32)],
            ),
            compiler_params=_compiler_params(using),
            cost_estimate=cost,
            name="linear_logprob_backward_hidden",
        )(order, *_tensors(x, columns))
        return jnp.where(operands.active[:, None], dhidden[:num_rows], 0), None, None

    order, count = _visits(x, tile, cores=1, least=LEAST_BLOCKS)
    share = pl.cdiv(pieces, using.cores)  # vocabulary tiles of a core; the last may have fewer

    def place_within(core: Any, j: Any, i: Any, order: Ref) -> tuple[Any, Any]:
        return order[i, 0], jnp.minimum(core * share + j, pieces - 1)

    in_specs = _in_specs(x, tile, len(columns), vocab_dim, place_within)
    gathered = pl.BlockSpec((1, tile.rows, d), lambda c, j, i, order: (c, order[i, 0], 0))
    head_spec = _head_spec(tile, d, vocab_dim, place_within)
    out_specs = [gathered, head_spec]
    shapes = [
        out_shape((using.cores, n, d), jnp.float32, like),
        out_shape(x.head.shape, operands.head.dtype, like),
    ]
    turned = (tile.columns, d)[:: 1 - 2 * vocab_dim]
    scratch = [pltpu.VMEM(turned, jnp.float32)]
    if x.bias is not None:
        out_specs.append(pl.BlockSpec((1, tile.columns), lambda *step: (0, place_within(*step)[1])))
        shapes.append(out_shape((1, vocab), jnp.float32, like))
        scratch.append(pltpu.VMEM((1, tile.columns), jnp.float32))
    start = vary(jnp.zeros(shapes[0].shape, jnp.float32), tuple(varying_axes(*like)))
    dhidden, dhead, *dbias = pl.pallas_call(
        functools.partial(_backward_kernel, share=share, pieces=pieces, **kernel),
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(using.cores, share, count),
            in_specs=[*in_specs, gathered],
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        input_output_aliases={1 + len(in_specs): 0},
        compiler_params=_compiler_params(using),
        cost_estimate=cost,
        name="linear_logprob_backward",
    )(order, *_tensors(x, columns), start)
    dhidden = jnp.sum(dhidden, axis=0)[:num_rows].astype(operands.hidden.dtype)
    return dhidden, dhead, None if x.bias is None else dbias[0][0].astype(x.bias.dtype)


def _forward_kernel(
    order: Ref,
    hidden: Ref,
    head: Ref,
    packed: Ref,
    *refs: Ref,
    names: Sequence[str],
    has_bias: bool,
    **how: Any,
) -> None:
    bias, (out, *scratch) = _split_bias(refs, has_bias)
    peak, total, moment, target = scratch
    j = pl.program_id(2)
    width, vocab = head.shape[how["vocab_dim"]], how["vocab"]

    @pl.when(j == 0)
    def _() -> None:
        peak[...] = jnp.full(peak.shape, LOWEST, jnp.float32)
        for sums in (total, moment, target):
            sums[...] = jnp.zeros(sums.shape, jnp.float32)

    z, column, at_target = _logits(hidden[...], head[...], bias, _unpack(packed, names), j, **how)
    if vocab % width:
        z = jnp.where(column < vocab - j * width, z, LOWEST)
    lanes = [slice(start, start + LANES) for start in range(0, width, LANES)]
    old = Sums(peak[...], total[...], moment[...], target[...])
    sums = tiles.rebase(old, functools.reduce(jnp.maximum, (z[:, lane] for lane in lanes), old.peak))
    for lane in lanes:
        weight, moment_term = tiles.terms(z[:, lane], sums.peak)
        sums = Sums(
            sums.peak,
            sums.total + weight,
            sums.moment + moment_term,
            sums.target + jnp.where(at_target[:, lane], z[:, lane], 0),
        )
    for ref, value in zip(scratch, sums):
        ref[...] = value

    @pl.when(j == pl.num_programs(2) - 1)
    def _() -> None:
        lanes = Sums(peak[...], total[...], moment[...], target[...])
        merged = tiles.rebase(lanes, jnp.max(lanes.peak, axis=1, keepdims=True))
        for k, value in enumerate(merged):
            reduce = jnp.max if k == 0 else jnp.sum
            out[:, k : k + 1] = reduce(value, axis=1, keepdims=True)


def _hidden_kernel(
    order: Ref,
    hidden: Ref,
    head: Ref,
    packed: Ref,
    *refs: Ref,
    names: Sequence[str],
    has_bias: bool,
    **how: Any,
) -> None:
    bias, (dhidden, gathered) = _split_bias(refs, has_bias)
    j = pl.program_id(2)

    @pl.when(j == 0)
    def _() -> None:
        gathered[...] = jnp.zeros(gathered.shape, jnp.float32)

    _clear_beyond(head, j, how["vocab"], how["vocab_dim"])
    dz = _dlogits(hidden[...], head[...], bias, _unpack(packed, names), j, **how)
    gathered[...] += _dot(dz.astype(head.dtype), head[...], 1, how["vocab_dim"])

    @pl.when(j == pl.num_programs(2) - 1)
    def _() -> None:
        dhidden[...] = gathered[...].astype(dhidden.dtype)


def _backward_kernel(
    order: Ref,
    hidden: Ref,
    head: Ref,
    packed: Ref,
    *refs: Ref,
    names: Sequence[str],
    has_bias: bool,
    share: int,
    pieces: int,
    **how: Any,
) -> None:
    bias, (before, after, dhead, *rest) = _split_bias(refs, has_bias)
    dbias, head_sum, bias_sum = rest if has_bias else (None, *rest, None)
    i, j = pl.program_id(2), pl.program_id(0) * share + pl.program_id(1)
    vocab_dim = how["vocab_dim"]
    is_real = j < pieces  # the last core may have a tile less

    @pl.when(is_real & (i == 0))
    def _() -> None:
        _clear_beyond(head, j, how["vocab"], vocab_dim)
        head_sum[...] = jnp.zeros(head_sum.shape, jnp.float32)
        if has_bias:
            bias_sum[...] = jnp.zeros(bias_sum.shape, jnp.float32)

    @pl.when(is_real)
    def _() -> None:
        dz = _dlogits(hidden[...], head[...], bias, _unpack(packed, names), j, **how)
        if has_bias:
            bias_sum[...] += jnp.sum(dz, axis=0, keepdims=True)
        dz = dz.astype(hidden.dtype)
        after[0] = before[0] + _dot(dz, head[...], 1, vocab_dim)
        one, other = (dz, hidden[...]) if vocab_dim == 0 else (hidden[...], dz)
        head_sum[...] += _dot(one, other, 0, 0)

    @pl.when(~is_real)
    def _() -> None:
        after[...] = before[...]

    @pl.when(is_real & (i == pl.num_programs(2) - 1))
    def _() -> None:
        dhead[...] = head_sum[...].astype(dhead.dtype)
        if has_bias:
            dbias[...] = bias_sum[...]


def _logits(
    hidden: Array,
    head: Array,
    bias: Array | None,
    rows: Mapping[str, Array],
    j: Array,
    *,
    softcap: float | None,
    vocab: int,
    vocab_dim: int,
) -> tuple[Array, Array, Array]:
    """Logits of a tile, the number of their column in it, and where a column is the row's target."""
    z = tiles.logits(_dot(hidden, head, 1, 1 - vocab_dim), bias, softcap, rows.get("scale"))
    column = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    return z, column, column == rows["target"].astype(jnp.int32) - j * z.shape[1]


def _dlogits(
    hidden: Array,
    head: Array,
    bias: Array | None,
    rows: Mapping[str, Array],
    j: Array,
    *,
    softcap: float | None,
    vocab: int,
    vocab_dim: int,
) -> Array:
    """Gradient of a tile's products; 0 in columns beyond the vocabulary."""
    z, column, at_target = _logits(
        hidden, head, bias, rows, j, softcap=softcap, vocab=vocab, vocab_dim=vocab_dim
    )
    coefficients = Coefficients(rows["lse"], rows["onehot"], rows["constant"], rows.get("slope"))
    dz = tiles.dlogits(z, at_target, coefficients, softcap, rows.get("scale"))
    if vocab % z.shape[1]:
        dz = jnp.where(column < vocab - j * z.shape[1], dz, 0)
    return dz


def _clear_beyond(head: Ref, j: Array, vocab: int, vocab_dim: int) -> None:
    """Zeros in the columns of the last tile that lie beyond the vocabulary, where memory may hold NaN."""
    width = head.shape[vocab_dim]
    rest = vocab % width
    if rest:

        @pl.when(j == vocab // width)
        def _() -> None:
            beyond = (slice(rest, width), slice(None))[:: 1 - 2 * vocab_dim]
            head[beyond] = jnp.zeros_like(head[beyond])


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """Contraction with float32 accumulation; float32 operands are multiplied as such, not in bfloat16."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _without_none(**columns: Array | None) -> dict[str, Array]:
    return {name: x for name, x in columns.items() if x is not None}


def _unpack(packed: Ref, names: Sequence[str]) -> dict[str, Array]:
    return {name: packed[:, k : k + 1] for k, name in enumerate(names)}


def _split_bias(refs: Sequence[Ref], has_bias: bool) -> tuple[Array | None, Sequence[Ref]]:
    return (refs[0][...], refs[1:]) if has_bias else (None, refs)


def _tensors(x: Operands, columns: Mapping[str, Array]) -> list[Array]:
    """The kernels' inputs. One array for all columns, as [N, 1] takes as much memory as [N, 128]."""
    packed = jnp.stack([column.astype(jnp.float32) for column in columns.values()], axis=1)
    return [x.hidden, x.head, packed] + ([] if x.bias is None else [x.bias.astype(jnp.float32)[None]])


def _rows_outside(core: Any, i: Any, j: Any, order: Ref) -> tuple[Any, Any]:
    """Row block and vocabulary tile of a step of grid (core, row block, vocabulary tile)."""
    return order[i, core], j


def _head_spec(tile: Tile, width: int, vocab_dim: int, place: Any) -> pl.BlockSpec:
    if vocab_dim == 0:
        return pl.BlockSpec((tile.columns, width), lambda *step: (place(*step)[1], 0))
    return pl.BlockSpec((width, tile.columns), lambda *step: (0, place(*step)[1]))


def _in_specs(x: Operands, tile: Tile, num_columns: int, vocab_dim: int, place: Any) -> list[pl.BlockSpec]:
    """Blocks of `_tensors`; `place` gives the row block and the vocabulary tile of a step."""

    def by_row(*step: Any) -> tuple[Any, int]:
        return place(*step)[0], 0

    d = x.hidden.shape[1]
    specs = [
        pl.BlockSpec((tile.rows, d), by_row),
        _head_spec(tile, d, vocab_dim, place),
        pl.BlockSpec((tile.rows, num_columns), by_row),
    ]
    if x.bias is not None:
        specs.append(pl.BlockSpec((1, tile.columns), lambda *step: (0, place(*step)[1])))
    return specs


def _plan(x: Operands) -> Plan:
    """Tiles are for bfloat16: float32 takes as much memory at half the width."""
    width, bytes_each = x.hidden.shape[1], jnp.dtype(x.hidden.dtype).itemsize
    return plan(width if bytes_each == 2 and x.hidden.dtype != jnp.float16 else 2 * width)


def _fit(tile: Tile, num_rows: int, vocab: int, multiple: int) -> Tile:
    """No larger than what there is, in `multiple` row blocks at least."""
    rows = min(tile.rows, _round_up(pl.cdiv(num_rows, multiple), SUBLANES))
    return Tile(rows, min(tile.columns, _round_up(vocab, LANES)))


def _pad(x: Operands, block: int, cores: int, least_blocks: int = 1) -> Operands:
    """Rows up to whole blocks for every core, and float16, which TPUs lack, as float32."""
    if x.hidden.dtype == jnp.float16:
        x = x._replace(hidden=x.hidden.astype(jnp.float32), head=x.head.astype(jnp.float32))
    rows = x.hidden.shape[0]
    more = max(_round_up(rows, block * cores), least_blocks * block) - rows
    if not more:
        return x
    return Operands(
        jnp.pad(x.hidden, ((0, more), (0, 0))),
        x.head,
        jnp.pad(x.targets, (0, more)),
        jnp.pad(x.active, (0, more)),
        None if x.scale is None else jnp.pad(x.scale, (0, more), constant_values=1),
        x.bias,
    )


def _visits(x: Operands, tile: Tile, cores: int, least: int = 1) -> tuple[Array, Array]:
    """Row blocks i32[blocks / cores, cores], those with an active row first, and how many a core visits."""
    is_active = jnp.any(x.active.reshape(-1, tile.rows), axis=1)
    order = jnp.argsort(~is_active, stable=True).astype(jnp.int32)
    count = (jnp.sum(is_active, dtype=jnp.int32) + cores - 1) // cores
    return order.reshape(-1, cores), jnp.maximum(count, least)


def _round_up(x: int, multiple: int) -> int:
    return pl.cdiv(x, multiple) * multiple


def _compiler_params(using: Plan) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=using.vmem_mib << 20
    )


def _cost(products: int, x: Operands, num_logits: int) -> pl.CostEstimate:
    d = x.hidden.shape[1]
    return pl.CostEstimate(
        flops=2 * products * num_logits * d,
        transcendentals=num_logits,
        bytes_accessed=products * (x.hidden.size + x.head.size) * x.head.dtype.itemsize,
    )
