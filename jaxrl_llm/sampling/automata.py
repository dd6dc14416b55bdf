"""Regular expressions as automata: over bytes, by outlines-core, then over the tokens of a vocabulary."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

START, END = "\0", "\U0010ffff"
"""Characters set before and behind a pattern, and taken off again.

outlines-core (0.2.14) loses the ways from a state that may end to one that may not, as in `(ab)+` the way
from "ab" to "aba". With an end that is a character of its own there are no such states. It also builds the
automaton of a search that may start anywhere: of strings with escaped quotes, up to n characters long, 2^n
states. A start that such strings can't hold leaves n of them.
"""

MOST_PARTS = 1 << 14
"""Characters and classes of a pattern with its repetitions written out, at most."""


class Automaton(NamedTuple):
    """Whoever follows `table` from state 0 to an accepting one has written what matches.

    Attributes:
      table: i32[Q, 256] the next state by byte; -1 = there is none from which an end can be reached.
      accepting: bool[Q].
    """

    table: np.ndarray
    accepting: np.ndarray


def automaton(pattern: str) -> Automaton:
    """Compiles a pattern.

    Args:
      pattern: a regular expression in Rust's syntax, matched as a whole; without anchors.

    Raises:
      ImportError: the extra 'guided' is missing.
      ValueError: no such pattern, one that is too large, or one that nothing matches.
    """
    try:
        from outlines_core import Index, Vocabulary
    except ImportError as error:
        raise ImportError("guided decoding needs the extra 'guided': pip install outlines-core") from error

    end = 256
    vocabulary = Vocabulary(end + 1, {bytes([byte]): [byte] for byte in range(256)} | {END.encode(): [end]})
    try:
        _check_size(pattern)
        index = Index(f"{START}(?:{pattern}){END}", vocabulary)
    except ValueError as error:
        raise ValueError(f"pattern {pattern[:200]!r}: {error}") from error
    rows, finals = index.get_transitions(), index.get_final_states()
    numbers = {state: number for number, state in enumerate(rows)}
    table = np.full((len(rows), 256), -1, np.int32)
    accepting = np.zeros(len(rows), bool)
    for state, row in rows.items():
        for byte, to in row.items():
            if byte < end and to in numbers:
                table[numbers[state], byte] = numbers[to]
            accepting[numbers[state]] |= byte == end and to in finals
    first = rows.get(index.get_initial_state(), {}).get(ord(START))
    if first not in numbers:
        raise ValueError(f"pattern {pattern[:200]!r}: nothing matches it")
    return Automaton(*_live(table, accepting, numbers[first]))


def over_tokens(
    automaton: Automaton, written: Sequence[bytes | None], eos_ids: Sequence[int], vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The automaton that takes a token at a time.

    A token takes every state to another one, as the bytes that it writes do one after the other. Few such
    functions differ, so tokens are joined into classes of one function while their bytes are read.

    Args:
      written: by id, what tokens write; nothing = they can't be drawn.
      eos_ids: drawn where what was written matches.
      vocab_size: V of the model, at least as many as `written`.

    Returns:
      i32[Q, C] the next state by state and class, -1 = must not be drawn; from state 0 on, all states are
      reached, and from all an end is. And i32[V], the classes of tokens.

    Raises:
      ValueError: the tokens write nothing that matches.
    """
    step, byte_class = np.unique(automaton.table, axis=1, return_inverse=True)
    step = np.append(step, np.full((1, step.shape[1]), -1, step.dtype), axis=0)  # from state -1 to itself
    byte_class = byte_class.reshape(-1)
    states = len(automaton.table)
    functions = [np.full(states, -1, np.int32), np.arange(states, dtype=np.int32)]
    known = {function.tobytes(): number for number, function in enumerate(functions)}

    tokens = [t for t, text in enumerate(written) if text and t not in eos_ids]
    texts = [written[token] or b"" for token in tokens]
    classes = np.zeros(vocab_size, np.int64)
    classes[tokens] = 1
    lengths = np.array([len(text) for text in texts], np.int64)
    letters = np.zeros((len(texts), max(lengths, default=0)), np.uint8)
    letters[np.arange(letters.shape[1]) < lengths[:, None]] = np.frombuffer(b"".join(texts), np.uint8)
    ids = np.asarray(tokens, np.int64)
    for at in range(letters.shape[1]):
        on = (lengths > at) & (classes[ids] > 0)  # class 0 leads nowhere
        pairs, which = np.unique(
            classes[ids[on]] * step.shape[1] + byte_class[letters[on, at]], return_inverse=True
        )
        numbers = np.zeros(len(pairs), np.int64)
        for n, pair in enumerate(pairs.tolist()):
            before, letter = divmod(pair, step.shape[1])
            function = step[functions[before], letter]
            numbers[n] = known.setdefault(function.tobytes(), len(functions))
            if numbers[n] == len(functions):
                functions.append(function)
        classes[ids[on]] = numbers[which]

    if eos_ids:
        classes[list(eos_ids)] = len(functions)
        functions.append(np.where(automaton.accepting, np.arange(states), -1).astype(np.int32))
    used, classes = np.unique(classes, return_inverse=True)
    try:
        table, _ = _live(np.stack(functions, axis=1)[:, used], automaton.accepting, 0)
    except ValueError as error:
        raise ValueError(f"the tokenizer's tokens write {error}") from error
    table, joined = np.unique(table, axis=1, return_inverse=True)
    return table, joined.reshape(-1)[classes.reshape(-1)].astype(np.int32)


