"""What goes into the engine and what comes out of it; joined, they are trajectories."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.trajectory import Trajectories


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be written, and how.

    Attributes:
      tokens: ids of the context, at least one.
      max_new_tokens: at least 1; context and new tokens together fit into the engine's `max_length`.
      temperature, top_p, top_k, min_p: as `sampling.logits.Sampling`.
      uid: what the draws depend on, beside the engine's key and the position; below 2³¹. None = a number in
        the order of submission.
      find_stop: given the new ids i32[n], how many of them to keep if something ends the completion
        there, else None. Asked between rounds. If it raises, the request fails and no other.
      keep: remember the context with the completion, for a request that continues it.
      deadline: seconds from submission after which the request ends with what it has.
      rules: state of the engine's rules for this row, in their order; () = they do nothing.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    uid: int | None = None
    find_stop: Callable[[np.ndarray], int | None] | None = None
    keep: bool = False
    deadline: float | None = None
    rules: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was written.

    Attributes:
      tokens: i32[n] new ids, a stop token among them.
      behaviour_logp, raw_logp, log_kept: f32[n] (nats), as `sampling.logits.Sampled`.
      policy_version: i32[n] of the params that wrote each token.
      reason: stop (a stop token or `find_stop`), length, cancelled, deadline, or failed. In a stream it is
        empty until the last piece.
      error: what went wrong if it failed.
    """

    tokens: np.ndarray
    behaviour_logp: np.ndarray
    raw_logp: np.ndarray
    log_kept: np.ndarray
    policy_version: np.ndarray
    reason: str
    error: str | None = None

    @property
    def finished(self) -> bool:
        """Whether the policy itself came to an end."""
        return self.reason == "stop"


class Ticket:
    """A request on its way.

    Attributes:
      request, number: what was submitted, and how many before it.
      deadline: when it ends at the latest, on the clock of `time.monotonic`.
      tokens: i32[n] the context that was given.
      pieces: by round, what was written: the arrays of a `Completion`, in order.
      cancelled: whether it is to end before the next round.
      future: of the completion.
      listener: is given what is new after each round, in the thread of the round; it must not raise.
    """

    def __init__(
        self,
        request: Request,
        number: int,
        deadline: float | None,
        listener: Callable[[Completion], None] | None = None,
    ):
        self.request, self.number, self.deadline = request, number, deadline
        self.listener, self.told = listener, 0
        self.tokens = np.asarray(request.tokens, np.int32)
        self.pieces: list[tuple[np.ndarray, ...]] = []
        self.cancelled = False
        self.future: concurrent.futures.Future[Completion] = concurrent.futures.Future()
        self.future.set_running_or_notify_cancel()  # it ends by `cancel` below alone

    @property
    def completion(self) -> Completion | None:
        """None until it is done."""
        return self.future.result() if self.future.done() else None

    @property
    def written(self) -> int:
        """Number of new tokens so far."""
        return sum(len(piece[0]) for piece in self.pieces)

    def new_tokens(self) -> np.ndarray:
        """i32[n] what was written so far."""
        return np.concatenate([np.zeros(0, np.int32), *(piece[0] for piece in self.pieces)])

    def context(self) -> np.ndarray:
        """i32[n] the context that was given and what was written so far."""
        return np.concatenate([self.tokens, self.new_tokens()])

    def cancel(self) -> None:
        """Ends the request with what it has, before the next round."""
        self.cancelled = True

    def report(self, reason: str = "", count: int | None = None, error: str | None = None) -> Completion:
        """Tells the listener what is new, and returns the first `count` tokens (None = all)."""
        empty = (np.zeros(0, np.int32), *(np.zeros(0, np.float32),) * 3, np.zeros(0, np.int32))
        tokens, behaviour, raw, kept, version = (np.concatenate(x)[:count] for x in zip(empty, *self.pieces))
        whole = Completion(tokens, behaviour, raw, kept, version, reason, error)
        if self.listener is not None:
            tokens, behaviour, raw, kept, version = (x[self.told :] for x in _arrays(whole))
            self.listener(Completion(tokens, behaviour, raw, kept, version, reason, error))
            self.told = len(whole.tokens)
        return whole

    def finish(self, reason: str, count: int | None = None, error: str | None = None) -> None:
        """Completes the request with its first `count` tokens (None = all)."""
        self.future.set_result(self.report(reason, count, error))


def trajectories(
    requests: Sequence[Request],
    completions: Sequence[Completion],
    *,
    group: Sequence[int],
    width: int | None = None,
) -> Trajectories:
    """Joins N contexts and what was written after them.

    Args:
      requests, completions: N each, in the same order.
      group: N numbers; rows of one group are compared with each other.
      width: T, columns of the result; None = as many as the longest row has.

    Returns:
      `Trajectories` of N rows: contexts are no actions and have policy_version -1.

    Raises:
      ValueError: no rows, numbers of rows that differ, or a width that is too small.
    """
    if not len(requests) == len(completions) == len(group) > 0:
        raise ValueError(
            f"{len(requests)} requests, {len(completions)} completions and {len(group)} groups: "
            "there must be as many of each, and at least one"
        )
    before = np.array([len(r.tokens) for r in requests], np.int32)
    lengths = before + np.array([len(c.tokens) for c in completions], np.int32)
    size = int(lengths.max()) if width is None else width
    if lengths.max() > size:
        raise ValueError(f"width={size} is less than the {lengths.max()} tokens of the longest row")
    tokens = np.zeros((len(requests), size), np.int32)
    behaviour, raw, kept = np.zeros((3, *tokens.shape), np.float32)
    version = np.full(tokens.shape, -1, np.int32)
    for row, (r, c) in enumerate(zip(requests, completions)):
        own = slice(before[row], lengths[row])
        tokens[row, : before[row]] = r.tokens
        for array, values in zip((tokens, behaviour, raw, kept, version), _arrays(c)):
            array[row, own] = values
    column = np.arange(size)
    return Trajectories(
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray(lengths),
        action_mask=jnp.asarray((column >= before[:, None]) & (column < lengths[:, None])),
        behaviour_logp=jnp.asarray(behaviour),
        raw_logp=jnp.asarray(raw),
        log_kept=jnp.asarray(kept),
        temperature=jnp.asarray([r.temperature for r in requests], jnp.float32),
        finished=jnp.asarray([c.finished for c in completions]),
        group=jnp.asarray(group, jnp.int32),
        policy_version=jnp.asarray(version),
    )


def _arrays(c: Completion) -> tuple[np.ndarray, ...]:
    return c.tokens, c.behaviour_logp, c.raw_logp, c.log_kept, c.policy_version
