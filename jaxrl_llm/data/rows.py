"""Random-access rows, and the checks that every row passes before training starts."""

import dataclasses
import difflib
import hashlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from jaxrl_llm.data.chat import Text

Row: TypeAlias = dict[str, Any]
"""One example: `prompt` and whatever else the rewards need."""

FORMS = {
    "prompt": ("prompt",),
    "supervised": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
    "text": ("text",),
}
"""form -> the columns of text that its rows must have. 'text', which has no prompt, has to be asked for."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows by index. Reading is pure: a row is the same whenever it is asked for.

    Attributes:
      size: number of rows.
      read: index in [0, size) -> row.
      columns: names of every row's columns.
      place: index -> the words that say where the row stands, for errors.
    """

    size: int
    read: Callable[[int], Row]
    columns: tuple[str, ...]
    place: Callable[[int], str] = "row {}".format

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Row:
        index = operator.index(index)
        if not 0 <= index < self.size:
            raise IndexError(f"row {index} of a source of {self.size} rows")
        return self.read(index)

    def __iter__(self) -> Iterator[Row]:
        return map(self.read, range(self.size))


class MalformedRow(ValueError):
    """A row that cannot be trained on; says which file, row (from 1) and column."""


def checked_source(
    scan: Iterable[tuple[str, Any]],
    read: Callable[[int], Row],
    *,
    columns: Mapping[str, str],
    form: str,
    where: str,
    place: Callable[[int], str],
) -> Source:
    """A source of the rows that `read` gives, after every one of them has been looked at once.

    Args:
      scan: all rows in order, each with the words that say where it stands; consumed here.
      read: index -> the same row again.
      columns: our name -> the file's name, for columns that are called otherwise there.
      form: a key of `FORMS`, or '' for what the first row's columns say.
      where: the file or dataset, for errors.
      place: index -> the words of `scan` again.

    Raises:
      MalformedRow: a row that lacks a column which the first one has or the form needs, has another one, or
        holds something other than text or messages in a column of text.
      ValueError: no rows, an unknown form, or a name in `columns` that the first row does not have.
    """
    if form not in ("", *FORMS):
        raise ValueError(f"unknown form {form!r}; one of {', '.join(FORMS)}")
    names: tuple[str, ...] = ()
    size = 0
    for stands, raw in scan:
        if not isinstance(raw, dict):
            raise MalformedRow(f"{stands}: an object with columns was expected, not {_short(raw)}")
        if not size:
            check_names(columns, raw, where)
            names = tuple(prepare(raw, columns))
            form = form or _form_of(names)
        row = prepare(raw, columns)
        if fault := _fault(row, names, FORMS[form]):
            column, what = fault
            raise MalformedRow(f"{stands}, column {columns.get(column, column)!r}: {what}")
        size += 1
    if not size:
        raise ValueError(f"{where} holds no rows")
    return Source(size, lambda index: prepare(read(index), columns), names, place)


def check_names(columns: Mapping[str, str], raw: Row, where: str) -> None:
    """Refuses a mapping to columns that do not exist."""
    for ours, theirs in columns.items():
        if theirs not in raw:
            near = difflib.get_close_matches(theirs, raw, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"columns={{{ours!r}: {theirs!r}}}: {where} has {', '.join(raw)}{hint}")


def prepare(raw: Row, columns: Mapping[str, str]) -> Row:
    """A row under our names: `columns` renamed, verl's ground truth as a column of its own."""
    theirs = set(columns.values())
    row = {name: value for name, value in raw.items() if name not in theirs}
    row |= {ours: raw[name] for ours, name in columns.items() if name in raw}
    if "data_source" in row and isinstance(row.get("reward_model"), dict):
        row.setdefault("ground_truth", row["reward_model"].get("ground_truth"))
    return row


def concatenate(sources: Sequence[Source], names: Sequence[str]) -> Source:
    """The sources one after another. `names`: what to call each in errors."""
    for source, name in zip(sources, names):
        if set(source.columns) != set(sources[0].columns):
            raise ValueError(
                f"{name} has columns {', '.join(source.columns)} and {names[0]} has "
                f"{', '.join(sources[0].columns)}: files that are read together need the same ones"
            )
    if len(sources) == 1:
        return sources[0]
    starts = np.cumsum([0, *map(len, sources)])

    def find(index: int) -> tuple[Source, int]:
        which = int(np.searchsorted(starts, index, side="right")) - 1
        return sources[which], index - int(starts[which])

    def read(index: int) -> Row:
        source, row = find(index)
        return source.read(row)

    def place(index: int) -> str:
        source, row = find(index)
        return source.place(row)

    return Source(int(starts[-1]), read, sources[0].columns, place)


def held_out(train: Source, test: Source) -> tuple[Source, int]:
    """`train` without the rows whose prompt occurs in `test`, by text (spacing aside), and how many they are.

    Keeps eight bytes per training row and sixteen per test row; every row of both is read once.

    Raises:
      ValueError: nothing remains.
    """
    seen = {_digest(row["prompt"]) for row in test}
    kept = np.fromiter(
        (i for i, row in enumerate(train) if _digest(row.get("prompt") or row["text"]) not in seen), np.int64
    )
    if not len(kept):
        raise ValueError(f"all {len(train)} training prompts occur in the held-out set")
    rest = Source(
        len(kept),
        lambda index: train.read(int(kept[index])),
        train.columns,
        lambda index: train.place(int(kept[index])),
    )
    return rest, len(train) - len(kept)


def prompt_text(prompt: Text) -> str:
    """The words of a prompt: the string, or what the messages say one after another."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def _digest(prompt: Text) -> bytes:
    return hashlib.blake2b(" ".join(prompt_text(prompt).split()).encode(), digest_size=16).digest()


def _form_of(names: Sequence[str]) -> str:
    if {"chosen", "rejected"} & set(names):
        return "preference"
    return "supervised" if "completion" in names else "prompt"


def _fault(row: Row, names: Sequence[str], texts: Sequence[str]) -> tuple[str, str] | None:
    """The first column of a row that is wrong, and how."""
    for name in texts:
        if name not in row:
            return name, (
                f"missing; there are {', '.join(row)}. If yours has another name: columns={{{name!r}: ...}}"
            )
    for name in names:
        if name not in row:
            return name, "missing, and the first row has it; write null where there is no value"
    for name in row:
        if name not in names:
            return name, "not in the first row; every row needs the same columns"
    for name in texts:
        if what := _text_fault(row[name], may_be_empty=name not in ("prompt", "text")):
            return name, what
    if "data_source" in row and "reward_model" in row:
        model = row["reward_model"]
        if not isinstance(model, dict) or model.get("ground_truth") is None:
            return (
                "reward_model",
                f"an object with 'style' and 'ground_truth' was expected, not {_short(model)}",
            )
    return None


def _text_fault(value: Any, *, may_be_empty: bool) -> str:
    if isinstance(value, str):
        return "" if may_be_empty or value.strip() else "the text is empty"
    if not isinstance(value, list):
        return f"text or a list of messages was expected, not {_short(value)}"
    if not value:
        return "the list of messages is empty"
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            return f"message {number} is not an object with 'role' and 'content' but {_short(message)}"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                return f"message {number} needs text as its {key!r}, not {_short(message.get(key))}"
    return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
