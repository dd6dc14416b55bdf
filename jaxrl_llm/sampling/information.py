"""Which committed tokens are informative, and when they have converged: FoCore and FoCore_A (2605.01373).

Only the abstract of the paper was at hand. It says that tokens of high information density converge earlier
than those around them, that masking them in a negative input improves the answer, and that once they have
converged, stable candidates near them can be committed in parallel. How to find them is our reconstruction:

| detector | score of a committed token j                                                        |
|----------|-------------------------------------------------------------------------------------|
| early    | mean commit step of the tokens within a radius (masked ones: t + 1) minus its own     |
| resolve  | the largest change of its distribution from one step to the next before it committed  |
| settle   | minus the change of its distribution in the last step                                 |
| pmi      | ln p(x_j | x) when it committed, minus ln p(x_j | prompt, everything masked)          |
| lexical  | the same for all tokens of a given set; no others are informative                     |

A change is the Jensen-Shannon divergence (nats) between the previous step's K most likely tokens with the
rest in one bucket, and the same buckets now. `influence` is what these stand for; it costs a forward pass for
every token.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_kernels.denoising_step import Look, denoising_step

Array = jax.Array


class Memory(NamedTuple):
    """What is remembered of the predictions at each of G positions since they were last looked at.

    Attributes:
      ids: i32[B, G, K] most likely tokens, in order.  probs: f32[B, G, K] theirs.
      change: f32[B, G] at the last look (nats), ln 2 = the most there is while there is none to compare.
      peak: f32[B, G] the largest change while the position was masked.
      stable: i32[B, G] looks in a row with the same most likely token; 0 = never looked at.
    """

    ids: Array
    probs: Array
    change: Array
    peak: Array
    stable: Array


def blank_memory(batch: int, size: int, tracked: int) -> Memory:
    """Of positions that were never looked at."""
    flat = (batch, size)
    return Memory(
        jnp.zeros((*flat, tracked), jnp.int32),
        jnp.zeros((*flat, tracked)),
        jnp.full(flat, math.log(2)),
        jnp.zeros(flat),
        jnp.zeros(flat, jnp.int32),
    )


def look(memory: Memory, logits: Array, masked: Array, banned: Array) -> Memory:
    """Compares what is predicted now with what was, and remembers it.

    Args:
      memory, logits f32[B, W, V], masked bool[B, W]: of the same positions.
      banned: i32[B, n] ids that are not predicted, -1 = none.
    """
    seen = memory.stable > 0
    last = Look(memory.ids, memory.probs, seen)
    now = denoising_step(logits, banned=banned[:, None], last=last)
    same = seen & (now.ids[..., 0] == memory.ids[..., 0])
    return Memory(
        now.ids,
        now.probs,
        now.change,
        jnp.where(masked & seen, jnp.maximum(memory.peak, now.change), memory.peak),
        jnp.where(same, memory.stable + 1, 1),
    )


def earliness(commit_step: Array, step: Array, radius: Array) -> Array:
    """Score of 'early'.

    Args:
      commit_step: i32[B, G], -1 where masked.  step: i32[B] t.  radius: i32[B].

    Returns:
      f32[B, G]; meaningless where masked.
    """
    size = commit_step.shape[1]
    distance = jnp.abs(jnp.arange(size)[:, None] - jnp.arange(size))
    near = ((distance > 0) & (distance <= radius[:, None, None])).astype(jnp.float32)
    when = jnp.where(commit_step < 0, step[:, None] + 1, commit_step).astype(jnp.float32)
    total = jnp.einsum("bij,bj->bi", near, when, precision=jax.lax.Precision.HIGHEST)
    return total / jnp.maximum(jnp.sum(near, axis=2), 1) - when


def near_committed(committed: Array, masked: Array, window: Array) -> Array:
    """bool[B, G]: within `window` i32[B] of one of `committed`, or of the first of `masked`, bool[B, G]."""
    size = committed.shape[1]
    centre = committed | (masked & (jnp.cumsum(masked, axis=1) == 1))
    index = jnp.arange(size)
    far = 2**30
    left = index - jax.lax.cummax(jnp.where(centre, index, -far), axis=1)
    right = jax.lax.cummin(jnp.where(centre, index, far), axis=1, reverse=True) - index
    return jnp.minimum(left, right) <= window[:, None]


def influence(logits_of: Callable[[Array], Array], response: Array, mask_id: int) -> Array:
    """How much each committed token changes what is predicted at masked positions: for analysis.

    The mean over masked i of KL(p(· | x)_i || p(· | x without token j)_i), in nats.

    Args:
      logits_of: response i32[B, G] -> logits f32[B, G, V]; called G + 1 times.
      response: i32[B, G] with `mask_id` where masked.

    Returns:
      f32[B, G], 0 at masked positions.
    """
    masked = response == mask_id
    full = jax.nn.log_softmax(logits_of(response), axis=-1)

    def without(j: Array) -> Array:
        logp = jax.nn.log_softmax(logits_of(response.at[:, j].set(mask_id)), axis=-1)
        kl = jnp.sum(jnp.exp(full) * (full - logp), axis=-1)
        return jnp.sum(jnp.where(masked, kl, 0), axis=1) / jnp.maximum(jnp.sum(masked, axis=1), 1)

    scores = jax.lax.map(without, jnp.arange(response.shape[1])).T
    return jnp.where(masked, 0, scores)
