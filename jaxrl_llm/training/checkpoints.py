"""Checkpoints: all that an exact resume needs, written in the background and committed by one rename.

A checkpoint is a folder `<directory>/<step>`:

    state/           the arrays of the state, one entry per leaf, named by its place in the tree (OCDBT)
    host/            JSON: the host's part of the state, and the shape and dtype of every leaf
    metrics/         JSON: the metric by which the best checkpoint is chosen
    checksums.json   size and CRC-32 of every file in them; orbax alone restores a flipped byte silently

Everything is written into a temporary folder and flushed to the disk; the rename to `<step>` is the last act.
"""

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from jaxrl_llm.training import leaves as leaves_lib
from jaxrl_llm.training.sealing import damaged, seal

Tree = Any

TEMPORARY = ".orbax-checkpoint-tmp"
"""In the name of every folder that is not a checkpoint yet, or no more."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved or restored; the message names the folder and the way out."""


class ConfigMismatch(ValueError):
    """A run is resumed with a config that is not the one it was started with."""


class Checkpoints:
    """The checkpoints of one run.

    A context manager: leaving it waits for the save in progress. All processes of a job make the same calls.

    Args:
      directory: the folder of all checkpoints; made if missing, unless `read_only`.
      keep_last: number of newest checkpoints kept, at least 1.
      keep_best: number of checkpoints kept for their metric, besides those; 0 = none.
      best_metric: the metric, larger is better; a checkpoint saved without it is never among the best.
      read_only: only look: another process may be writing here.

    Raises:
      CheckpointError: `read_only` and no such folder, or a metrics file in it is damaged.
      ValueError: `keep_last` < 1 or `keep_best` < 0.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int = 1,
        keep_best: int = 0,
        best_metric: str = "eval/accuracy",
        read_only: bool = False,
    ) -> None:
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last={keep_last} must be at least 1 and keep_best={keep_best} at least 0")
        self.directory = Path(directory).absolute()
        self._keep_last, self._keep_best, self._metric = keep_last, keep_best, best_metric
        self._read_only = read_only
        self._saving: tuple[int, int] | None = None  # step and bytes of the save in progress
        logging.getLogger("absl").addFilter(self._hush)
        try:
            self._manager = self._open()
        except BaseException:
            logging.getLogger("absl").removeFilter(self._hush)
            raise

    def save(
        self,
        step: int,
        state: Tree,
        host: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        *,
        wait: bool = False,
    ) -> bool:
        """Saves in the background; the arrays may be donated or changed as soon as this returns.

        Args:
          step: number of updates made; not below that of a checkpoint already there.
          state: any tree of arrays, typed PRNG keys and Python numbers.
          host: what is not an array: JSON only.
          metrics: may hold `best_metric`.
          wait: whether to return only when the checkpoint is committed.

        Returns:
          False if the step is there already, and nothing was done; else True.

        Raises:
          CheckpointError: this save failed, or the one before it did in the background (then this one was
            not begun, and may be tried again). The checkpoints that stood before still stand.
          TypeError: `state` or `host` holds what cannot be saved.
        """
        self._must_write()
        self.wait()
        newest = self._manager.latest_step()
        if newest is not None and step <= newest:
            if step in self._manager.all_steps():
                return False
            raise CheckpointError(
                f"cannot save step {step}: {self.directory} holds the later step {newest}. "
                f"A run that goes on from an earlier step must call discard_after(step) first"
            )
        leaves, _ = leaves_lib.flatten(state)
        arrays = {name: leaves_lib.stored(leaf) for name, leaf in leaves.items()}
        arrays = {name: array for name, array in arrays.items() if array.size}  # orbax refuses empty ones
        record = {
            "host": _json(host),
            "leaves": {name: leaves_lib.spec(leaf) for name, leaf in leaves.items()},
        }
        items: dict[str, Any] = {"host": ocp.args.JsonSave(record)}
        if arrays:
            items["state"] = ocp.args.PyTreeSave(arrays)
        best = (metrics or {}).get(self._metric, math.nan)
        self._saving = (step, sum(array.nbytes for array in arrays.values()))
        with self._reported():
            self._manager.save(
                step,
                args=ocp.args.Composite(**items),
                metrics={self._metric: float(best)} if math.isfinite(best) else None,
                force=True,
            )
        if wait:
            self.wait()
        return True

    def wait(self) -> None:
        """Returns when no save is in progress.

        Raises:
          CheckpointError: the save in progress failed.
        """
        with self._reported():
            self._manager.wait_until_finished()
        self._saving = None

    def steps(self) -> list[int]:
        """The committed steps, ascending."""
        self.wait()
        if self._read_only:
            self._manager.reload()
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest committed step; None if there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the largest `best_metric`, of equals the latest; None if none was saved with it."""
        self.steps()
        return self._manager.best_step()

    def restore(
        self, abstract: Tree, step: int | None = None, *, partial: bool = False, verify: bool = True
    ) -> tuple[Tree, dict[str, Any]]:
        """Reads a checkpoint onto the devices that `abstract` names, whatever it was saved from.

        Args:
          abstract: the tree expected. Leaves: `jax.ShapeDtypeStruct`, also of typed keys, with a sharding
            (none: the default device); arrays, which stand for their shape, dtype and sharding; numbers.
          step: which one; None = the newest.
          partial: whether the checkpoint may hold more leaves than `abstract`; they are not read.
          verify: whether to compare the checksums first, which reads every file once more.

        Returns:
          (state, host): the tree with its leaves filled in, and the JSON that was saved beside it.

        Raises:
          CheckpointError: no checkpoint, no such step, a missing, truncated or damaged file, or a tree, shape
            or dtype other than `abstract`'s; the message names the file or the leaf.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.directory}")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise CheckpointError(f"no checkpoint of step {step} in {self.directory}; there are {steps}")
        folder = self.directory / str(step)
        if verify and (damage := damaged(folder)):
            raise self._corrupt(step, "; ".join(damage))
        leaves, treedef = leaves_lib.flatten(abstract)
        record = self._read(step, "host", ocp.args.JsonRestore())
        wanted = {name: leaves_lib.spec(leaf) for name, leaf in leaves.items()}
        if lines := leaves_lib.differences(record["leaves"], wanted, partial):
            more = [f"and {len(lines) - 20} more"] if len(lines) > 20 else []
            raise CheckpointError(
                "\n  ".join([f"checkpoint {folder} holds another state:", *lines[:20], *more])
                + "\nGive the config that it was saved with, or another folder."
            )
        target = {name: leaves_lib.physical(leaf) for name, leaf in leaves.items()}
        full = {name: x for name, x in target.items() if x.size}
        arrays = {name: np.zeros(x.shape, x.dtype) for name, x in target.items() if not x.size}
        if full:
            how = {name: _restore_args(x) for name, x in full.items()}
            request = ocp.args.PyTreeRestore(full, restore_args=how, partial_restore=True)
            arrays |= self._read(step, "state", request)
        return treedef.unflatten(leaves_lib.loaded(arrays[name], x) for name, x in leaves.items()), record[
            "host"
        ]

    def host(self, step: int) -> dict[str, Any]:
        """The JSON that was saved beside the arrays of a committed step.

        Raises:
          CheckpointError: it cannot be read.
        """
        return self._read(step, "host", ocp.args.JsonRestore())["host"]

    def discard_after(self, step: int) -> list[int]:
        """Removes the checkpoints newer than `step`: the abandoned future of a run that goes on from there.

        Returns:
          The steps removed.
        """
        self._must_write()
        later = [s for s in self.steps() if s > step]
        if jax.process_index() == 0:
            for s in reversed(later):  # renamed first: a folder half deleted must not pass for a checkpoint
                folder = self.directory / str(s)
                shutil.rmtree(folder.rename(folder.with_name(f"{s}{TEMPORARY}-discarded")))
        self._manager.reload()
        return later

    def close(self) -> None:
        """Waits for the save in progress and ends orbax's threads.

        Raises:
          CheckpointError: the save in progress failed.
        """
        try:
            self.wait()
        finally:
            self._manager.close()
            logging.getLogger("absl").removeFilter(self._hush)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(f"Besides, {failure}")  # what stopped the run matters more

    def _open(self) -> ocp.CheckpointManager:
        if self._read_only and not self.directory.is_dir():
            raise CheckpointError(f"no checkpoint folder {self.directory}")
        if not self._read_only and jax.process_index() == 0:
            for folder in self.directory.glob(f"*{TEMPORARY}*"):
                shutil.rmtree(folder)

        def value(metrics: Mapping[str, float]) -> float:
            return metrics.get(self._metric, -math.inf)

        best = BestN(get_metric_fn=value, n=self._keep_best, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            create=not self._read_only,
            read_only=self._read_only,
            best_fn=value,
            preservation_policy=AnyPreservationPolicy([LatestN(self._keep_last), best]),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        try:
            return ocp.CheckpointManager(self.directory, options=options)
        except ValueError as error:  # it reads all metrics at once, and does not say where it stumbled
            folders = sorted(folder for folder in self.directory.glob("*") if folder.name.isdigit())
            damage = [f"{folder.name}/{what}" for folder in folders for what in damaged(folder)]
            raise CheckpointError(
                f"cannot read {self.directory}: {'; '.join(damage) or error}. Remove the damaged folder"
            ) from error

    def _read(self, step: int, item: str, request: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: request}))[item]
        except Exception as error:
            raise self._corrupt(step, f"{item}/: {_cause(error)}") from error

    def _seal(self) -> None:
        """The last act before the rename, in orbax's background thread on the primary host."""
        for folder in self.directory.glob(f"*{TEMPORARY}"):
            seal(folder)

    def _hush(self, record: logging.LogRecord) -> bool:
        """A failed save is raised as CheckpointError; orbax logs it besides, in hundreds of lines."""
        return "/orbax/" not in record.pathname

    def _must_write(self) -> None:
        if self._read_only:
            raise CheckpointError(
                f"{self.directory} was opened with read_only=True: nothing in it is changed"
            )

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """After a failed save, or Ctrl-C in it, orbax's manager no longer knows what stands: reopen it."""
        try:
            yield
        except BaseException as error:
            failure = self._failed(error)
            if isinstance(error, Exception):
                raise failure from error
            raise

    def _failed(self, error: BaseException) -> CheckpointError:
        """Cleans up after a failed save and says what happened."""
        step, size = self._saving or (-1, 0)
        self._saving = None
        with contextlib.suppress(Exception):
            self._manager.close()
        self._manager = self._open()
        good = sorted(self._manager.all_steps())
        stands = f"step {good[-1]} still stands" if good else "there is no earlier checkpoint"
        free = shutil.disk_usage(self.directory).free
        return CheckpointError(
            f"saving step {step} ({_megabytes(size)} of arrays) in {self.directory} failed: {_cause(error)}; "
            f"{_megabytes(free)} are free there now, {stands}"
        )

    def _corrupt(self, step: int, what: str) -> CheckpointError:
        folder = self.directory / str(step)
        older = (s for s in reversed(self.steps()) if s < step and not damaged(self.directory / str(s)))
        good = next(older, None)
        way_out = "no earlier checkpoint is good"
        if good is not None:
            way_out = f"step {good} is good: ask for it, or remove {folder}"
        return CheckpointError(f"checkpoint {folder} is damaged: {what}; {way_out}")


