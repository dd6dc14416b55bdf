"""Block caches (Fast-dLLM, 2505.22618): the whole row is run where a block begins, and then a window of it.

    prompt of 2, three blocks of 2, decoding the second; = computed anew, . = keys and values as cached

    cache='none'      = = = = = = = =
    cache='prefix'    . . . . = = = =
    cache='dual'      . . . . = = . .

Rows go their own way, so in one round some may begin a block while others go on: both passes are made then,
and each row takes its own.

With classifier-free guidance the negative inputs are B further rows, which have caches of their own: what
they hide, the prompt, is the same throughout.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.sampling.diffusion_options import Method
from jaxrl_llm.sampling.diffusion_state import Denoiser, Inputs, State

Array = jax.Array


def blank_cache(inputs: Inputs, canvas: Array, denoiser: Denoiser) -> Any:
    """Of rows i32[R, L] none of which has begun."""
    _, cache = jax.eval_shape(lambda: _whole(inputs, canvas, jnp.zeros_like(canvas[:, :1]), denoiser))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)


def cached_states(
    inputs: Inputs,
    state: State,
    canvas: Array,
    first: Array,
    where: Array,
    denoiser: Denoiser,
    method: Method,
) -> tuple[Array, Any]:
    """States that predict the block.

    Args:
      canvas: i32[R, L], R = B, or 2B with the negative inputs behind.  first: i32[B, 1] the block's first
        position.  where: i32[B, W] its positions.

    Returns:
      f[R, W, D], and the cache of each row, new where its block begins.
    """
    done, step, first, where, lengths = (
        _repeat(x, len(canvas)) for x in (state.done, state.step, first, where, inputs.lengths)
    )
    begins, goes_on = ~done & (step == 0), ~done & (step > 0)
    size, length = method.max_new_tokens, canvas.shape[1]
    shape, _ = jax.eval_shape(lambda: _whole(inputs, canvas, where, denoiser))
    nothing = jnp.zeros(shape.shape, shape.dtype)

    def whole(cache: Any) -> tuple[Array, Any]:
        hidden, new = _whole(inputs, canvas, where, denoiser)
        return hidden, jax.tree.map(partial(_by_row, begins), new, cache)

    hidden, cache = jax.lax.cond(jnp.any(begins), whole, lambda cache: (nothing, cache), state.cache)

    def part(width: int) -> Array:
        assert denoiser.window is not None
        start = lengths + first[:, 0]
        columns = jnp.minimum(start[:, None] + jnp.arange(width), length - 1)
        tokens = jnp.take_along_axis(canvas, columns, axis=1)
        return denoiser.window(inputs.params, tokens, start, lengths + size, where - first, cache)[0]

    widths = [method.block]
    while method.cache == "prefix" and widths[-1] < size:
        widths.append(min(2 * widths[-1], size))
    left = jnp.max(jnp.where(goes_on, size - first[:, 0], 0))
    narrowest = jnp.minimum(jnp.searchsorted(jnp.array(widths), left), len(widths) - 1)
    branch = jnp.where(jnp.any(goes_on), 1 + narrowest, 0)
    rest = jax.lax.switch(branch, [lambda: nothing, *(partial(part, width) for width in widths)])
    return _by_row(begins, hidden, rest), cache


def _whole(inputs: Inputs, canvas: Array, where: Array, denoiser: Denoiser) -> tuple[Array, Any]:
    """States that predict the response at positions i32[R, W], and the cache, of a pass over whole rows."""
    assert denoiser.window is not None
    size, lengths = canvas.shape[1] - inputs.prompts.shape[1], _repeat(inputs.lengths, len(canvas))
    start = jnp.zeros_like(lengths)
    return denoiser.window(inputs.params, canvas, start, lengths + size, lengths[:, None] + where, None)


def _repeat(x: Array, rows: int) -> Array:
    """[B, ...] again for the negative inputs, where there are `rows` = 2B."""
    return jnp.tile(x, (rows // len(x), *(1,) * (x.ndim - 1)))


def _by_row(choice: Array, yes: Array, no: Array) -> Array:
    """`yes` in the rows of choice bool[B], `no` in the others."""
    return jnp.where(choice.reshape(-1, *(1,) * (yes.ndim - 1)), yes, no)
