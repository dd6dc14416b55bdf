"""Completions that match a regular expression or a JSON schema: its automaton, as tables on the device.

Where the grammars are known beforehand, they belong to the engine, and a request names one:

    guide = make_guide({"date": r"\\d{4}-\\d\\d", "call": json_schema(schema)}, tokenizer, V)
    engine = Engine(..., stop_ids=tokenizer.eos_ids, rules=(guide.rule,))
    Request(ids, 256, rules=(guide.start("call"),))

All of them are in one table, and a row's state is a number: which row of the table says what may come next.
Row 0 lets everything pass. They are constants of the compiled decoder, once per engine.

Where they come with the requests, a slot has room for a table of its own, and nothing is compiled for them:

    engine = Engine(..., stop_ids=tokenizer.eos_ids, rules=(grammar_rule(V),))
    Request(ids, 256, rules=(grammar(json_schema(schema), tokenizer, V),))

Tokens that no state tells apart are one class, so a table has a column by class rather than by token: Q·C
entries of 2 or 4 bytes for Q states and C classes, and 2 or 4 bytes per token of the vocabulary (152,000
tokens, a schema of five fields: 79 states, 151 classes; any JSON object: 588 states, 261 classes, made in a
second).

A request that ends by its limit, not by itself, has written the beginning of something that matches.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.data.tokenizers import Tokenizer, check_vocabulary
from jaxrl_llm.sampling.automata import automaton, over_tokens
from jaxrl_llm.sampling.json_schemas import json_object as json_object
from jaxrl_llm.sampling.json_schemas import json_schema as json_schema
from jaxrl_llm.sampling.rules import Rule

Array = jax.Array

FREE = 0
"""The state of a row without a grammar."""


@dataclasses.dataclass(frozen=True)
class Guide:
    """Grammars of an engine.

    Attributes:
      rule: for the engine; a row's state is an i32 from `start`.
      table: i[Q, C] the next state by state and class of token; -1 = must not be drawn.
      classes: i32[V] of tokens.
      starts: the first state of each grammar.
    """

    rule: Rule
    table: np.ndarray
    classes: np.ndarray
    starts: Mapping[str, int]

    def start(self, name: str, written: Sequence[int] = ()) -> np.int32:
        """The state of a row under a grammar, after tokens that it has `written` already.

        Raises:
          ValueError: an unknown name, or tokens that nothing which matches begins with.
        """
        if name not in self.starts:
            raise ValueError(f"unknown grammar {name!r}; one of {', '.join(self.starts)}")
        state = self.starts[name]
        for position, token in enumerate(written):
            state = int(self.table[state, self.classes[token]])
            if state < 0:
                raise ValueError(f"nothing that matches {name!r} goes on with token {token} at {position}")
        return np.int32(state)

    @property
    def nbytes(self) -> int:
        """Of the tables, in bytes."""
        return self.table.nbytes + self.classes.nbytes


def make_guide(patterns: Mapping[str, str], tokenizer: Tokenizer, vocab_size: int) -> Guide:
    """Compiles grammars for a tokenizer.

    Args:
      patterns: a regular expression for each grammar, which whole completions match (without anchors,
        look-around or back-references); of a JSON schema by `json_schema`.
      tokenizer: its EOS ids are drawn where a completion may end, its other special tokens never.
      vocab_size: V of the model.

    Raises:
      ValueError: a tokenizer that doesn't fit the model, a pattern that is none, or one that the tokenizer's
        tokens can't write.
    """
    check_vocabulary(tokenizer, vocab_size)
    tables, starts = [np.zeros((1, 1), np.int32)], {}  # row 0, FREE, goes on with itself
    classes = [np.zeros(vocab_size, np.int32)]
    written, count = tokenizer.token_bytes(), 1
    for name, pattern in patterns.items():
        try:
            table, of_tokens = over_tokens(automaton(pattern), written, tokenizer.eos_ids, vocab_size)
        except ValueError as error:
            raise ValueError(f"grammar {name!r}, {error}") from error
        starts[name] = count
        tables.append(np.where(table < 0, -1, table + count))
        classes.append(of_tokens)
        count += len(table)
    # two tokens are in one class if every grammar takes them alike
    columns, joined = np.unique(np.stack(classes), axis=1, return_inverse=True)
    dtype = np.int16 if count < 2**15 else np.int32
    table = np.concatenate([rows[:, column] for rows, column in zip(tables, columns)]).astype(dtype)
    joined = joined.reshape(-1).astype(np.int32)
    return Guide(_rule(table, joined), table, joined, starts)


def _rule(table: np.ndarray, classes: np.ndarray) -> Rule:
    def apply(state: Array, logits: Array) -> Array:
        def mask(state: Array, logits: Array) -> Array:
            allowed = jnp.asarray(table)[state] >= 0
            return jnp.where(allowed[:, jnp.asarray(classes)], logits, -jnp.inf)

        guided = jnp.any(state != FREE)
        return jax.lax.cond(guided, mask, lambda _, logits: logits, state, logits)

    def advance(state: Array, token: Array, live: Array) -> Array:
        following = jnp.asarray(table)[state, jnp.asarray(classes)[token]].astype(jnp.int32)
        return jnp.where(live, following, state)

    return Rule(lambda rows: jnp.full(rows, FREE, jnp.int32), apply, advance)


# --- a grammar per request


TABLE_ENTRIES = 1 << 19
"""Room of `grammar_rule` for one table: 1 MB per slot."""


class Grammar(NamedTuple):
    """State of `grammar_rule`, of S slots or, without their axis, of one.

    Attributes:
      table: i16[S, E] by state and class, in rows of `width`: the next state; -1 = must not be drawn.
      classes: i16[S, V] of tokens.
      width: i32[S] C, the number of classes.
      state: i32[S]; -1 = there is no grammar.
    """

    table: Array
    classes: Array
    width: Array
    state: Array


@functools.cache
def grammar_rule(vocab_size: int, entries: int = TABLE_ENTRIES) -> Rule:
    """Keeps each row to a grammar of its own, its state from `grammar`: 2·(E + V) bytes per slot."""

    def init(rows: int) -> Grammar:
        zeros = jnp.zeros(rows, jnp.int32)
        table, classes = (jnp.zeros((rows, size), jnp.int16) for size in (entries, vocab_size))
        return Grammar(table, classes, zeros, zeros - 1)

    def following(rows: Grammar, classes: Array) -> Array:
        """The states after tokens of `classes` i16[S, n]."""
        at = jnp.maximum(rows.state, 0) * rows.width
        return jnp.take_along_axis(rows.table, at[:, None] + classes, axis=1)

    def apply(rows: Grammar, logits: Array) -> Array:
        def mask(rows: Grammar, logits: Array) -> Array:
            allowed = (rows.state < 0)[:, None] | (following(rows, rows.classes) >= 0)
            return jnp.where(allowed, logits, -jnp.inf)

        return jax.lax.cond(jnp.any(rows.state >= 0), mask, lambda _, logits: logits, rows, logits)

    def advance(rows: Grammar, token: Array, live: Array) -> Grammar:
        of_token = jnp.take_along_axis(rows.classes, token[:, None], axis=1)
        state = following(rows, of_token)[:, 0].astype(jnp.int32)
        return rows._replace(state=jnp.where(live & (rows.state >= 0), state, rows.state))

    return Rule(init, apply, advance)


def grammar(pattern: str, tokenizer: Tokenizer, vocab_size: int, entries: int = TABLE_ENTRIES) -> Grammar:
    """State of a row that writes what matches a pattern. It may be kept for further requests.

    Args:
      pattern, tokenizer, vocab_size: as `make_guide`.
      entries: E of the rule.

    Raises:
      ValueError: as `make_guide`, or a table of more than E entries.
    """
    check_vocabulary(tokenizer, vocab_size)
    by_bytes = automaton(pattern)
    states = len(by_bytes.table)
    if states < 2**15:
        written = tokenizer.token_bytes()
        table, classes = over_tokens(by_bytes, written, tokenizer.eos_ids, vocab_size)
        states = len(table)
    if states >= 2**15 or table.size > entries:
        raise ValueError(
            f"pattern {pattern[:200]!r}: its {states} states do not fit into a table of {entries} entries: "
            "let fewer things be repeated, or less often (as the characters of a string up to maxLength)"
        )
    room = np.full(entries, -1, np.int16)
    room[: table.size] = table.reshape(-1)
    return Grammar(
        jnp.asarray(room), jnp.asarray(classes, jnp.int16), jnp.int32(table.shape[1]), jnp.int32(0)
    )
