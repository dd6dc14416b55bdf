"""The child process of `jaxrl_llm.rewards.pool`: loads reward functions and calls them one after another.

It is started as a plain interpreter rather than by `multiprocessing`, which would import the program's main
module (and with it jax) again in every child. User code runs in the main thread, where its own signal
handlers work. The protocol on the socket, pickled:

    parent → worker   (specs, memory_gib)                     once
    worker → parent   None, or the text of what went wrong    once, when everything is imported
    parent → worker   Request                                 any number of times
    worker → parent   Reply                                   one per call of the request, in order
"""

import asyncio
import contextlib
import glob
import importlib
import inspect
import math
import numbers
import os
import resource
import select
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Awaitable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from jaxrl_llm.rewards.functions import IMPORTS
from jaxrl_llm.rewards.specs import Reward, resolve

MARK = "JAXRL_REWARD_WORKER"  # environment variable that a worker's descendants inherit

NOT_APPLICABLE = "not_applicable"  # the function returned None for the row
TIMEOUT = "timeout"  # no answer inside the deadline
CRASHED = "crashed"  # the process ended: os._exit, a signal, the system's memory killer
OUT_OF_MEMORY = "out_of_memory"  # the worker's memory limit
WRONG_COUNT = "wrong_count"  # not a list with one score per row
BAD_VALUE = "bad_value"  # not a number
NONFINITE = "nonfinite"  # NaN, infinite or beyond float32
RAISED = "raised_"  # followed by the type of the exception

_DETAIL = 2000  # characters of a traceback that travel back


class Request(NamedTuple):
    """Calls of one function: keyword arguments of each; rows per call for TRL's form, None for verl's."""

    function: int
    calls: list[dict[str, Any]]
    rows: list[int] | None


class Reply(NamedTuple):
    """One call: (score, reason of its absence or None) per row; or None and why the call gave no list."""

    scores: list[tuple[float, str | None]] | None
    reason: str
    detail: str


def kill_marked(marker: str) -> None:
    """SIGKILL every other process with `MARK=marker` in its environment, whoever its parent is (Linux)."""
    wanted = f"{MARK}={marker}".encode()
    for _ in range(10):  # until a fork that was under way has been caught as well
        found = False
        for path in glob.glob("/proc/[0-9]*/environ"):
            pid = int(path.split("/")[2])
            with contextlib.suppress(OSError):
                with open(path, "rb") as file:
                    environment = file.read()
                if pid != os.getpid() and wanted in environment.split(b"\0"):
                    os.kill(pid, signal.SIGKILL)
                    found = True
        if not found:
            return


def as_score(value: Any) -> tuple[float, str | None]:
    """(score, None), or (NaN, reason) for what is not a finite float32 number. Numpy scalars are numbers."""
    if value is None:
        return math.nan, NOT_APPLICABLE
    try:
        if not isinstance(value, numbers.Real):
            value = value.item()  # scalars of numpy, jax and torch
        if not isinstance(value, numbers.Real):
            return math.nan, BAD_VALUE
        score = struct.unpack("f", struct.pack("f", float(value)))[0]
    except OverflowError:
        return math.nan, NONFINITE
    except Exception:
        return math.nan, BAD_VALUE
    return (score, None) if math.isfinite(score) else (math.nan, NONFINITE)


async def _result(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def call(reward: Reward, keywords: dict[str, Any], rows: int | None) -> Reply:
    """Call a reward function and judge what it returns; nothing that it raises gets out."""
    process = os.getpid()
    try:
        value = reward.function(**keywords)
        if inspect.isawaitable(value):
            value = asyncio.run(_result(value))
        if rows is None:
            value = [value.get("score", "") if isinstance(value, dict) else value]
        elif (
            isinstance(value, str | bytes | dict | set) or not hasattr(value, "__len__") or len(value) != rows
        ):
            shown = f"{len(value)} values" if hasattr(value, "__len__") else f"{value!r:.80}"
            return Reply(None, WRONG_COUNT, f"it returned {shown} ({type(value).__name__}) for {rows} rows")
        scores = [as_score(item) for item in value]
        bad = [item for item, (_, reason) in zip(value, scores) if reason not in (None, NOT_APPLICABLE)]
        return Reply(scores, "", f"it returned {bad[0]!r:.80}" if bad else "")
    except MemoryError:
        return Reply(None, OUT_OF_MEMORY, "it reached the memory limit of its worker")
    except BaseException as error:  # SystemExit and KeyboardInterrupt included
        return Reply(None, RAISED + type(error).__name__, traceback.format_exc()[-_DETAIL:])
    finally:
        if os.getpid() != process:
            os._exit(0)  # a child that the function forked came back here: this loop is not its own


def _end_with_parent(connection: Connection, marker: str) -> None:
    """Thread: end this process and its descendants when the parent has gone, however it went."""
    poller = select.poll()
    poller.register(connection.fileno(), 0)  # hang-up alone
    poller.poll()
    kill_marked(marker)
    os.killpg(0, signal.SIGKILL)


def _set_up(specs: Sequence[Any], memory_gib: float | None) -> list[Reward]:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_gib is not None:
        limit = int(memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for spec in specs:
        for module in IMPORTS.get(spec.path, ()):
            importlib.import_module(module)
    return [resolve(spec) for spec in specs]


def main() -> None:
    """Run a worker on the socket whose file descriptor is the first argument."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    threading.Thread(target=_end_with_parent, args=(connection, os.environ[MARK]), daemon=True).start()
    try:
        rewards = _set_up(*connection.recv())
    except BaseException:
        connection.send(traceback.format_exc()[-_DETAIL:])
        return
    connection.send(None)
    with contextlib.suppress(EOFError):
        while True:
            request: Request = connection.recv()
            reward = rewards[request.function]
            for index, keywords in enumerate(request.calls):
                connection.send(call(reward, keywords, request.rows[index] if request.rows else None))
