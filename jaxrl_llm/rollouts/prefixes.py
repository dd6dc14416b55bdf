"""The states that a trajectory of several turns went through, as contexts to go on from (PRAISE, 2604.03675).

A row that asks T times and then answers has T + 1 prefix states: what the policy had before it when it began
to write for the first, second, … last time. One that was cut off after a tool's answer has its whole row as
the last state.

    prompt  call 1  result 1  call 2  result 2  answer      T = 2
    ──────┤                                                 s_0
    ────────────────────────┤                               s_1
    ──────────────────────────────────────────┤             s_2

Contexts are token ids of the row itself; what asks for an answer is put behind them as ids.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.trajectory import Trajectories

Array = jax.Array


class PrefixState(NamedTuple):
    """A context to write an answer after.

    Attributes:
      row: of the trajectories it comes from.
      turn: t, turns behind it.
      tokens: ids.
    """

    row: int
    turn: int
    tokens: list[int]


def prefix_lengths(t: Trajectories, most: int) -> tuple[Array, Array]:
    """How many tokens of each row its prefix states have.

    The policy begins to write where an action token follows another kind of token, or one of another turn.

    Args:
      t: N rows.  most: S, a static shape: the states of a row beyond that many are left out.

    Returns:
      i32[N, S] tokens of s_0, s_1, …, 0 where a row has no more; i32[N] how many states each row has, at most
      S: one more than its turns T.
    """
    column = jnp.arange(t.tokens.shape[1])
    real = column < t.lengths[:, None]
    action = t.action_mask & real
    follows = jnp.pad(action[:, :-1], ((0, 0), (1, 0)))
    if t.turn is not None:
        follows &= t.turn == jnp.roll(t.turn, 1, axis=1)
    last = t.lengths[:, None] - 1
    ends_with_action = jnp.take_along_axis(action, jnp.maximum(last, 0), axis=1)
    width = t.tokens.shape[1] + 1  # a state may be the whole row
    begins = jnp.pad(action & ~follows, ((0, 0), (0, 1)))
    begins |= (jnp.arange(width) == t.lengths[:, None]) & ~ends_with_action & (t.lengths[:, None] > 0)
    ends = jnp.sort(jnp.where(begins, jnp.arange(width), width), axis=1)[:, :most]
    ends = jnp.pad(ends, ((0, 0), (0, most - ends.shape[1])), constant_values=width)
    count = jnp.minimum(jnp.sum(begins, axis=1, dtype=jnp.int32), most)
    return jnp.where(ends < width, ends, 0).astype(jnp.int32), count


def choose(key: Array, uids: Array, count: Array, most: int, k: int | None) -> Array:
    """bool[N, S] which states to use: all that a row has, or k of them at random, without replacement.

    Args:
      key, uids: i32[N]; a row's choice depends on the key, its uid and its number of states alone.
      count: i32[N] states of each row.  most: S.
      k: None = all.

    Raises:
      ValueError: a negative k.
    """
    if k is not None and k < 0:
        raise ValueError(f"k={k} must not be negative; None uses all states")
    there = jnp.arange(most) < count[:, None]
    if k is None:
        return there

    def ranks(uid: Array) -> Array:  # of one draw per state, each its own: S is no part of them
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, uid), i))(jnp.arange(most))
        return jax.vmap(jax.random.uniform)(keys)

    drawn = jnp.where(there, jax.vmap(ranks)(uids), jnp.inf)
    return there & (jnp.argsort(jnp.argsort(drawn, axis=1), axis=1) < k)


def contexts(
    t: Trajectories,
    ends: Array,
    chosen: Array,
    *,
    suffix: Sequence[int] = (),
    prompts: Sequence[Sequence[int]] | None = None,
) -> list[PrefixState]:
    """The chosen states as contexts, row by row, on the host.

    Args:
      t: N rows.  ends: i32[N, S] of `prefix_lengths`.  chosen: bool[N, S] of `choose`.
      suffix: ids behind every context, which ask for an answer.
      prompts: N lists of ids in place of the rows' own prompts, for a model that is asked to answer from
        the beginning; None = the rows' own.

    Raises:
      ValueError: prompts of another number, or a chosen context without a token.
    """
    tokens, lengths, use = (np.asarray(jax.device_get(x)) for x in (t.tokens, ends, chosen))
    if prompts is not None and len(prompts) != len(tokens):
        raise ValueError(f"{len(prompts)} prompts for {len(tokens)} rows: one for each")
    out = []
    for row, turn in zip(*np.nonzero(use)):
        first, end = lengths[row, 0], lengths[row, turn]
        prompt = tokens[row, :first].tolist() if prompts is None else list(prompts[row])
        ids = [*prompt, *tokens[row, first:end].tolist(), *suffix]
        if not ids:
            raise ValueError(f"state {turn} of row {row} has no tokens: give it a prompt or a suffix")
        out.append(PrefixState(int(row), int(turn), ids))
    return out
