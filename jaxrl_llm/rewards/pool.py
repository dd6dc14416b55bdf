"""Reward functions in worker processes, under a deadline: whatever one of them does, the step goes on.

    with RewardPool(["reasoning_gym", "my_rewards.py:brevity"], timeout=60) as pool:
        scores = pool.score(prompts, completions, completion_ids, columns)
        reward = combine(scores.values, {"reasoning_gym": 1.0, "brevity": 0.1})

One thread owns one worker process: it starts it, sends it work, kills it when it is late and starts another.
"""

import logging
import pickle
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.rewards.process import WorkerProcess
from jaxrl_llm.rewards.scores import Scores, Step, combine
from jaxrl_llm.rewards.specs import Batch, RewardSpec, arguments, resolve
from jaxrl_llm.rewards.worker import CRASHED, NOT_APPLICABLE, TIMEOUT, Reply, Request

__all__ = ["RewardPool", "Scores", "combine"]

_log = logging.getLogger(__name__)

_START = 300.0  # seconds that the imports of a worker may take
_PAUSES = (0.0, 0.5, 1.0)  # seconds before each attempt to start a worker


class _Job(NamedTuple):
    """Calls of one function, each for some rows of the step."""

    step: Step
    function: int
    groups: list[list[int]]


class _WorkerLost(Exception):
    """The worker has to be replaced."""


