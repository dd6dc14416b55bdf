"""JSONL and parquet files as random-access rows."""

import array
import json
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxrl_llm.data.rows import MalformedRow, Row, Source, checked_source

BATCH = 1024
"""Rows of a parquet file that are Python objects at once while it is checked."""


def jsonl(path: str, *, columns: Mapping[str, str], form: str) -> Source:
    """One JSON object per line; blank lines are skipped. Memory: eight bytes per row, the file is mapped.

    Raises MalformedRow with the line's number, and what `checked_source` raises.
    """
    with open(path, "rb") as file:
        if not Path(path).stat().st_size:
            raise ValueError(f"{path} is empty")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    starts = array.array("q")

    def line(start: int) -> bytes:
        end = data.find(b"\n", start)
        return data[start : end if end >= 0 else len(data)]

    def scan() -> Iterator[tuple[str, Any]]:
        start, number = 3 if data[:3] == b"\xef\xbb\xbf" else 0, 0
        while start < len(data):
            text, number = line(start), number + 1
            if text.strip():
                place = f"{path}, row {number}"
                try:
                    row = json.loads(text.decode())
                except ValueError as error:  # also of bytes that are not UTF-8
                    raise MalformedRow(f"{place}: not a JSON object on one line: {error}") from error
                starts.append(start)
                yield place, row
            start += len(text) + 1

    def read(index: int) -> Row:
        return json.loads(line(starts[index]).decode())

    def place(index: int) -> str:
        number = data[: starts[index]].count(b"\n") + 1
        return f"{path}, row {number}"

    return checked_source(scan(), read, columns=columns, form=form, where=path, place=place)


def parquet(path: str, *, columns: Mapping[str, str], form: str) -> Source:
    """A parquet file, held in memory as one Arrow table. Raises what `checked_source` raises."""
    import pyarrow
    from pyarrow import parquet as arrow

    try:
        # A ParquetFile, not read_table: the latter takes folder names like a=1 for columns.
        table = arrow.ParquetFile(path).read().combine_chunks()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error

    def scan() -> Iterator[tuple[str, Any]]:
        index = 0
        for start in range(0, table.num_rows, BATCH):
            for row in table.slice(start, BATCH).to_pylist():
                yield place(index), row
                index += 1

    def place(index: int) -> str:
        return f"{path}, row {index + 1}"

    def read(index: int) -> Row:
        return table.slice(index, 1).to_pylist()[0]

    return checked_source(scan(), read, columns=columns, form=form, where=path, place=place)