def _live(table: np.ndarray, accepting: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Of states i[Q, C] those that are reached from `first`, which is then 0, and from which an end is."""
    after = [np.unique(row[row >= 0]).tolist() for row in table]
    before: list[list[int]] = [[] for _ in after]
    for state, following in enumerate(after):
        for to in following:
            before[to].append(state)
    # states from which no end can be reached would be followed for ever
    good = _reached(np.flatnonzero(accepting).tolist(), before)
    if first not in good:
        raise ValueError("nothing that matches")
    order = [state for state in _reached([first], after) if state in good]
    number = np.full(len(table) + 1, -1, np.int32)  # the last for state -1
    number[order] = np.arange(len(order))
    return number[table[order]], accepting[order]


def _reached(first: list[int], after: list[list[int]]) -> dict[int, None]:
    """States in the order in which they are reached."""
    order, stack = dict.fromkeys(first), first
    while stack:
        new = [to for to in dict.fromkeys(to for state in stack for to in after[state]) if to not in order]
        order |= dict.fromkeys(new)
        stack = new
    return order


def _check_size(pattern: str) -> None:
    """Refuses what is no pattern by itself, and what would take too long.

    Raises:
      ValueError: a parenthesis without its other, an anchor, or too many parts.
    """
    bare, before = re.sub(r"\\(.)", lambda x: "^" if x[1] in "AzbB<>" else "x", pattern, flags=re.DOTALL), ""
    while bare != before:  # classes may stand in classes
        before, bare = bare, re.sub(r"\[\^?\]?[^\[\]]*\]", "x", bare)
    groups, last = [0], 0  # parts of the groups that are open, and of what was last
    for token in re.findall(r"\{\d*,?\d*\}|\(\?[a-z-]*:|.", bare, flags=re.DOTALL):
        if token[0] == "(":
            groups.append(0)
        elif token == ")":
            last = groups.pop()
            if not groups:
                raise ValueError("a ) without its (")
            groups[-1] += last
        elif len(token) > 1:
            most = max(map(int, re.findall(r"\d+", token)), default=1)
            groups[-1] += last * (most - 1)
        elif token in "^$":
            raise ValueError("anchors have no place in it: it is matched as a whole")
        elif token not in "|?*+":
            last = 1
            groups[-1] += last
        if groups[-1] > MOST_PARTS:
            raise ValueError(f"more than {MOST_PARTS} parts: repeat less, or fewer times")
