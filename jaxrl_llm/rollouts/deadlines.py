"""Users' coroutines and functions under deadlines: whatever they do, those who wait go on in time."""

import asyncio
import concurrent.futures
import contextlib
import inspect
import threading
from collections.abc import Callable, Coroutine
from typing import Any

GRACE = 1.0
"""Seconds that coroutines get to end in after they were cancelled, before their loop is closed on them."""


class Late(Exception):
    """The deadline has passed."""


async def within(work: Coroutine[Any, Any, Any], seconds: float | None) -> Any:
    """What `work` returns. It is cancelled at the deadline, and left behind if it ignores that.

    Raises:
      Late: it had no result in time.
      Exception: what it raised; RuntimeError if it left by sys.exit or cancelled itself.
    """

    async def guarded() -> Any:
        try:
            return await work
        except SystemExit as error:  # it would end the loop, and with it everything else
            raise RuntimeError(f"left by sys.exit({error.code!r})") from error

    task = asyncio.ensure_future(guarded())
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise Late(f"no result within {seconds} seconds")
        if task.cancelled():
            raise RuntimeError("it cancelled itself")
        return task.result()
    finally:
        task.cancel()


async def call_tool(tool: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function returns, asynchronous or not. One that is not runs in a thread of its own.

    The thread is a daemon: if it hangs, it holds up neither a pool nor the end of the process.
    """
    if inspect.iscoroutinefunction(tool) or inspect.iscoroutinefunction(type(tool).__call__):
        return await tool(*args, **kwargs)
    loop = asyncio.get_running_loop()
    future: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if not future.done():
            future.set_result((value, error))

    def work() -> None:
        value, error = None, None
        try:
            value = tool(*args, **kwargs)
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it any more
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=work, daemon=True).start()
    value, error = await future
    if error is not None:
        raise error
    return await value if inspect.isawaitable(value) else value


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine to its end in a loop of its own; beside a running one (a notebook's), in a thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run(main)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(_run, main).result()


def _run(main: Coroutine[Any, Any, Any]) -> Any:
    # asyncio.run would wait forever for a coroutine that ignores being cancelled, or a thread that hangs.
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(main)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=GRACE))
        loop.close()
