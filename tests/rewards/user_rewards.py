"""Reward functions that do as the completion says, for the tests of the pool. Loaded by path."""

import asyncio
import os
import subprocess
import sys
import threading
import time

import numpy as np


def act(text):
    """The score that `text` names, or the misbehaviour."""
    order, _, argument = text.partition(":")
    if order == "score":
        return float(argument)
    if order == "slow":
        time.sleep(float(argument))
        return 1.0
    if order == "sleep":
        time.sleep(1e6)
    if order == "raise":
        raise ValueError("told to")
    if order == "unpicklable":
        raise type("Strange", (Exception,), {"__init__": lambda self, a, b: None})(1, 2)
    if order == "sysexit":
        sys.exit(1)
    if order == "exit":
        os._exit(3)
    if order == "allocate":
        hoard = []
        while True:
            hoard.append(np.empty(2**26, np.uint8))  # address space alone: untouched memory costs no time
    if order == "family":
        start_family(argument)
        time.sleep(1e6)
    if order == "orphans":
        start_family(argument)
        os._exit(0)
    if order == "fork_back":
        os.fork()  # both processes return
        return 7.0
    if order == "die_later":
        threading.Timer(0.1, os._exit, (0,)).start()
        return 1.0
    if order == "jax":
        return float("jax" in sys.modules)
    return {
        "none": None,
        "nan": float("nan"),
        "inf": float("inf"),
        "huge": 1e300,
        "string": "1.0",
        "list": [1.0],
        "float32": np.float32(2.5),
        "int64": np.int64(3),
        "array0d": np.array(4.0),
        "bool": np.bool_(True),
    }[order]


def start_family(path):
    """A forked child, a child in a session of its own, and a daemon; their ids go to `path`."""
    command = [sys.executable, "-c", "import time; time.sleep(1e6)"]
    pids = [subprocess.Popen(command, start_new_session=True).pid]
    child = os.fork()
    if child == 0:
        time.sleep(1e6)
    pids.append(child)
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        daemon = os.fork()
        if daemon == 0:
            time.sleep(1e6)
        os.write(writer, str(daemon).encode())
        os._exit(0)
    pids.append(int(os.read(reader, 20)))
    with open(path, "w") as file:
        file.write(" ".join(map(str, pids)))


def by_batch(completions, **columns):
    if "count" in completions:
        return [act(text) for text in completions if text != "count"]
    return [act(text) for text in completions]


def by_row(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": act(solution_str), "note": "verl's dict"}


def bare_row(solution_str):
    return act(solution_str)


async def async_batch(prompts, completions, completion_ids, **columns):
    await asyncio.sleep(0.001)
    return [float(len(ids)) for ids in completion_ids]


async def async_row(data_source, solution_str, ground_truth, extra_info=None):
    await asyncio.sleep(0.001)
    return float(solution_str == ground_truth)


def as_array(completions):
    return np.arange(len(completions), dtype=np.float32)


def scaled(completions, factor, offset=0.0):
    return [factor * float(text) + offset for text in completions]


def neither(a, b):
    return 0.0


def both(completions, solution_str):
    return 0.0


not_a_function = 3