class RewardPool:
    """Reward functions in `workers` processes; a context manager that owns them.

    The workers start, and import what the functions need, in the background on construction. They never
    import jax or the program's main module by themselves. `score` may be called from several threads.

    Args:
      functions: names, paths or specs (see `jaxrl_llm.rewards.specs`).
      workers: number of processes.
      timeout: seconds that one `score` call may take, all functions and rows together.
      memory_gib: limit on the address space of each worker in GiB; None = no limit.

    Raises:
      ValueError: a function that cannot be had or has neither form; two functions of one name.
    """

    def __init__(
        self,
        functions: Sequence[str | Mapping[str, Any] | RewardSpec],
        *,
        workers: int = 2,
        timeout: float = 60.0,
        memory_gib: float | None = 4.0,
    ):
        if workers < 1 or timeout <= 0 or (memory_gib is not None and memory_gib <= 0):
            raise ValueError(
                f"workers, timeout and memory_gib must be positive: {workers}, {timeout}, {memory_gib}"
            )
        self.rewards = [resolve(function) for function in functions]
        names = [reward.name for reward in self.rewards]
        if not names or len(set(names)) != len(names):
            raise ValueError(
                f"reward functions need distinct names, got {names}: give a 'name' in the mapping"
            )
        self._timeout, self._memory_gib = timeout, memory_gib
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._started = threading.Condition()
        self._states = ["starting"] * workers  # then "started", or "broken" if it cannot be
        self._start_error = ""
        self._logged: set[tuple[int, str]] = set()
        self._lanes = [threading.Thread(target=self._lane, args=(i,), daemon=True) for i in range(workers)]
        for lane in self._lanes:
            lane.start()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def warm_up(self) -> None:
        """Wait until the workers have imported everything. `score` does this before its clock starts.

        Raises:
          RuntimeError: no worker can be started, or the pool is closed.
        """
        with self._started:
            self._started.wait_for(lambda: self._stop.is_set() or "starting" not in self._states)
            if self._stop.is_set():
                raise RuntimeError("the reward pool is closed")
            if set(self._states) == {"broken"}:
                raise RuntimeError(f"the reward workers cannot be started: {self._start_error}")

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Scores:
        """Score N completions by every function, in at most `timeout` seconds.

        A function in TRL's form is called once for all rows. If that call fails, or is not back after half
        of the time left, its rows are scored by calls of one row each, so that only the culprits lose
        their score. A row may then take its fair share of the time left, and an eighth of it in any case.
        Functions in verl's form start with single rows, spread over the workers.

        Args:
          prompts: N prompts, strings or lists of messages.
          completions: N texts.
          completion_ids: N sequences of token ids.
          columns: the other columns of the data, N values each.

        Raises:
          ValueError: lengths differ.
          RuntimeError: no worker can be started, or the pool is closed.
        """
        size = len(completions)
        lengths = {"prompts": len(prompts), "completion_ids": len(completion_ids)}
        lengths |= {name: len(column) for name, column in columns.items()}
        if wrong := {name: length for name, length in lengths.items() if length != size}:
            raise ValueError(f"there are {size} completions, but the lengths of others are {wrong}")
        self.warm_up()
        step = Step(self.rewards, Batch(prompts, completions, completion_ids, columns), self._timeout)
        if size:
            for function, reward in enumerate(self.rewards):
                if not reward.per_row:
                    self._jobs.put(_Job(step, function, [list(range(size))]))
            for function, reward in enumerate(self.rewards):
                if reward.per_row:
                    self._put_rows(step, function, range(size))
            while not self._stop.is_set() and (left := step.deadline - time.monotonic()) > 0:
                if step.over.wait(min(left, 0.5)):
                    break
        step.close()
        if step.error is not None:
            raise step.error
        return self._scores(step)

    def close(self) -> None:
        """End all workers and everything they started. Calls under way return what they have."""
        with self._started:
            self._stop.set()
            self._started.notify_all()
        for _ in self._lanes:
            self._jobs.put(None)
        for lane in self._lanes:
            lane.join()

    def _scores(self, step: Step) -> Scores:
        failures: dict[str, dict[str, int]] = {}
        failed = np.zeros(step.values.shape[1], bool)
        for function, reward in enumerate(self.rewards):
            counts = failures[reward.name] = {}
            for row, reason in enumerate(step.reasons[function]):
                if reason is not None:
                    counts[reason] = counts.get(reason, 0) + 1
                    failed[row] |= reason != NOT_APPLICABLE
            for reason, count in counts.items():
                if reason != NOT_APPLICABLE and (function, reason) not in self._logged:
                    self._logged.add((function, reason))
                    detail = step.details.get((function, reason), "")
                    message = "reward %r: %s for %d of %d completions (from now on only counted). %s"
                    _log.warning(message, reward.name, reason, count, len(failed), detail)
        values = {reward.name: step.values[function] for function, reward in enumerate(self.rewards)}
        return Scores(values, failures, failed)

    def _put_rows(self, step: Step, function: int, rows: Sequence[int]) -> None:
        """Ask for one call per row, in pieces small enough for the workers to share evenly."""
        piece = -(-len(rows) // (4 * len(self._lanes)))
        for start in range(0, len(rows), piece):
            self._jobs.put(_Job(step, function, [[row] for row in rows[start : start + piece]]))

    def _lane(self, lane: int) -> None:
        """Thread: own one worker at a time and pass jobs to it."""
        while (worker := self._start_worker()) is not None:
            self._set_state(lane, "started")
            try:
                while (job := self._jobs.get()) is not None and not self._stop.is_set():
                    if not worker.alive():  # it ended after its last answer: not the fault of this job
                        self._jobs.put(job)
                        raise _WorkerLost
                    self._run(worker, job)
            except _WorkerLost:
                continue
            finally:
                worker.kill()
            return
        self._set_state(lane, "broken")

    def _set_state(self, lane: int, state: str) -> None:
        with self._started:
            self._states[lane] = state
            self._started.notify_all()

    def _start_worker(self) -> WorkerProcess | None:
        """A worker that is ready, or None if the pool is closed or none can be started."""
        for pause in _PAUSES:
            if self._stop.wait(pause):
                break
            worker = None
            try:
                worker = WorkerProcess()
                worker.send(pickle.dumps(([reward.spec for reward in self.rewards], self._memory_gib)))
                error = worker.receive(time.monotonic() + _START, self._stop)
                if error is None:
                    return worker
            except Exception as failure:
                error = f"{type(failure).__name__} {failure} before it was ready; is memory_gib too small?"
            if worker is not None:
                worker.kill()
            self._start_error = error
        return None

    def _run(self, worker: WorkerProcess, job: _Job) -> None:
        """Have a job done and record its results. Raises _WorkerLost if that costs the worker."""
        step, function, groups = job
        if step.over.is_set():
            return
        reward = self.rewards[function]
        try:
            calls = [arguments(reward, step.batch, rows) for rows in groups]
            request = Request(function, calls, None if reward.per_row else [len(rows) for rows in groups])
            message = pickle.dumps(request)
        except Exception as error:  # the data's fault, for the caller of `score`
            step.close(error)
            return
        try:
            worker.send(message)
        except OSError as error:
            self._jobs.put(job)
            raise _WorkerLost from error
        for index, rows in enumerate(groups):
            try:
                reply = worker.receive(self._until(step, len(rows), len(groups) - index), self._stop)
            except TimeoutError:
                reply = Reply(None, TIMEOUT, "it took too long")
            except Exception:  # the end of the process, or garbage on the socket
                reply = Reply(None, CRASHED, f"its process ended with status {worker.process.poll()}")
            self._settle(job, rows, reply)
            if reply.reason in (TIMEOUT, CRASHED):
                if groups[index + 1 :]:
                    self._jobs.put(_Job(step, function, groups[index + 1 :]))
                raise _WorkerLost

    def _until(self, step: Step, rows: int, calls: int) -> float:
        """When the first of `calls` waiting calls, for `rows` rows, has to be back if it starts now."""
        now = time.monotonic()
        left = step.deadline - now
        share = 0.5 if rows > 1 else max(1 / 8, min(1 / calls, len(self._lanes) / max(1, step.pending)))
        return now + left * share

    def _settle(self, job: _Job, rows: list[int], reply: Reply) -> None:
        """Record the scores of a call; if it failed, take its rows one by one."""
        if reply.scores is not None:
            for row, (value, reason) in zip(rows, reply.scores):
                job.step.record(job.function, row, value, reason, reply.detail)
        elif len(rows) > 1:
            self._put_rows(job.step, job.function, rows)
        else:
            job.step.record(job.function, rows[0], np.nan, reply.reason, reply.detail)
