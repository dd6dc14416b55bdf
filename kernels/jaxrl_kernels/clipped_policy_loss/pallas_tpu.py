"""The token pass on a TPU: every log-prob is read once, sums of rows are kept on the chip."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrl_kernels.clipped_policy_loss.rules import Operands, Rule, TokenTerms, token_terms
from jaxrl_kernels.manual import out_shape, vary, varying_axes

Array = jax.Array

LANES = 128
BLOCK_ROWS = 64  # a multiple of 32, the height of an int8 tile
BLOCK_TOKENS = 1024
"""256 KiB per float32 operand: four of them, the mask and the slope, twice each, are 3 of 16 MiB.

On a v5e a block of the loss with a KL takes 2,222 bundles of instructions, as libtpu's static schedule counts
them; to read and write it takes 2,040 cycles at 819 GB/s.
"""


def expm1(x: Array) -> Array:
    """e^x − 1, which Mosaic lacks: by its series where e^x would round away x, |x| < ½."""
    near = jnp.where(jnp.abs(x) < 0.5, x, 0)
    series = jnp.ones_like(x)
    for k in range(9, 1, -1):  # 1 + x/2·(1 + x/3·(… (1 + x/9))); the next term is below 1e-9
        series = 1 + near / k * series
    return jnp.where(jnp.abs(x) < 0.5, near * series, jnp.exp(x) - 1)


def _body(operands: Any, sums: Any, slope: Any, *, rule: Rule, width: int) -> None:
    """Blocks of the operands [BR, BT] (advantages perhaps [BR, 1]), row sums [BR, LANES], slope or None."""

    # first of all: whatever is alive across a branch has to leave the registers
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        sums[...] = jnp.zeros(sums.shape, sums.dtype)

    values = jax.tree.map(lambda ref: ref[...], operands)
    floats = jax.tree.map(lambda x: x.astype(jnp.float32), values._replace(mask=None))
    shape = values.mask.shape
    column = pl.program_id(1) * shape[1] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    # beyond the last token stands anything
    mask = (values.mask.astype(jnp.int32) != 0) & (column < width)
    terms, token_slope = token_terms(rule, floats._replace(mask=mask), expm1=expm1)
    if slope is not None:
        slope[...] = token_slope

    lane = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 1)
    total = jnp.zeros(sums.shape, sums.dtype)
    for k, term in enumerate(terms):  # the k-th sum is the k-th lane
        total += jnp.where(lane == k, jnp.sum(term, axis=1, keepdims=True), 0)
    sums[...] += total


def token_pass(rule: Rule, with_slope: bool, operands: Operands) -> tuple[TokenTerms, Array | None]:
    """As `xla.token_pass`, computed in float32."""
    rows, width = operands.mask.shape
    dtype = jnp.promote_types(operands.logp.dtype, jnp.float32)

    def readable(x: Array) -> Array:  # Mosaic knows int8, bfloat16 and float32
        if x.dtype == bool:
            return x.astype(jnp.int8)
        return x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)

    axes = tuple(varying_axes(*jax.tree.leaves(operands)))
    operands = jax.tree.map(lambda x: vary(readable(x), axes), operands)
    block_rows, block_tokens = min(BLOCK_ROWS, rows), min(BLOCK_TOKENS, width)
    token = pl.BlockSpec((block_rows, block_tokens), lambda i, j: (i, j))
    per_row = pl.BlockSpec((block_rows, 1), lambda i, j: (i, 0))
    like = jax.tree.leaves(operands)
    sums, slope = pl.pallas_call(
        partial(_body, rule=rule, width=width),
        grid=(pl.cdiv(rows, block_rows), pl.cdiv(width, block_tokens)),
        in_specs=[jax.tree.map(lambda x: token if x.shape[1] == width else per_row, operands)],
        out_specs=(
            pl.BlockSpec((block_rows, LANES), lambda i, j: (i, 0)),
            token if with_slope else None,
        ),
        out_shape=(
            out_shape((rows, LANES), jnp.float32, like),
            out_shape((rows, width), jnp.float32, like) if with_slope else None,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="clipped_policy_loss",
    )(operands)
    terms = TokenTerms(*(sums[:, k].astype(dtype) for k in range(len(TokenTerms._fields))))
    return terms, None if slope is None else slope.astype(dtype)
