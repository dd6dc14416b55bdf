"""Prompts as token ids, and rows of ids as arrays of few shapes."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.data.rows import MalformedRow
from jaxrl_llm.data.tokenizers import Tokenizer

OVERLONG = ("drop", "error")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt ready for the sampler.

    Attributes:
      ids: token ids, generation header included.
      row: the row it came from, every column for the reward functions.
      index: which of the given rows, from 0.
    """

    ids: list[int]
    row: dict[str, Any]
    index: int


def encode_prompts(
    rows: Iterable[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    overlong: str = "drop",
    place: Callable[[int], str] = "row {}".format,
) -> tuple[list[Prompt], int]:
    """Encodes the `prompt` column of `rows`.

    Args:
      rows: dicts with a `prompt`, a string or messages.
      tokenizer: of the policy.
      max_prompt_length: longest prompt in tokens.
      overlong: what becomes of longer ones: 'drop' (and count), or 'error'.
      place: which of the given rows, from 0 -> where it stands, for errors.

    Returns:
      The prompts in order, and how many were dropped.

    Raises:
      MalformedRow: an empty prompt, one too long under 'error', or one that the tokenizer refuses.
      ValueError: an unknown `overlong`.
    """
    check_overlong(overlong)
    prompts: list[Prompt] = []
    dropped = 0
    for index, row in enumerate(rows):
        try:
            ids = tokenizer.encode_prompt(row["prompt"]) if row.get("prompt") else []
        except ValueError as error:
            raise MalformedRow(f"the prompt of {place(index)}: {error}") from error
        if not ids:
            raise MalformedRow(f"the prompt of {place(index)} is empty: {row.get('prompt')!r}")
        if len(ids) <= max_prompt_length:
            prompts.append(Prompt(ids, row, index))
        elif overlong == "error":
            raise MalformedRow(
                f"the prompt of {place(index)} has {len(ids)} tokens, more than "
                f"max_prompt_length={max_prompt_length}: raise the limit, or set overlong='drop' "
                "(data.overlong_prompts of a config)"
            )
        else:
            dropped += 1
    return prompts, dropped


def pad(rows: Sequence[Sequence[int]], *, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids as one array: left-aligned, zeros after their end.

    Args:
      rows: N lists of at most `length` ids.
      length: T.

    Returns:
      i32[N, T] tokens and i32[N] lengths.

    Raises:
      ValueError: a row longer than `length`.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    if len(rows) and lengths.max() > length:
        raise ValueError(f"row {lengths.argmax()} has {lengths.max()} tokens, more than the array's {length}")
    tokens = np.zeros((len(rows), length), np.int32)
    for target, row in zip(tokens, rows):
        target[: len(row)] = row
    return tokens, lengths


def bucket_length(n: int, buckets: Sequence[int]) -> int:
    """The smallest of `buckets` that holds `n` tokens: as many compiled shapes as buckets, and no more.

    Raises:
      ValueError: none is large enough.
    """
    fitting = [bucket for bucket in buckets if bucket >= n]
    if not fitting:
        raise ValueError(f"{n} tokens fit into none of the buckets {tuple(buckets)}")
    return min(fitting)


def ladder(limit: int, *, multiple_of: int = 128, middles: bool = False) -> tuple[int, ...]:
    """Buckets up to `limit`: `multiple_of`, its doubles, and last `limit` itself rounded up to a multiple.

    >>> ladder(1000, multiple_of=128)
    (128, 256, 512, 1024)
    >>> ladder(1000, multiple_of=128, middles=True)
    (128, 256, 384, 512, 768, 1024)
    """
    if limit < 1 or multiple_of < 1:
        raise ValueError(f"limit={limit} and multiple_of={multiple_of} must be positive")
    top = -(-limit // multiple_of) * multiple_of
    rungs = [multiple_of]
    while rungs[-1] * 2 < top:
        rungs.append(rungs[-1] * 2)
    between = [rung * 3 // 2 for rung in rungs[1:] if middles and rung * 3 // 2 < top]
    return tuple(sorted({*rungs, *between, top}))


def check_overlong(overlong: str) -> None:
    """Refuses an `overlong` that is neither 'drop' nor 'error'."""
    if overlong not in OVERLONG:
        raise ValueError(f"unknown overlong={overlong!r}; one of {', '.join(OVERLONG)}")
