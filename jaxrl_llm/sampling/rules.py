"""Rules of decoding: what may change logits between the model and the draw, with a state per slot.

    engine = Engine(..., rules=(penalty_rule(V), forbid_rule(V)))
    Request(ids, 256, rules=(penalties(ids, V, repetition=1.1), forbid([13], V)))

A rule is compiled into the engine and all that differs between requests is state, so that nothing is compiled
again for another penalty or another list of tokens. A token that must not be drawn gets the logit -inf. If a
row has no token left, the engine fails its request, as it does for NaN logits.

What is recorded of a token that was drawn under rules:

    behaviour_logp   of the distribution that it was drawn from, after all rules
    raw_logp         of the model, as if there were no rules
    log_kept         tempered log-prob of the model - behaviour_logp

so the trainer's log-prob minus `log_kept` is the behaviour's, whatever the rules. For rules that only take
tokens away it is the log of the mass they left, as for truncation. For penalties, which change the odds of
tokens that remain, it is no mass and may be positive.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Rule(NamedTuple):
    """One rule, as pure functions. Its state has a leading axis of rows.

    Attributes:
      init: rows -> a state under which the rule does nothing.
      apply: (state, logits f32[S, V]) -> f32[S, V].
      advance: (state, token i32[S], live bool[S]) -> the state after the tokens of live rows.
    """

    init: Callable[[int], Any]
    apply: Callable[[Any, Array], Array]
    advance: Callable[[Any, Array, Array], Any]


Rules: TypeAlias = tuple[Rule, ...]


# --- penalties


class Penalties(NamedTuple):
    """State of `penalty_rule`: 5 bytes per slot and token of the vocabulary.

    Attributes:
      in_context: bool[S, V] tokens of the context.
      written: i32[S, V] how often each token has been written since.
      repetition, presence, frequency: f32[S].
    """

    in_context: Array
    written: Array
    repetition: Array
    presence: Array
    frequency: Array


@functools.cache
def penalty_rule(vocab_size: int) -> Rule:
    """Makes tokens less likely that have occurred, in this order:

        z_v := z_v / r if z_v > 0 else z_v · r       where v occurs in the context or since
        z_v := z_v - p · 1[n_v > 0] - f · n_v        where v has been written n_v times

    r as in Hugging Face transformers (`repetition_penalty`, CTRL, arXiv 1909.05858); p and f as in OpenAI's
    API (`presence_penalty`, `frequency_penalty`). A request's state is `penalties(...)`.
    """

    def init(rows: int) -> Penalties:
        off = jnp.zeros(rows)
        seen = jnp.zeros((rows, vocab_size), bool)
        return Penalties(seen, jnp.zeros((rows, vocab_size), jnp.int32), off + 1, off, off)

    def penalise(state: Penalties, logits: Array) -> Array:
        r, p, f = (x[:, None] for x in (state.repetition, state.presence, state.frequency))
        seen = state.in_context | (state.written > 0)
        logits = jnp.where(seen, jnp.where(logits > 0, logits / r, logits * r), logits)
        return logits - p * (state.written > 0) - f * state.written

    def apply(state: Penalties, logits: Array) -> Array:
        used = jnp.any((state.repetition != 1) | (state.presence != 0) | (state.frequency != 0))
        return jax.lax.cond(used, penalise, lambda _, logits: logits, state, logits)

    def advance(state: Penalties, token: Array, live: Array) -> Penalties:
        rows = jnp.arange(token.shape[0])
        return state._replace(written=state.written.at[rows, token].add(live.astype(jnp.int32)))

    return Rule(init, apply, advance)


def penalties(
    context: Sequence[int],
    vocab_size: int,
    *,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
) -> Penalties:
    """State of a row that continues `context`.

    Args:
      context: ids that the repetition penalty also holds for.
      vocab_size: V of the model.
      repetition: r above 0; 1 = off, above it repeats become rarer.
      presence, frequency: p and f (nats); 0 = off, above it repeats become rarer.

    Raises:
      ValueError: a token outside the vocabulary, or a penalty outside its range.
    """
    if not 0 < repetition < math.inf:
        raise ValueError(f"repetition={repetition} must be a finite number above 0 (1 = off)")
    for name, value in (("presence", presence), ("frequency", frequency)):
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} must be finite (0 = off)")
    return Penalties(
        _marked(context, vocab_size),
        jnp.zeros(vocab_size, jnp.int32),
        jnp.float32(repetition),
        jnp.float32(presence),
        jnp.float32(frequency),
    )


# --- a bias for some tokens


class Bias(NamedTuple):
    """State of `bias_rule`: ids i32[S, K], -1 = none, and what is added to their logits, f32[S, K]."""

    ids: Array
    values: Array


@functools.cache
def bias_rule(room: int) -> Rule:
    """Adds to the logits of up to K = `room` tokens, as OpenAI's `logit_bias`; a row's state: `bias(...)`."""

    def init(rows: int) -> Bias:
        return Bias(jnp.full((rows, room), -1, jnp.int32), jnp.zeros((rows, room)))

    def add(state: Bias, logits: Array) -> Array:
        rows, vocab_size = logits.shape
        columns = jnp.where(state.ids < 0, vocab_size, state.ids)
        return logits.at[jnp.arange(rows)[:, None], columns].add(state.values, mode="drop")

    def apply(state: Bias, logits: Array) -> Array:
        return jax.lax.cond(jnp.any(state.ids >= 0), add, lambda _, logits: logits, state, logits)

    return Rule(init, apply, lambda state, token, live: state)


def bias(values: Mapping[int, float], room: int, vocab_size: int) -> Bias:
    """State of a row whose tokens have `values` (nats) added to their logits, at most `room` of them.

    Raises:
      ValueError: more tokens than room, one outside the vocabulary, or a value that is not finite.
    """
    if len(values) > room:
        raise ValueError(f"{len(values)} biased tokens and bias_rule has room for {room}")
    _marked(list(values), vocab_size)
    for token, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"the bias of token {token} is {value}: it must be finite; forbid it instead")
    ids, added = np.full(room, -1, np.int32), np.zeros(room, np.float32)
    ids[: len(values)] = list(values)
    added[: len(values)] = list(values.values())
    return Bias(jnp.asarray(ids), jnp.asarray(added))


# --- tokens forbidden or forced


@functools.cache
def forbid_rule(vocab_size: int) -> Rule:
    """Never draws the tokens of a row's state, bool[V] from `forbid`: one byte per slot and token."""
    return Rule(
        init=lambda rows: jnp.zeros((rows, vocab_size), bool),
        apply=lambda forbidden, logits: jnp.where(forbidden, -jnp.inf, logits),
        advance=lambda forbidden, token, live: forbidden,
    )


