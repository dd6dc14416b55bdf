"""Where prompts come from: generated tasks, files, tensorflow_datasets."""

import dataclasses
import difflib
import glob
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxrl_llm.data import files
from jaxrl_llm.data.rows import MalformedRow, Row, Source, checked_source, concatenate, held_out

__all__ = ["KINDS", "MalformedRow", "Row", "Source", "held_out", "open_source"]

KINDS = {
    "reasoning_gym": ("name", "size"),
    "jsonl": ("path",),
    "parquet": ("path",),
    "tfds": ("name", "split"),
}
"""kind -> the arguments that it needs."""

READERS = {"jsonl": files.jsonl, "parquet": files.parquet}

SEED_SPACING = 10**6
"""Item i+1 of reasoning_gym's seed s is item i of its seed s+1, so our seeds lie this far apart."""


def open_source(
    kind: str,
    *,
    path: str = "",
    name: str = "",
    split: str = "",
    size: int = 0,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Source:
    """Rows by index, every one of them checked before it returns (generated ones are right by construction).

    Rows are dicts with a `prompt`, a string or a list of `{"role", "content"}`, and further columns for the
    rewards. Files may be in TRL's form (prompt and columns), verl's (data_source, prompt, ability,
    reward_model, extra_info; `ground_truth` is exposed as a column), pairs (prompt, chosen, rejected) or
    supervised (prompt, completion). Rows of a reasoning_gym task have `answer` and what its scorer needs,
    `create_dataset(row["source_dataset"], **row["task_config"]).score_answer(text, row["entry"])`.

    Args:
      kind: a key of `KINDS`.
      path: a file or a pattern such as 'data/train-*.parquet' (read in the order of their names); for 'tfds'
        the data_dir, by default tfds' own.
      name: the task of 'reasoning_gym', the dataset of 'tfds' ('name/config:version').
      split: of 'tfds', slices such as 'train[:80%]' included.
      size: rows of 'reasoning_gym', at most a million; elsewhere at most so many rows (0 = all).
      seed: of 'reasoning_gym'; sources with different seeds are different parts of the task. Prompts may
        still coincide: see `held_out`.
      options: of 'reasoning_gym' the task's own config; elsewhere `columns` (our names for the file's, as in
        `{"columns": {"prompt": "question"}}`) and `form` (of `rows.FORMS`; by default the first row tells).

    Raises:
      ValueError: an unknown kind, name, split or option, an argument that is missing or not for this kind.
      MalformedRow: a bad row; names the file, the row (from 1) and the column.
      FileNotFoundError: there is nothing at `path`.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown data source {kind!r}; one of {', '.join(KINDS)}")
    given = {"path": path, "name": name, "split": split, "size": size}
    for argument in KINDS[kind]:
        if not given[argument]:
            raise ValueError(f"a {kind} source needs {argument}")
    for argument in {"name", "split"} - set(KINDS[kind]):
        if given[argument]:
            raise ValueError(f"a {kind} source takes no {argument}, got {given[argument]!r}")
    if size < 0 or seed < 0:
        raise ValueError(f"size={size} and seed={seed} must not be negative")
    options = dict(options or {})
    if kind == "reasoning_gym":
        if path:
            raise ValueError(f"a reasoning_gym source takes no path, got {path!r}")
        return _reasoning_gym(name, size, seed, options)
    for option in options:
        if option not in ("columns", "form"):
            raise ValueError(
                f"unknown option {option!r} of a {kind} source{_near(option, ['columns', 'form'])}"
            )
    columns, form = dict(options.get("columns") or {}), options.get("form") or ""
    if kind == "tfds":
        source = _tfds(name, split, path, columns, form)
    else:
        found = [path] if Path(path).is_file() else sorted(glob.glob(path))
        if not found:
            raise FileNotFoundError(f"no file at {path!r}")
        source = concatenate([READERS[kind](file, columns=columns, form=form) for file in found], found)
    return dataclasses.replace(source, size=min(size, len(source))) if size else source


def _reasoning_gym(name: str, size: int, seed: int, options: dict[str, Any]) -> Source:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise ValueError(f"unknown reasoning_gym task {name!r}{_near(name, DATASETS)}")
    if size > SEED_SPACING:
        raise ValueError(f"size={size} would run into the next seed's rows; {SEED_SPACING} at most")
    fields = {field.name for field in dataclasses.fields(DATASETS[name][1])} - {"seed", "size"}
    for option in options:
        if option not in fields:
            raise ValueError(
                f"unknown option {option!r} of reasoning_gym task {name!r}{_near(option, fields)}"
            )
    config = {**options, "seed": seed * SEED_SPACING, "size": size}
    try:
        dataset = reasoning_gym.create_dataset(name, **config)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"reasoning_gym task {name!r} refuses {options}: {error}") from error

    def read(index: int) -> Row:
        entry = dataset[index]
        return {
            "prompt": entry["question"],
            "answer": entry["answer"],
            # As generated, not through JSON: the arc tasks' scorers tell tuples from lists.
            "entry": entry,
            "source_dataset": name,
            "task_config": config,
        }

    return Source(size, read, tuple(read(0)), lambda index: f"reasoning_gym {name!r}, row {index + 1}")


def _tfds(name: str, split: str, path: str, columns: Mapping[str, str], form: str) -> Source:
    import tensorflow_datasets as tfds

    where = f"tfds {name!r}"
    try:
        builder = tfds.builder(name, data_dir=path or None)
    except tfds.core.DatasetNotFoundError as error:
        known = [*tfds.list_builders(with_community_datasets=False)]
        known += [folder.name for folder in Path(path).glob("*/")] if path else []
        raise ValueError(f"no dataset {name!r} in {path or 'tfds'}{_near(name, known)}") from error
    if not builder.data_path.exists():
        raise FileNotFoundError(
            f"{where} has not been prepared at {builder.data_path}: once, call "
            f"tfds.builder({name!r}, data_dir=..., file_format='array_record').download_and_prepare()"
        )
    try:
        data = builder.as_data_source(split=split)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{where}, split {split!r}: {error}") from error

    def place(index: int) -> str:
        return f"{where}, split {split!r}, row {index + 1}"

    def read(index: int) -> Row:
        row: Row = {}
        column = ""
        try:
            for column, value in data[index].items():
                row[column] = _plain(value)
        except UnicodeDecodeError as error:
            raise MalformedRow(f"{place(index)}, column {column!r}: not text in UTF-8: {error}") from error
        return row

    def scan() -> Iterator[tuple[str, Any]]:
        return ((place(i), read(i)) for i in range(len(data)))

    return checked_source(scan(), read, columns=columns, form=form, where=where, place=place)


def _plain(value: Any) -> Any:
    """A tfds value as plain Python: bytes as text, arrays as lists, columns of messages as messages."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        value = {key: _plain(item) for key, item in value.items()}
        if set(value) == {"role", "content"} and all(isinstance(item, list) for item in value.values()):
            return [{"role": r, "content": c} for r, c in zip(value["role"], value["content"])]
        return value
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return (
        f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; one of {', '.join(sorted(known))}"
    )
