"""Regular expressions as automata over the tokens of a vocabulary, by outlines-core."""

from collections.abc import Mapping
from typing import NamedTuple

END = "\U0010ffff"
"""A character that no text holds, set behind a pattern and taken off again.

outlines-core (0.2.14) loses the ways from a state that may end to one that may not, as in `(ab)+` the way
from "ab" to "aba". With an end that is a character of its own there are no such states.
"""


class Automaton(NamedTuple):
    """Whoever follows `rows` from `initial` to a state of `accepting` has written what matches.

    Attributes:
      initial: a state.
      rows: the next state by token, for states from which an accepting one can be reached; no way leads out
        of them.
      accepting: some of the states.
    """

    initial: int
    rows: dict[int, dict[int, int]]
    accepting: set[int]


def automaton(pattern: str, ids: Mapping[bytes, list[int]]) -> Automaton:
    """Compiles a pattern.

    Args:
      pattern: a regular expression in Rust's syntax, matched as a whole; without anchors.
      ids: the tokens that write each string of bytes.

    Raises:
      ImportError: the extra 'guided' is missing.
      ValueError: no such pattern, or no tokens that write something which matches.
    """
    try:
        from outlines_core import Index, Vocabulary
    except ImportError as error:
        raise ImportError("guided decoding needs the extra 'guided': pip install outlines-core") from error

    end = 1 + max((token for tokens in ids.values() for token in tokens), default=0)
    vocabulary = Vocabulary(end + 1, {**ids, END.encode(): [end]})
    try:
        Index(
            pattern, Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})
        )  # is it one by itself?
        index = Index(f"(?:{pattern}){END}", vocabulary)
    except ValueError as error:
        raise ValueError(f"pattern {pattern[:200]!r}: {error}") from error
    rows, finals = index.get_transitions(), index.get_final_states()
    accepting = {state for state, row in rows.items() if row.get(end) in finals}
    for row in rows.values():
        row.pop(end, None)
        row.pop(end + 1, None)
    # states from which no end can be reached would be followed for ever
    after = {state: set(row.values()) for state, row in rows.items()}
    good = set(accepting)
    while grown := {state for state, following in after.items() if following & good} - good:
        good |= grown
    initial = index.get_initial_state()
    if initial not in good:
        raise ValueError(f"pattern {pattern[:200]!r}: the tokenizer's tokens write nothing that matches")
    kept: dict[int, dict[int, int]] = {}
    following = [initial]
    while following:  # in the order in which they are reached, what is not reached left out
        state = following.pop()
        if state not in kept:
            kept[state] = {token: to for token, to in rows[state].items() if to in good}
            following += sorted(after[state] & good - kept.keys(), reverse=True)
    return Automaton(initial, kept, accepting & kept.keys())
