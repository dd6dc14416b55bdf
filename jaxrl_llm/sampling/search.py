"""Decoders that look for likely sequences: best of n, beam search, and TSearch (2602.08354).

All beams of all prompts are rows of one batch, and every row writes to the same column of the cache: prompts
stand right-aligned before the columns of new tokens, so a beam that takes over another one's past is a
gather of rows. Shapes are static throughout; what is missing has the score −inf.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.params import Tree
from jaxrl_llm.sampling import slots as device
from jaxrl_llm.sampling.autoregressive import next_logits
from jaxrl_llm.sampling.found import (
    Found,
    append,
    best,
    concatenate,
    fill_up,
    first_beam,
    gather,
    nothing,
    tidy,
)
from jaxrl_llm.sampling.logits import sampling_params
from jaxrl_llm.sampling.slots import Slots
from jaxrl_llm.trajectory import Trajectories

Array = jax.Array

ADMIT = ("kept", "expanded")


# --- best of n


def sequence_scores(trajectories: Trajectories, *, by: str = "mean") -> Array:
    """f32[N] raw log-prob (nats) of what the policy wrote in each row: the sum, or the mean over its tokens.

    −inf where it wrote nothing, which would else be the surest of all.

    Raises:
      ValueError: `by` is neither 'sum' nor 'mean'.
    """
    if by not in ("sum", "mean"):
        raise ValueError(f"unknown score {by!r}; one of sum, mean (or scores of your own to best_of_n)")
    t = trajectories
    total = jnp.sum(jnp.where(t.action_mask, t.raw_logp, 0), axis=1)
    count = t.completion_lengths
    return jnp.where(count == 0, -jnp.inf, total if by == "sum" else total / jnp.maximum(count, 1))


def best_of_n(scores: Array, group_size: int, *, count: int = 1) -> Array:
    """The rows with the highest scores of each group, for `Trajectories.take`.

    Example:
      >>> best_of_n(jnp.array([0.5, 0.75, 0.25, 0.5, 0.5, jnp.nan]), 3, count=2).tolist()
      [1, 0, 3, 4]

    Args:
      scores: f32[M·G], groups of G consecutive rows; NaN ranks last, equal scores in the order of rows.
      group_size: G.
      count: rows to keep of each group, at most G.

    Returns:
      i32[M·count] rows, best first within their group.

    Raises:
      ValueError: scores that are not whole groups, or a count that is not from 1 to G.
    """
    if scores.ndim != 1 or group_size < 1 or scores.shape[0] % group_size:
        raise ValueError(f"scores {scores.shape} are not groups of {group_size} rows")
    if not 1 <= count <= group_size:
        raise ValueError(f"count={count} is not from 1 to the group's size {group_size}")
    ranked = jnp.where(jnp.isnan(scores), -jnp.inf, scores).reshape(-1, group_size)
    rows = jax.lax.top_k(ranked, count)[1] + group_size * jnp.arange(ranked.shape[0])[:, None]
    return rows.reshape(-1).astype(jnp.int32)


# --- beams


def beam_search(
    prepared: Tree,
    cfg: ModelConfig,
    tokens: Array,
    lengths: Array,
    *,
    beams: int,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    num_return: int = 1,
    length_penalty: float = 0.0,
) -> Found:
    """The sequences of highest score among those that a beam of `beams` unfinished ones leads to.

      score(y) = Σ_t log π(y_t | y_<t, x) / |y|^length_penalty

    At every step all one-token continuations of the beams are ranked. A stop token among the best `beams` of
    them finishes a sequence, which is set aside; the best `beams` others go on. The search ends when nothing
    that could still come would be among the `num_return` best, or at the limit, where what is unfinished
    competes as it is. One beam without a penalty is greedy decoding; as many beams as there are sequences
    find the best of all.

    Args:
      prepared: from `autoregressive.prepare`.
      tokens: i32[M, P] right-padded prompts.  lengths: i32[M], at least 1.
      beams: unfinished sequences kept per prompt.
      max_new_tokens: C.
      stop_ids: tokens that end a sequence and belong to it.
      num_return: n, sequences returned per prompt.
      length_penalty: 0 ranks by the sum of log-probs, 1 by their mean; more favours long sequences.

    Returns:
      `Found` [M, n].

    Raises:
      ValueError: an empty prompt, a count below 1, or a stop token outside the vocabulary.
    """
    check_search(cfg, lengths, stop_ids, beams=beams, max_new_tokens=max_new_tokens, num_return=num_return)
    return _search(
        prepared,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        jnp.asarray([*stop_ids, -1], jnp.int32),
        jnp.float32(length_penalty),
        None,
        cfg,
        shape=SearchShape(beams, max_new_tokens, num_return, len(stop_ids), "kept", None),
    )


def tsearch(
    prepared: Tree,
    cfg: ModelConfig,
    tokens: Array,
    lengths: Array,
    *,
    beams: int,
    num_return: int,
    max_new_tokens: int,
    end_id: int,
    admit: str = "kept",
) -> Found:
    """TSearch(m, Φ): a beam search for short chains of thought, which stops as soon as enough have ended.

      Φ(y) = (1/|y|) Σ_t log π(y_t | y_<t, x)

    Each of the m beams is expanded by its 2m most likely tokens. An expansion by the end-of-thinking token
    is a complete chain; of the others the best m by Φ go on. It is over when `num_return` chains are
    complete. If too few are at the limit, the best beams are closed by force and fill up.

    The first to end win: longer chains are never tried, however well they might score. That is what makes it
    differ from `beam_search` with `length_penalty=1`.

    Args:
      prepared, tokens, lengths: as `beam_search`.
      beams: m.  num_return: r, chains returned per prompt.
      max_new_tokens: most tokens of a chain, the end token included.
      end_id: the end-of-thinking token.
      admit: which expansions by the end token complete a chain: 'kept', those among the best m of all
        expansions (a beam that ends), or 'expanded', all of them, as in SAGE. The paper's text allows both.

    Returns:
      `Found` [M, r], by Φ. Every chain has one end token, its last; `finished` is False where it was forced.

    Raises:
      ValueError: as `beam_search`, or an unknown `admit`.
    """
    check_search(cfg, lengths, [end_id], beams=beams, max_new_tokens=max_new_tokens, num_return=num_return)
    if admit not in ADMIT:
        raise ValueError(f"unknown admit={admit!r}; one of {', '.join(ADMIT)}")
    return _search(
        prepared,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        jnp.asarray([end_id], jnp.int32),
        jnp.float32(1),
        jnp.int32(end_id),
        cfg,
        shape=SearchShape(beams, max_new_tokens, num_return, 1, admit, num_return),
    )


class SearchShape(NamedTuple):
    """What a search is compiled for.

    Attributes:
      beams, max_new_tokens, num_return: as `beam_search`.
      stops: number of stop tokens.
      admit: as `tsearch`.
      enough: end with so many finished sequences; None = when no other can be better.
    """

    beams: int
    max_new_tokens: int
    num_return: int
    stops: int
    admit: str
    enough: int | None


@partial(jax.jit, static_argnames=("cfg", "shape"))
def _search(
    prepared: Tree,
    tokens: Array,
    lengths: Array,
    stop_ids: Array,
    penalty: Array,
    close: Array | None,
    cfg: ModelConfig,
    *,
    shape: SearchShape,
) -> Found:
    """`beam_search` and `tsearch`. `close`: the token that forces an end at the limit, or None."""
    prompts, columns = tokens.shape
    beams, room, vocab = shape.beams, shape.max_new_tokens, cfg.vocab_size
    limit = room if close is None else room - 1
    # enough of each beam's tokens that `beams` of all are no stop tokens, and 2·beams of each to admit from
    width = min(vocab, max(2 * beams, beams + shape.stops))
    slots, ropes = open_slots(prepared, tokens, lengths, beams, room, cfg)

    def one(carry: tuple[Array, Slots, Found, Found]) -> tuple[Array, Slots, Found, Found]:
        step, slots, alive, found = carry
        each, token = jax.lax.top_k(next_logp(prepared, slots, cfg).reshape(prompts, beams, vocab), width)
        total = jnp.where(jnp.isnan(each), -jnp.inf, alive.scores[..., None] + each)
        total, order = jax.lax.top_k(total.reshape(prompts, -1), beams * width)
        parent = order // width
        token, each = (jnp.take_along_axis(x.reshape(prompts, -1), order, 1) for x in (token, each))
        ended = jnp.any(token[..., None] == stop_ids, axis=-1)
        is_kept = jnp.arange(beams * width) < beams
        admitted = ended & (is_kept if shape.admit == "kept" else order % width < 2 * beams)

        grown = append(gather(alive, parent), token, each, total)
        scores = jnp.where(admitted, total / grown.lengths**penalty, -jnp.inf)
        complete = dataclasses.replace(grown, scores=scores, finished=scores > -jnp.inf)
        found = best(concatenate(found, complete), shape.num_return)

        index = jax.lax.top_k(jnp.where(ended, -jnp.inf, total), beams)[1]
        is_open = ~jnp.take_along_axis(ended, index, axis=1)
        alive = gather(grown, index)
        alive = dataclasses.replace(alive, scores=jnp.where(is_open, alive.scores, -jnp.inf))
        if shape.enough is None:  # a sum of log-probs only falls; over the penalty it is best at one end
            hope = jnp.maximum(alive.scores / (step + 2.0) ** penalty, alive.scores / room**penalty)
            over = jnp.max(hope, axis=1) <= found.scores[:, -1]
        else:
            over = jnp.sum(found.scores > -jnp.inf, axis=1) >= shape.enough
        alive = dataclasses.replace(alive, scores=jnp.where(over[:, None], -jnp.inf, alive.scores))

        slots = reorder(slots, flat_rows(jnp.take_along_axis(parent, index, axis=1), beams), since=columns)
        token = jnp.take_along_axis(token, index, axis=1).reshape(-1)
        hidden, keys, values = device.advance(prepared, slots, token, columns + step, ropes, cfg)
        slots = dataclasses.replace(slots, hidden=hidden, keys=keys, values=values, lengths=slots.lengths + 1)
        return step + 1, slots, alive, found

    def more(carry: tuple[Array, Slots, Found, Found]) -> Array:
        return (carry[0] < limit) & jnp.any(carry[2].scores > -jnp.inf)

    start = (
        jnp.zeros((), jnp.int32),
        slots,
        first_beam(prompts, beams, room),
        nothing(prompts, shape.num_return, room),
    )
    _, slots, alive, found = jax.lax.while_loop(more, one, start)
    if close is None:
        scores = alive.scores / jnp.maximum(alive.lengths, 1) ** penalty
        return tidy(best(concatenate(found, dataclasses.replace(alive, scores=scores)), shape.num_return))
    return fill_up(found, alive, next_logp(prepared, slots, cfg), close)


# --- parts that searches share


def check_search(cfg: ModelConfig, lengths: Array, token_ids: Sequence[int], **counts: int) -> None:
    """Raises a ValueError that names what a search cannot do."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1")
    for token in token_ids:
        if not 0 <= token < cfg.vocab_size:
            raise ValueError(f"token {token} is outside the vocabulary of {cfg.vocab_size}")
    empty = np.flatnonzero(np.asarray(lengths) < 1)
    if len(empty):
        raise ValueError(f"prompt {empty[0]} is empty: a search needs a token to continue")


