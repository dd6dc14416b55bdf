"""Supervised rows as tokens with a loss mask, several to a packed sequence."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.data.prompts import check_overlong
from jaxrl_llm.data.rows import MalformedRow
from jaxrl_llm.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and its completion, or a text without a prompt.

    Attributes:
      ids: token ids of both, closed by EOS.
      loss_mask: for each id, whether the policy should write it: completion and EOS, or all of a text.
      index: which of the given rows, from 0.
    """

    ids: list[int]
    loss_mask: list[bool]
    index: int


class Packed(NamedTuple):
    """Examples side by side in N sequences of T tokens.

    Attributes:
      tokens: i32[N, T], 0 in the padding.
      segment_ids: i32[N, T] which example of its row a token belongs to, from 1; 0 = padding.
      positions: i32[N, T] place within the example, from 0; 0 in the padding.
      loss_mask: bool[N, T] True at targets: token t, predicted from those before it in its own example.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    loss_mask: np.ndarray


def encode_supervised(
    rows: Iterable[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    overlong: str = "drop",
    mask_id: int | None = None,
    completion_length: int = 0,
    place: Callable[[int], str] = "row {}".format,
) -> tuple[list[Example], int]:
    """Encodes `prompt` and `completion` (or `chosen`, where there is no completion), or `text` alone.

    The prompt's ids are those that the sampler would see; the completion's, or EOS after a text, follow them.

    Args:
      rows: dicts with `prompt` and `completion` or `chosen`, each a string or messages; or, where there is no
        prompt, with a string `text`.
      tokenizer: of the policy.
      max_length: longest example, prompt and completion, in tokens.
      overlong: what becomes of longer ones: 'drop' (and count), or 'error'.
      mask_id: of a masked-diffusion LM; no example may have it.
      completion_length: shorter completions go on with EOS up to so many tokens. A masked-diffusion LM is
        given the place of its whole answer at once, and learns in this way that an answer may end before it
        (2502.09992 fills up to the longest of a batch). 0 = they end where they end.
      place: which of the given rows, from 0 -> where it stands, for errors.

    Returns:
      The examples in order, and how many were dropped.

    Raises:
      MalformedRow: a row without one of the columns, an empty prompt or text, an example too long under
        'error' or with the mask token in it, or what the tokenizer refuses.
      ValueError: an unknown `overlong`.
    """
    check_overlong(overlong)
    examples: list[Example] = []
    dropped = 0
    for index, row in enumerate(rows):
        first = "prompt" if "prompt" in row else "text"
        column = next((name for name in ("completion", "chosen") if name in row), "")
        if first == "text":
            column = "text"
        if not column or not row.get(first):
            raise MalformedRow(
                f"{place(index)} needs a prompt and a completion (or chosen), or a text, got columns "
                f"{', '.join(row)}"
            )
        try:
            ids, mask = _encode(row, column, tokenizer, completion_length)
        except ValueError as error:
            raise MalformedRow(f"{place(index)}, column {column!r}: {error}") from error
        if mask_id in ids:
            raise MalformedRow(
                f"{place(index)} has the mask token, id {mask_id}, in place {ids.index(mask_id) + 1}: it "
                "stands for tokens to be predicted. Leave it out of the text, or set another model.mask_id"
            )
        if len(ids) <= max_length:
            examples.append(Example(ids, mask, index))
        elif overlong == "error":
            raise MalformedRow(
                f"{place(index)} has {len(ids)} tokens in all, more than "
                f"max_length={max_length}: raise the limit, or set overlong='drop' (data.overlong_prompts of "
                "a config) to leave such rows out"
            )
        else:
            dropped += 1
    return examples, dropped


def _encode(
    row: dict[str, Any], column: str, tokenizer: Tokenizer, completion_length: int
) -> tuple[list[int], list[bool]]:
    """Ids of a row and their loss mask."""
    if column == "text":
        if not isinstance(row["text"], str):
            raise ValueError("a text is a string; messages go into prompt and completion")
        ids = tokenizer.encode_prompt(row["text"])
        if ids[-1] not in tokenizer.eos_ids:
            ids = [*ids, tokenizer.eos_ids[0]]
        return ids, [True] * len(ids)
    prompt = tokenizer.encode_prompt(row["prompt"])
    completion, written = tokenizer.encode_completion(row["prompt"], row[column])
    rest = max(0, completion_length - len(completion))
    ids = prompt + completion + [tokenizer.eos_ids[0]] * rest
    return ids, [False] * len(prompt) + written + [True] * rest


def first_fit(examples: Sequence[Example], length: int, rows: int | None = None) -> list[list[Example]]:
    """Puts each example, in order, into the first sequence of `length` (T) tokens with room for it.

    Args:
      examples: in the order wanted.
      length: T.
      rows: sequences there are; None = as many as it takes.

    Returns:
      The examples of each sequence. They are a prefix of `examples`: it ends before the first one that
      fits into none of `rows`.

    Raises:
      ValueError: an example longer than `length`.
    """
    room = np.zeros(len(examples), np.int64)  # free tokens of each sequence opened so far
    places: list[list[Example]] = []
    for example in examples:
        size = len(example.ids)
        if size > length:
            raise ValueError(
                f"the example of row {example.index} has {size} tokens, more than length={length}"
            )
        fits = room[: len(places)] >= size
        where = int(fits.argmax()) if fits.any() else len(places)
        if where == len(places):
            if where == rows:
                break
            places.append([])
            room[where] = length
        places[where].append(example)
        room[where] -= size
    return places


def pack(examples: Sequence[Example], length: int, rows: int | None = None) -> tuple[Packed, int]:
    """Packs examples into sequences by `first_fit`, deterministically and in the order given.

    The first token of an example has nothing before it in its own example, so it is never a target: no
    boundary predicts the next example.

    Args:
      examples, length (T), rows: as `first_fit`; with `rows`, the result has that many sequences, empty
        ones included.

    Returns:
      The sequences, and how many of the examples are in them.

    Raises:
      ValueError: an example longer than `length`.
    """
    places = first_fit(examples, length, rows)
    shape = len(places) if rows is None else rows, length
    packed = Packed(*(np.zeros(shape, dtype) for dtype in (np.int32, np.int32, np.int32, np.bool_)))
    for n, row in enumerate(places):
        start = 0
        for segment, example in enumerate(row, 1):
            span = slice(start, start + len(example.ids))
            packed.tokens[n, span] = example.ids
            packed.segment_ids[n, span] = segment
            packed.positions[n, span] = np.arange(len(example.ids))
            packed.loss_mask[n, span] = example.loss_mask
            packed.loss_mask[n, start : start + 1] = False
            start = span.stop
    return packed, sum(map(len, places))
