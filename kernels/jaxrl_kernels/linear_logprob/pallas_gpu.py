"""GPU bodies (H100, H200): logits in Triton kernels, the products with their gradient in XLA's own.

The wanted rows are moved to the front first, whichever they are; no more of the others than fills a block is
computed.

Forward: grid (part of the vocabulary, row block). A program walks over the vocabulary tiles of its part with
the running sums in registers; the sums of the parts are merged afterwards. Row blocks alone would be 64
programs at N=8192, for 132 processors; and programs that run together share rows as well as columns of the
head, so that both are found in the L2 cache.

Backward: over chunks of the vocabulary. A kernel recomputes a chunk's logits and writes their gradient dz, in
hidden's dtype; two plain products add dz·head to the hidden gradient and give dzᵀ·hidden, the chunk's part of
the head gradient, at once. That is 4 products of 2·N·D·V operations for forward and backward. Within one
kernel there is no place to gather in: a block's hidden gradient, 128·D in float32, is more than a processor
holds. It would take atomics (N·D·V/256 additions, in an order that changes from run to run) or the logits
again for every few columns of D. And a product that stands alone gets XLA's choice, cuBLAS among others.

The XLA body on a GPU: its tiles of 512 × 2048 logits are work for 32 processors of 132, it branches for every
tile, and a branch waits for the host; its logits pass through memory in float32, where 8 bytes a logit take
as long as 0.2 (D=4096) to 0.8 (D=1024) of the product. Here one branch is taken, outside all loops.

Sizes and shares of time follow from an H100's 132 processors, 3.35 TB/s and some 700 TFLOP/s, by arithmetic.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxrl_kernels.chunks import cut, put, zeros
from jaxrl_kernels.linear_logprob import tiles
from jaxrl_kernels.linear_logprob.tiles import LOWEST, Coefficients, Operands, Sums
from jaxrl_kernels.manual import out_shape

Array = jax.Array
Ref = Any


class Tile(NamedTuple):
    """A step of a kernel: `rows` × `columns` logits, `depth` numbers of D at a time.

    `warps` of 32 threads share it, and the operands of `stages` depths are on their way at once.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


TILES = {2: Tile(128, 256, 64, 8, 3), 4: Tile(64, 64, 32, 4, 2)}
"""By the operands' bytes a number. 128 × 256 float32 sums are half the registers of a processor, and the
compiler spills none; float32 is multiplied as such, outside the matrix units."""

PROGRAMS, LEAST_PARTS = 1024, 8
"""Forward: about so many programs, 8 for each processor, and at least so many parts of the vocabulary."""

COLUMNS = 4096
"""Backward: of a chunk, at most. In bfloat16 dz takes 8 KiB a row. The hidden gradient in float32 is read and
written by each, which takes 836/COLUMNS of its product's time: 5% of the four products."""

ALIGNED = 64
"""Backward: a chunk's columns are a multiple of it, or all there are."""

SIZES = 4
"""Backward: products take the rows that are wanted, rounded up to a quarter of all. Each size is compiled."""