def open_slots(
    prepared: Tree, tokens: Array, lengths: Array, beams: int, room: int, cfg: ModelConfig
) -> tuple[Slots, Tree]:
    """Prompts read once each into `beams` consecutive slots, and tables of rotary positions.

    The slots have one block: P columns for prompts, then `room` to be written, all rows at the same column.

    Args:
      tokens: i32[M, P] right-padded.  lengths: i32[M].
    """
    columns = tokens.shape[1]
    right_aligned = jax.vmap(jnp.roll)(tokens, columns - lengths)
    prefix = device.prefill(prepared, None, right_aligned, lengths, cfg)
    prefix = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), prefix)
    rows = len(prefix.lengths)
    slots = Slots(
        keys=tuple(device.fit(x, 3, columns, room)[None] for x in prefix.keys),
        values=tuple(device.fit(x, 2, columns, room)[None] for x in prefix.values),
        hidden=prefix.hidden,
        lengths=prefix.lengths,
        left=jnp.zeros(rows, jnp.int32),
        uids=jnp.zeros(rows, jnp.int32),
        sampling=sampling_params(rows),
        rules=(),
    )
    return slots, transformer.rope_tables(cfg, jnp.arange(columns + room, dtype=jnp.int32)[None])


def next_logp(prepared: Tree, slots: Slots, cfg: ModelConfig) -> Array:
    """f32[S, V] log-probs (nats) of the next token; NaN all over a row whose logits are not finite."""
    return jax.nn.log_softmax(next_logits(prepared, slots.hidden, cfg), axis=-1)


def reorder(slots: Slots, rows: Array, *, since: int) -> Slots:
    """The caches of rows i32[S]; those that change places have the columns before `since` alike."""

    def moved(layers: tuple[Array, ...], axis: int) -> tuple[Array, ...]:
        def one(x: Array) -> Array:
            new = jax.lax.slice_in_dim(x, since, None, axis=axis)[:, rows]
            return jax.lax.dynamic_update_slice_in_dim(x, new, since, axis)

        return tuple(map(one, layers))

    return dataclasses.replace(slots, keys=moved(slots.keys, 4), values=moved(slots.values, 3))


def flat_rows(beam: Array, beams: int) -> Array:
    """i32[M, k] beams of each prompt -> i32[M·k] rows of a batch with `beams` rows per prompt."""
    return (beam + beams * jnp.arange(beam.shape[0])[:, None]).reshape(-1)
