"""A replay buffer as a pytree: rollouts with their age and how often they were used (CBS, 2602.08499).

Every shape is static: a buffer has N places, masks say which are taken, and all functions work under jit.

    buffer = empty(example, capacity=1024)             # example: one item, a pytree without a leading axis
    buffer = add(buffer, items, step)
    rows, is_real, buffer = select(buffer, scores, 64) # scores f32[N], of a bandit for one
    batch = items_at(buffer, rows)

What a step is, the caller decides; an update of the policy, usually. The buffer is part of the checkpoint.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

EVICT = ("oldest", "most_used")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Buffer:
    """N places for items.

    Attributes:
      items: pytree with leading axis N; what lies in a free place means nothing.
      taken: bool[N].
      born: i32[N] step at which the item came in.
      uses: i32[N] how often it was selected.
    """

    items: Any
    taken: Array
    born: Array
    uses: Array


def empty(example: Any, capacity: int) -> Buffer:
    """A buffer of `capacity` free places for items like `example`, a pytree of one item's arrays.

    Raises:
      ValueError: a capacity below 1.
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity} must be at least 1")
    items = jax.tree.map(lambda x: jnp.zeros((capacity, *jnp.shape(x)), jnp.asarray(x).dtype), example)
    zeros = jnp.zeros(capacity, jnp.int32)
    return Buffer(items, jnp.zeros(capacity, bool), zeros, zeros + 0)


def ages(buffer: Buffer, step: Array | int) -> Array:
    """i32[N] steps since each item came in; 0 for free places."""
    return jnp.where(buffer.taken, step - buffer.born, 0)


def add(
    buffer: Buffer, items: Any, step: Array | int, *, valid: Array | None = None, evict: str = "oldest"
) -> Buffer:
    """The buffer with new items: first in free places, then in those of the items that are evicted.

    oldest:     the longest in the buffer go first, the most used of those
    most_used:  the most often selected go first, the oldest of those

    and at last the one in the lower place. No new item evicts another.

    Args:
      items: pytree with leading axis K, at most N.
      step: now.
      valid: bool[K] items to add; None = all.
      evict: one of `EVICT`.

    Raises:
      ValueError: more items than places, items unlike the buffer's, or an unknown `evict`.
    """
    if evict not in EVICT:
        raise ValueError(f"unknown evict={evict!r}; one of {', '.join(EVICT)}")
    count, capacity = jax.tree.leaves(items)[0].shape[0], len(buffer.taken)
    _check_alike(buffer, items, count)
    if count > capacity:
        raise ValueError(f"{count} items do not fit into a buffer of {capacity}: raise the capacity")
    valid = jnp.ones(count, bool) if valid is None else valid
    born, uses = (jnp.where(buffer.taken, x, 0) for x in (buffer.born, -buffer.uses))
    keys = (uses, born) if evict == "oldest" else (born, uses)
    order = jnp.lexsort((*keys, buffer.taken))  # the last key counts most
    places = jnp.where(valid, order[jnp.cumsum(valid) - 1], capacity)  # beyond the end: dropped

    def put(old: Array, new: Array) -> Array:
        return old.at[places].set(new, mode="drop")

    return Buffer(
        items=jax.tree.map(put, buffer.items, items),
        taken=put(buffer.taken, jnp.ones(count, bool)),
        born=put(buffer.born, jnp.full(count, step, jnp.int32)),
        uses=put(buffer.uses, jnp.zeros(count, jnp.int32)),
    )


def _check_alike(buffer: Buffer, items: Any, count: int) -> None:
    """Raises a ValueError if the items have another structure, shape or dtype than the buffer's."""
    expected = jax.tree.map(lambda x: ((count, *x.shape[1:]), x.dtype), buffer.items)
    got = jax.tree.map(lambda x: (tuple(x.shape), x.dtype), items)
    if got != expected:
        raise ValueError(f"items {got} are unlike those of the buffer, {expected}")


def expire(
    buffer: Buffer, step: Array | int, *, max_age: int | None = None, max_uses: int | None = None
) -> Buffer:
    """The buffer without items older than `max_age` steps, and without those used `max_uses` times."""
    keep = buffer.taken
    if max_age is not None:
        keep &= ages(buffer, step) <= max_age
    if max_uses is not None:
        keep &= buffer.uses < max_uses
    return dataclasses.replace(buffer, taken=keep)


def select(buffer: Buffer, scores: Array, count: int) -> tuple[Array, Array, Buffer]:
    """The `count` items of highest score, each of which has then been used once more.

    Args:
      scores: f32[N]; NaN and −inf are never selected, equal scores in the order of places. Of
        `random_scores` for a sample.
      count: M, at most N.

    Returns:
      i32[M] places, best first; bool[M] False where there were fewer items (their place means nothing); and
      the buffer.

    Raises:
      ValueError: scores of another shape, or a count that is not from 1 to N.
    """
    capacity = len(buffer.taken)
    if jnp.shape(scores) != (capacity,):
        raise ValueError(f"scores {jnp.shape(scores)} are not one for each of {capacity} places")
    if not 1 <= count <= capacity:
        raise ValueError(f"count={count} is not from 1 to the capacity {capacity}")
    ranked = jnp.where(buffer.taken & ~jnp.isnan(scores), scores, -jnp.inf)
    best, places = jax.lax.top_k(ranked, count)
    is_real = best > -jnp.inf
    uses = buffer.uses.at[places].add(is_real.astype(jnp.int32))
    return places, is_real, dataclasses.replace(buffer, uses=uses)


def random_scores(key: Array, logits: Array) -> Array:
    """f32[N] whose highest M are a sample without replacement with odds exp(logits) (Gumbel top-k).

    Args:
      logits: f32[N] scores over a temperature; zeros for a uniform sample; −inf for never.
    """
    return logits + jax.random.gumbel(key, logits.shape, jnp.float32)


def items_at(buffer: Buffer, places: Array) -> Any:
    """The items in places i32[M], with leading axis M."""
    return jax.tree.map(lambda x: x[places], buffer.items)
