"""Where a run's figures go: `metrics.jsonl`, TensorBoard events, and a table of completions per step.

The writers have the method names of `clu.metric_writers` (which would import TensorFlow).
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

METRICS = "metrics.jsonl"


class Writer(Protocol):
    """Takes figures by step."""

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Numbers, by metric name."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Texts, by name."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """The run's config, once."""

    def flush(self) -> None:
        """Everything written so far is in the files."""

    def close(self) -> None:
        """Flushes, and ends."""


def open_writer(workdir: str | os.PathLike[str], restored_step: int | None = None) -> "MultiWriter":
    """A writer to `metrics.jsonl` and TensorBoard, both directly in `workdir`.

    Args:
      workdir: folder of the run; made if missing.
      restored_step: step of the checkpoint from which the run goes on. What an earlier process wrote for
        later steps is taken back: rows, events, completions. None: the run starts anew, and all of it is.
    """
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    last = -1 if restored_step is None else restored_step
    cut(folder / METRICS, last)
    for path in folder.glob("completions_*.parquet"):
        digits = path.stem.removeprefix("completions_")
        if digits.isdigit() and int(digits) > last:
            path.unlink()
    return MultiWriter([JsonlWriter(folder / METRICS), TensorBoardWriter(folder, last + 1)])


class MultiWriter:
    """Hands everything to several writers."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = list(writers)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for writer in self._writers:
            writer.write_texts(step, texts)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write_hparams(hparams)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


class JsonlWriter:
    """One JSON object per step: `{"step": 3, "time": 1700000000.123, "loss": 0.5, ...}`.

    What is written for the step of the last row joins that row. A row is in the file when the call returns,
    so a killed process loses none. Numbers that are not finite are null: the file is strict JSON.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._path.touch()
        cut(self._path, sys.maxsize)
        rows = list(_rows(self._path))
        self._row: dict[str, Any] = rows[-1] if rows else {}
        self._file = open(self._path, "r+b")  # noqa: SIM115 (closed by `close`)
        self._end = len(text := self._file.read())
        self._start = text.rfind(b"\n", 0, -1) + 1  # of the last row

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Adds numbers (Python's, numpy's or jax's scalars) to the row of `step`."""
        self._write(step, {name: _number(value) for name, value in scalars.items()})

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Adds texts to the row of `step`."""
        self._write(step, texts)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the config to `hparams.json` beside the metrics."""
        text = json.dumps(hparams, indent=2, default=str)
        _replace(self._path.with_name("hparams.json"), text.encode() + b"\n")

    def flush(self) -> None:
        """Nothing: every row is in the file already."""

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):  # of a row that did not fit on the disk, which `_write` has said
            self._file.close()

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        if self._row.get("step") != step:
            self._start, self._row = self._end, {"step": int(step), "time": 0.0}
        self._row |= {**values, "step": int(step), "time": round(time.time(), 3)}
        line = json.dumps(self._row, allow_nan=False).encode() + b"\n"
        self._file.seek(self._start)
        self._file.write(line)
        self._file.flush()
        self._end = self._start + len(line)
        self._file.truncate(self._end)


class TensorBoardWriter:
    """TensorBoard's event file, written without tensorboardX's background thread.

    Args:
      folder: where `events.out.tfevents.*` goes.
      purge_step: TensorBoard forgets what older event files in the folder have from this step on.
    """

    def __init__(self, folder: str | os.PathLike[str], purge_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        # The name has the time in whole seconds; the suffix keeps files of one second apart, and in order.
        self._events = EventsWriter(str(Path(folder) / "events"), f".{time.time_ns() % 10**9:09d}")
        self._add(purge_step, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in scalars.items()]
        self._add(step, summary=Summary(value=values))
        self.flush()

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        from tensorboardX import summary

        for name, text in texts.items():
            self._add(step, summary=summary.text(name, text))
        self.flush()

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        from tensorboardX import summary

        for part in summary.hparams(dict(_flat(hparams)), {}):
            self._add(0, summary=part)
        self.flush()

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # as above
            self._events.close()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(wall_time=time.time(), step=int(step), **content))


def cut(path: str | os.PathLike[str], step: int) -> None:
    """Removes the rows past `step`, and a last line torn by a kill, in one atomic replacement.

    Args:
      path: of a metrics.jsonl; nothing happens if there is none.
      step: the last step that stays.

    Raises:
      ValueError: a line other than the last is not a row.
    """
    path = Path(path)
    if path.exists():
        rows = [row for row in _rows(path) if row["step"] <= step]
        _replace(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_metrics(path: str | os.PathLike[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The numbers of a metrics.jsonl, by name.

    Args:
      path: the file, or the workdir it is in.

    Returns:
      For each metric the steps i64[n] at which it was written, in the file's order, and its values f64[n];
      null is NaN. Texts and `time` are left out.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line other than the last is not a row.
    """
    path = Path(path)
    path = path / METRICS if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"no {path}: not the folder of a run, or it has not logged a step yet")
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in _rows(path):
        for name, value in row.items():
            if name not in ("step", "time") and not isinstance(value, str):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(math.nan if value is None else float(value))
    return {name: (np.array(steps), np.array(values)) for name, (steps, values) in found.items()}


def write_completions(
    workdir: str | os.PathLike[str],
    step: int,
    *,
    prompts: Sequence[str],
    completions: Sequence[str],
    rewards: Mapping[str, Any],
    reward: Any,
    advantages: Any,
    lengths: Any,
) -> Path:
    """Writes the samples of a step to `completions_<step>.parquet`, all of it or nothing.

    Args:
      workdir: folder of the run.
      step: of the samples.
      prompts, completions: N texts.
      rewards: f[N] by name of the reward function; NaN (not applicable, or failed) becomes null.
      reward: f[N] weighted total.
      advantages: f[N].
      lengths: i[N] tokens of the completion.

    Returns:
      The path of the file. Columns: step, prompt, completion, rewards/<name>..., reward, advantage, length.

    Raises:
      ValueError: the columns differ in length.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "step": np.full(len(prompts), step),
        "prompt": _texts(prompts),
        "completion": _texts(completions),
    }
    columns |= {f"rewards/{name}": np.asarray(values) for name, values in rewards.items()}
    columns |= {
        "reward": np.asarray(reward),
        "advantage": np.asarray(advantages),
        "length": np.asarray(lengths),
    }
    if len(set(map(len, columns.values()))) > 1:
        raise ValueError(f"columns differ in length: { {name: len(x) for name, x in columns.items()} }")
    table = pa.table({name: pa.array(values, from_pandas=True) for name, values in columns.items()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    path = Path(workdir) / f"completions_{step}.parquet"
    _replace(path, sink.getvalue())
    return path


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_bytes().rstrip(b"\n").split(b"\n")
    for i, line in enumerate(lines):
        try:
            row = json.loads(line)
            row["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            if i < len(lines) - 1:
                raise ValueError(f"{path}, line {i + 1}: not a row of metrics: {line[:80]!r}") from error
            return  # empty, or torn by a kill
        yield row


def _number(value: Any) -> int | float | None:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, int):
        return int(value)
    return float(value) if math.isfinite(value) else None


def _texts(texts: Sequence[str]) -> list[str]:
    """Lone surrogates, which half a character decodes to, have no UTF-8."""
    return [text.encode(errors="replace").decode() for text in texts]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, bool | int | float | str) else str(value)


def _replace(path: Path, content: Any) -> None:
    """Writes a whole file (bytes or a buffer), on the disk before it takes its name."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