def check_config(saved: Mapping[str, Any], current: Mapping[str, Any], ignore: Sequence[str] = ()) -> None:
    """Refuses to resume a run under another config.

    Args:
      saved: the config in the checkpoint, nested dicts.
      current: the config of this run.
      ignore: dotted keys that may differ, each with all that is below it (`"eval"` covers `"eval.interval"`).

    Raises:
      ConfigMismatch: with one line `key: saved -> current` for every difference.
    """
    old, new = dict(_dotted(_json(saved))), dict(_dotted(_json(current)))
    lines = [
        f"  {key}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
        and not any(key == name or key.startswith(f"{name}.") for name in ignore)
    ]
    if lines:
        raise ConfigMismatch(
            "the checkpoint was made with another config (saved -> current):\n"
            + "\n".join(lines)
            + "\nSet them back, or start a new run in another workdir."
        )


def _dotted(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every value below `tree` as JSON, by its dotted key."""
    if not isinstance(tree, dict) or not tree:
        yield prefix, json.dumps(tree)
        return
    for key, value in tree.items():
        yield from _dotted(value, f"{prefix}.{key}" if prefix else key)


def _json(value: Mapping[str, Any]) -> dict[str, Any]:
    """What the mapping will be when it is read back."""
    try:
        return json.loads(json.dumps(dict(value)))
    except (TypeError, ValueError) as error:
        raise TypeError(f"cannot be saved as JSON: {error}; in {dict(value)}") from error


def _restore_args(target: Any) -> ocp.RestoreArgs:
    if isinstance(target, np.ndarray):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=target.sharding, global_shape=target.shape, dtype=target.dtype)


def _megabytes(size: int) -> str:
    return f"{size:,} bytes" if size < 1e6 else f"{size / 1e6:,.1f} MB"


def _cause(error: BaseException) -> str:
    """The innermost reason: tensorstore nests them, with the path of a temporary file in each."""
    reason = str(error).strip().rsplit('": ', 1)[-1]
    return f"{type(error).__name__}: {reason[:500]}"