def forbid(tokens: Sequence[int], vocab_size: int) -> Array:
    """State of a row that never draws `tokens`, bool[V].

    Raises:
      ValueError: a token outside the vocabulary, or all of it.
    """
    forbidden = _marked(tokens, vocab_size)
    if bool(forbidden.all()):
        raise ValueError(f"all {vocab_size} tokens of the vocabulary are forbidden: nothing could be drawn")
    return forbidden


class Forced(NamedTuple):
    """State of `force_rule`: ids i32[S, K] to come, -1 where the row is free again."""

    ids: Array


@functools.cache
def force_rule(room: int) -> Rule:
    """Begins a completion with given ids, up to K = `room` of them; a row's state is `force(...)`.

    They count as drawn: their behaviour_logp is 0. Who trains on them trains on what the policy did not
    choose.
    """

    def apply(state: Forced, logits: Array) -> Array:
        next_id = state.ids[:, :1]
        other = jnp.arange(logits.shape[1]) != next_id
        return jnp.where((next_id >= 0) & other, -jnp.inf, logits)

    def advance(state: Forced, token: Array, live: Array) -> Forced:
        rest = jnp.pad(state.ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        return Forced(jnp.where(live[:, None], rest, state.ids))

    return Rule(lambda rows: Forced(jnp.full((rows, room), -1, jnp.int32)), apply, advance)


def force(tokens: Sequence[int], room: int, vocab_size: int) -> Forced:
    """State of a row whose completion begins with `tokens`, at most `room` of them.

    Raises:
      ValueError: more tokens than room, or one outside the vocabulary.
    """
    if len(tokens) > room:
        raise ValueError(f"{len(tokens)} forced tokens and force_rule has room for {room}: give it more")
    _marked(tokens, vocab_size)
    ids = np.full(room, -1, np.int32)
    ids[: len(tokens)] = tokens
    return Forced(jnp.asarray(ids))


# --- a least number of tokens


@functools.cache
def min_tokens_rule(eos_ids: tuple[int, ...]) -> Rule:
    """Draws none of `eos_ids` before a number of other tokens, the state of a row from `min_tokens`."""

    ends = np.asarray(eos_ids, np.int32)

    def apply(left: Array, logits: Array) -> Array:
        early = jnp.where((left > 0)[:, None], -jnp.inf, logits[:, ends])
        return logits.at[:, ends].set(early)

    def advance(left: Array, token: Array, live: Array) -> Array:
        return jnp.maximum(left - live, 0)

    return Rule(lambda rows: jnp.zeros(rows, jnp.int32), apply, advance)


def min_tokens(tokens: int) -> Array:
    """State of a row that writes at least so many tokens before it may end.

    Raises:
      ValueError: a negative number.
    """
    if tokens < 0:
        raise ValueError(f"min_tokens={tokens} must not be negative")
    return jnp.int32(tokens)


def _marked(tokens: Sequence[int], vocab_size: int) -> Array:
    """bool[V]: which ids are among `tokens`."""
    ids = np.asarray(tokens, np.int64).reshape(-1)
    bad = ids[(ids < 0) | (ids >= vocab_size)]
    if bad.size:
        raise ValueError(f"token id {bad[0]} is outside the vocabulary of {vocab_size}")
    marked = np.zeros(vocab_size, bool)
    marked[ids] = True
    return jnp.asarray(marked)