def forward(operands: Operands, *, softcap: float | None, interpret: bool = False) -> Sums:
    """Sums over the vocabulary for each row, f32[N] each; anything in rows that are not active.

    Args:
      operands: the arrays.
      softcap: c of c·tanh(z/c), or None.
      interpret: emulate the kernel, on any platform.
    """
    x, _, count = _wanted_first(operands)
    tile = _tile(x)
    num_rows, like = x.hidden.shape[0], jax.tree.leaves(x)
    blocks, num_tiles = num_rows // tile.rows, pl.cdiv(x.head.shape[0], tile.columns)
    share = pl.cdiv(num_tiles, max(LEAST_PARTS, PROGRAMS // blocks))
    parts = pl.cdiv(num_tiles, share)
    inputs, in_specs = _inputs(x, tile, {}, count=count)
    sums = pl.pallas_call(
        functools.partial(_forward_kernel, names=tuple(inputs), tile=tile, share=share, softcap=softcap),
        grid=(parts, blocks),
        in_specs=in_specs,
        out_specs=[pl.BlockSpec((None, tile.rows), lambda part, block: (part, block))] * len(Sums._fields),
        out_shape=[out_shape((parts, num_rows), jnp.float32, like)] * len(Sums._fields),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="linear_logprob_forward",
    )(*inputs.values())
    moved = tiles.rebase(Sums(*sums), jnp.max(sums[0], axis=0))
    merged = Sums(moved.peak, *(jnp.sum(value, axis=0) for value in moved[1:]))
    return jax.tree.map(lambda value: value[_place(operands)], merged)


def backward(
    operands: Operands,
    rows: Coefficients,
    *,
    softcap: float | None,
    head_gradient: bool,
    interpret: bool = False,
) -> tuple[Array, Array | None, Array | None]:
    """Gradients of hidden, head and bias in their dtypes; the last two None where not asked for.

    Args:
      operands, softcap, interpret: as `forward`.
      rows: as `tiles.coefficients`; 0 in rows that are not active.
      head_gradient: whether head and bias have a gradient.
    """
    x, order, count = _wanted_first(operands)
    rows = _take(rows, order)
    unit = _tile(x).rows
    blocks = x.hidden.shape[0] // unit
    sizes = sorted({unit * pl.cdiv(blocks * k, SIZES) for k in range(1, SIZES + 1)})
    of_size = [
        functools.partial(_backward, size, softcap=softcap, head_gradient=head_gradient, interpret=interpret)
        for size in sizes
    ]
    which = jnp.sum(count > jnp.array(sizes[:-1], jnp.int32), dtype=jnp.int32)
    dhidden, dhead, dbias = jax.lax.switch(which, of_size, x, rows, count)
    dhidden = jnp.where(operands.active[:, None], dhidden[_place(operands)], 0).astype(operands.hidden.dtype)
    if dhead is not None:
        dhead = dhead.astype(operands.head.dtype)
    if operands.bias is not None and dbias is not None:
        dbias = dbias.astype(operands.bias.dtype)
    return dhidden, dhead, dbias


def _backward(
    size: int,
    x: Operands,
    rows: Coefficients,
    count: Array,
    *,
    softcap: float | None,
    head_gradient: bool,
    interpret: bool,
) -> tuple[Array, Array | None, Array | None]:
    """`backward` of no more than the first `size` rows; the gradient of bias in float32."""
    tile, vocab, like = _tile(x), x.head.shape[0], (x, rows)
    hidden, targets, scale = jax.tree.map(lambda a: a[:size], (x.hidden, x.targets, x.scale))
    rows = jax.tree.map(lambda a: a[:size], rows)
    chunks = pl.cdiv(vocab, COLUMNS)
    width = min(pl.cdiv(vocab, chunks * ALIGNED) * ALIGNED, vocab)

    def add(i: Array, sums: Any) -> Any:
        dhidden, dhead, dbias = sums
        # chunks have one width, so the last may begin with columns of the one before: their dz is 0
        first = jnp.minimum(i * width, vocab - width)
        skip = i * width - first
        head = cut(x.head, first, width)
        bias = None if x.bias is None else cut(x.bias, first, width)
        chunk = Operands(hidden, head, targets - first, x.active, scale, bias)
        inputs, in_specs = _inputs(chunk, tile, rows._asdict(), count=count, skip=skip)
        dz = pl.pallas_call(
            functools.partial(_dlogits_kernel, names=tuple(inputs), tile=tile, softcap=softcap),
            grid=(pl.cdiv(width, tile.columns), size // tile.rows),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((tile.rows, tile.columns), lambda j, block: (block, j)),
            out_shape=out_shape((size, width), hidden.dtype, jax.tree.leaves(like)),
            compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
            interpret=interpret,
            name="linear_logprob_dlogits",
        )(*inputs.values())
        dhidden = dhidden + _dot(dz, head, 1, 0)
        if dhead is not None:
            dchunk = _dot(dz, hidden, 0, 0).astype(dhead.dtype)
            dhead = put(dhead, cut(dhead, first, width) + dchunk, first)
        if dbias is not None:
            dbias = put(dbias, cut(dbias, first, width) + jnp.sum(dz, axis=0, dtype=jnp.float32), first)
        return dhidden, dhead, dbias

    sums = (
        zeros(hidden.shape, like),
        zeros(x.head.shape, like, x.head.dtype) if head_gradient else None,
        zeros((vocab,), like) if head_gradient and x.bias is not None else None,
    )
    dhidden, dhead, dbias = jax.lax.fori_loop(0, chunks, add, sums)
    dhidden = jnp.pad(dhidden.astype(hidden.dtype), ((0, x.hidden.shape[0] - size), (0, 0)))
    return dhidden, dhead, dbias


def _forward_kernel(*refs: Ref, names: Sequence[str], tile: Tile, share: int, softcap: float | None) -> None:
    inputs, results = dict(zip(names, refs)), refs[len(names) :]
    vocab = inputs["head"].shape[0]
    first = pl.program_id(0) * share
    last = jnp.minimum(first + share, pl.cdiv(vocab, tile.columns))

    def add(j: Array, sums: Sums) -> Sums:
        z, at_target, is_real = _logits(inputs, j, tile, softcap)
        z = jnp.where(is_real, z, LOWEST)
        sums = tiles.rebase(sums, jnp.maximum(sums.peak, jnp.max(z, axis=1)))
        weight, moment = tiles.terms(z, sums.peak[:, None])
        return Sums(
            sums.peak,
            sums.total + jnp.sum(weight, axis=1),
            sums.moment + jnp.sum(moment, axis=1),
            sums.target + jnp.sum(jnp.where(at_target, z, 0), axis=1),
        )

    @pl.when(pl.program_id(1) * tile.rows < inputs["count"][0])
    def _() -> None:
        zero = jnp.zeros((tile.rows,), jnp.float32)
        sums = jax.lax.fori_loop(first, last, add, Sums(zero + LOWEST, zero, zero, zero))
        for result, value in zip(results, sums):
            result[...] = value


def _dlogits_kernel(*refs: Ref, names: Sequence[str], tile: Tile, softcap: float | None) -> None:
    inputs, result = dict(zip(names, refs)), refs[-1]
    j, start, count = pl.program_id(0), pl.program_id(1) * tile.rows, inputs["count"][0]
    column = _columns_of(j, tile)[None]

    def put(dz: Array) -> None:
        exists = jnp.broadcast_to(column < inputs["head"].shape[0], dz.shape)
        plgpu.store(result, dz.astype(result.dtype), mask=exists)

    @pl.when(start < count)
    def _() -> None:
        z, at_target, _ = _logits(inputs, j, tile, softcap)
        lse, onehot, constant = (_column(inputs[name]) for name in ("lse", "onehot", "constant"))
        rows = Coefficients(lse, onehot, constant, _column(inputs.get("slope")))
        dz = tiles.dlogits(z, at_target, rows, softcap, _column(inputs.get("scale")))
        row = start + jax.lax.iota(jnp.int32, tile.rows)[:, None]
        put(jnp.where((row < count) & (column >= inputs["skip"][0]), dz, 0))

    @pl.when(start >= count)
    def _() -> None:
        put(jnp.zeros((tile.rows, tile.columns), jnp.float32))


def _logits(
    inputs: dict[str, Ref], j: Array, tile: Tile, softcap: float | None
) -> tuple[Array, Array, Array]:
    """Logits of a tile, where one is its row's target, and which columns, [1, columns], there are."""
    hidden, head = inputs["hidden"], inputs["head"]
    vocab, d = head.shape
    columns = pl.ds(j * tile.columns, tile.columns)
    column = _columns_of(j, tile)
    exists = column < vocab

    def add(k: Array, product: Array) -> Array:
        span = pl.ds(k * tile.depth, tile.depth)
        inside = k * tile.depth + jax.lax.iota(jnp.int32, tile.depth) < d if d % tile.depth else None
        a = _load(hidden.at[:, span], None, inside)
        b = _load(head.at[columns, span], exists if vocab % tile.columns else None, inside)
        return product + _dot(a, b, 1, 1)

    product = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    product = jax.lax.fori_loop(0, pl.cdiv(d, tile.depth), add, product)
    bias = plgpu.load(inputs["bias"].at[columns], mask=exists, other=0)[None] if "bias" in inputs else None
    z = tiles.logits(product, bias, softcap, _column(inputs.get("scale")))
    return z, column[None] == inputs["target"][...][:, None], exists[None]


def _load(ref: Ref, rows: Array | None, columns: Array | None) -> Array:
    """A matrix, with 0 outside of its rows and columns that exist; None = all do."""
    if rows is None and columns is None:
        return plgpu.load(ref)
    mask = jnp.ones(ref.shape, bool)
    if rows is not None:
        mask &= rows[:, None]
    if columns is not None:
        mask &= columns[None]
    return plgpu.load(ref, mask=mask, other=0)


def _columns_of(j: Array, tile: Tile) -> Array:
    return j * tile.columns + jax.lax.iota(jnp.int32, tile.columns)


def _column(ref: Ref) -> Any:
    """What belongs to rows, as [rows, 1]; None of None."""
    return None if ref is None else ref[...][:, None]


def _inputs(
    x: Operands, tile: Tile, rows: Mapping[str, Array | None], **scalars: Array
) -> tuple[dict[str, Array], list[pl.BlockSpec]]:
    """What a kernel of grid (columns, row block) reads, by name: its block of rows, the rest whole."""
    bias = None if x.bias is None else x.bias.astype(jnp.float32)
    by_row = {"hidden": x.hidden, "target": x.targets, "scale": x.scale, **rows}
    whole = {"head": x.head, "bias": bias, **{name: value[None] for name, value in scalars.items()}}
    arrays = {name: array for name, array in {**by_row, **whole}.items() if array is not None}

    def spec(name: str, array: Array) -> pl.BlockSpec:
        if name in whole:
            return pl.BlockSpec()
        return pl.BlockSpec((tile.rows, *array.shape[1:]), lambda _, block: (block, *[0] * (array.ndim - 1)))

    return arrays, [spec(name, array) for name, array in arrays.items()]


def _wanted_first(x: Operands) -> tuple[Operands, Array, Array]:
    """Active rows, then zeros up to whole blocks; which row each is; how many are active.

    float16 becomes float32, for the gradients of the logits lie below its range.
    """
    if x.hidden.dtype == jnp.float16:
        x = x._replace(hidden=x.hidden.astype(jnp.float32), head=x.head.astype(jnp.float32))
    num_rows, unit = x.active.shape[0], _tile(x).rows
    order = jnp.nonzero(x.active, size=pl.cdiv(num_rows, unit) * unit, fill_value=num_rows)[0]
    hidden, targets, active, scale = _take((x.hidden, x.targets, x.active, x.scale), order)
    moved = Operands(hidden, x.head, targets, active, scale, x.bias)
    return moved, order, jnp.sum(x.active, dtype=jnp.int32)


def _take(rows: Any, order: Array) -> Any:
    """Those rows of each array, and zeros for a number that is no row's."""
    return jax.tree.map(lambda a: jnp.take(a, order, axis=0, mode="fill", fill_value=0), rows)


def _place(x: Operands) -> Array:
    """Where `_wanted_first` puts an active row; anywhere for the others."""
    return jnp.maximum(jnp.cumsum(x.active) - 1, 0)


def _tile(x: Operands) -> Tile:
    return TILES[x.hidden.dtype.itemsize]


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """Contraction with float32 accumulation; float32 operands are multiplied as such, not as TF32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
