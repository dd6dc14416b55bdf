"""Completions that match a regular expression or a JSON schema: its automaton, as tables on the device.

    guide = make_guide({"date": r"\\d{4}-\\d\\d", "call": json_schema(schema)}, tokenizer, V)
    engine = Engine(..., stop_ids=tokenizer.eos_ids, rules=(guide.rule,))
    Request(ids, 256, rules=(guide.start("call"),))

All grammars of an engine are in one table, and a row's state is a number: which row of the table says what
may come next. Row 0 lets everything pass. Tokens that no state tells apart are one class, so the table has a
column by class rather than by token: Q·C entries of 2 or 4 bytes for Q states and C classes, and 4 bytes per
token of the vocabulary (152,000 made-up tokens, a schema of five fields: 508 states, 143 classes, 0.8 MB,
made in some seconds). They are constants of the compiled decoder, once per engine.

A request that ends by its limit, not by itself, has written the beginning of something that matches.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.data.tokenizers import Tokenizer, check_vocabulary
from jaxrl_llm.sampling.automata import automaton
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
    ids = _written(tokenizer)
    rows: list[dict[int, int]] = [dict.fromkeys(range(vocab_size), FREE)]
    starts = {}
    for name, pattern in patterns.items():
        try:
            initial, following, accepting = automaton(pattern, ids)
        except ValueError as error:
            raise ValueError(f"grammar {name!r}, {error}") from error
        number = {state: len(rows) + at for at, state in enumerate(following)}
        starts[name] = number[initial]
        for state, row in following.items():
            ends = dict.fromkeys(tokenizer.eos_ids, number[state]) if state in accepting else {}
            rows.append({token: number[to] for token, to in row.items()} | ends)
    table, classes = _by_class(rows, vocab_size)
    return Guide(_rule(table, classes), table, classes, starts)


def _written(tokenizer: Tokenizer) -> dict[bytes, list[int]]:
    """The tokens that write each string of bytes."""
    ids: dict[bytes, list[int]] = {}
    for token, written in enumerate(tokenizer.token_bytes()):
        if written and token not in tokenizer.eos_ids:
            ids.setdefault(written, []).append(token)
    return ids


def _by_class(rows: list[dict[int, int]], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Table [Q, C] and classes i32[V]: two tokens are in one class if every row takes them alike."""
    classes = np.zeros(vocab_size, np.int64)
    arrays = [
        tuple(np.fromiter(part, np.int64, len(row)) for part in (row.keys(), row.values())) for row in rows
    ]
    count = 1
    for tokens, following in arrays:  # each row splits the classes of the tokens that it knows
        _, part = np.unique(classes[tokens] * len(rows) + following, return_inverse=True)
        classes[tokens] = count + part
        count += len(tokens)
    _, classes = np.unique(classes, return_inverse=True)
    table = np.full((len(rows), classes.max() + 1), -1, np.int16 if len(rows) < 2**15 else np.int32)
    for row, (tokens, following) in zip(table, arrays):
        row[classes[tokens]] = following
    return table, classes.astype(np.int32)


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
