"""What reward functions said of a batch, and the one reward that it amounts to."""

import dataclasses
import threading
import time
from collections.abc import Mapping, Sequence

import numpy as np

from jaxrl_llm.rewards.specs import Batch, Reward
from jaxrl_llm.rewards.worker import TIMEOUT


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the reward functions said of N completions.

    Attributes:
      values: per function, f32[N]; NaN = not applicable or failed.
      failures: per function, how many rows have no score, by reason: the constants of `worker`
        ("timeout", "crashed", "out_of_memory", "wrong_count", "bad_value", "nonfinite",
        "raised_<exception>"), and "not_applicable" for a None, which is no fault.
      failed: bool[N], True where some function failed (rather than did not apply).
    """

    values: dict[str, np.ndarray]
    failures: dict[str, dict[str, int]]
    failed: np.ndarray


def combine(values: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Weighted sum over the functions that apply to a row; NaN where none does.

    Args:
      values: per function, f32[N] with NaN = not applicable.
      weights: a weight for each function of `values`.

    Returns:
      f32[N].

    Raises:
      ValueError: no functions, or the names differ.
    """
    if not values or set(values) != set(weights):
        raise ValueError(
            f"the rewards are {sorted(values)} and the weights {sorted(weights)}: give one weight each"
        )
    stacked = np.stack([np.asarray(values[name], np.float64) for name in values])
    applies = ~np.isnan(stacked)
    factors = np.array([weights[name] for name in values], np.float64)[:, None]
    total = np.sum(np.where(applies, stacked, 0.0) * factors, axis=0)
    return np.where(np.any(applies, axis=0), total, np.nan).astype(np.float32)


class Step:
    """One `score` call: its data, its deadline, and the results so far (under a lock)."""

    def __init__(self, rewards: Sequence[Reward], batch: Batch, timeout: float):
        self.batch, self.deadline = batch, time.monotonic() + timeout
        self.values = np.full((len(rewards), len(batch.completions)), np.nan, np.float32)
        self.reasons: list[list[str | None]] = [[TIMEOUT] * len(batch.completions) for _ in rewards]
        self.pending = self.values.size
        self.details: dict[tuple[int, str], str] = {}
        self.error: BaseException | None = None
        self.over = threading.Event()
        self._lock = threading.Lock()

    def record(self, function: int, row: int, value: float, reason: str | None, detail: str) -> None:
        """The score of a row, or NaN and why there is none. Ignored when the step is over."""
        with self._lock:
            if self.over.is_set():
                return
            self.values[function, row], self.reasons[function][row] = value, reason
            if reason is not None:
                self.details.setdefault((function, reason), detail)
            self.pending -= 1
            if self.pending == 0:
                self.over.set()

    def close(self, error: BaseException | None = None) -> None:
        """Nothing changes from here on. `error`: what the caller is to be told."""
        with self._lock:
            self.error = self.error or error
            self.over.set()
