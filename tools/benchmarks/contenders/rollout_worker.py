"""What the contenders of the rollout benchmark share: how a request is read, timed and checked.

    driver     {"prompts": [[17, 3, …], …], "num_generations": 8, "new_tokens": [128, …], "rows": 16,
                "temperature": 1.0, "top_p": 0.95, "seed": 4}
    contender  {"seconds": 0.83, "tokens": 2048}

Each prompt is continued by `num_generations` rows, and each row by its own number of new tokens. `rows` are
decoded together; null is a queue, of which each library takes as many at a time as it is fastest with. With
`decode_alone` the same is timed once more for one new token per row and subtracted, which leaves the steps.
Imports the standard library alone, because it runs inside other libraries' environments.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import worker

Completions = Sequence[Sequence[int]]
"""New tokens of each row."""


class Wanted(NamedTuple):
    """What is to be written.

    Attributes:
      prompts: of each row, the rows of a group next to each other and all as long.
      num_generations: rows in a group.
      new_tokens: of each row, how many.
      rows: decoded together.
      room: tokens of prompt and completion that the longest row of the case comes to.
      temperature, top_p, seed: of the draws.
    """

    prompts: list[list[int]]
    num_generations: int
    new_tokens: list[int]
    rows: int
    room: int
    temperature: float
    top_p: float
    seed: int


class Contender(Protocol):
    """One library.

    Attributes:
      about: what the driver is told first.
      queue_rows: how many rows of a queue it decodes together.
    """

    about: dict[str, Any]
    queue_rows: int

    def plan(self, wanted: Wanted) -> Callable[[], Completions]:
        """What is done before the clock starts; the call that is timed."""


def read(request: Mapping[str, Any], queue_rows: int) -> Wanted:
    """What a request wants."""
    count = request["num_generations"]
    prompts = [prompt for prompt in request["prompts"] for _ in range(count)]
    return Wanted(
        prompts=prompts,
        num_generations=count,
        new_tokens=request["new_tokens"],
        rows=request["rows"] or queue_rows,
        room=max(map(len, prompts)) + max(request["new_tokens"]),
        temperature=request["temperature"],
        top_p=request["top_p"],
        seed=request["seed"],
    )


def one_token(wanted: Wanted) -> Wanted:
    """One new token per row, after other prompts of the same length: nothing that is remembered helps."""
    return wanted._replace(
        prompts=[prompt[::-1] for prompt in wanted.prompts], new_tokens=[1] * len(wanted.prompts)
    )


def in_batches(wanted: Wanted, generate: Callable[[slice, int], Completions]) -> Completions:
    """Rows in batches, in the order given, each of which goes on until its longest row is complete.

    Args:
      generate: (which rows, how many new tokens each) -> their completions.

    Returns:
      Completions without what a row wrote beyond its own length.
    """
    out: list[Sequence[int]] = []
    for begin in range(0, len(wanted.prompts), wanted.rows):
        part = slice(begin, begin + wanted.rows)
        lengths = wanted.new_tokens[part]
        out += [row[:n] for row, n in zip(generate(part, max(lengths)), lengths)]
    return out


def timed(contender: Contender, wanted: Wanted) -> float:
    """Seconds of one call.

    Raises:
      RuntimeError: a row is not as long as it should be.
    """
    call = contender.plan(wanted)
    start = time.perf_counter()
    completions = call()
    seconds = time.perf_counter() - start
    if (lengths := [len(row) for row in completions]) != wanted.new_tokens:
        raise RuntimeError(f"wanted rows of {wanted.new_tokens} new tokens and got {lengths}")
    return seconds


def answer(contender: Contender, request: Mapping[str, Any]) -> dict[str, Any]:
    """The reply to a request."""
    wanted = read(request, contender.queue_rows)
    seconds, tokens = timed(contender, wanted), sum(wanted.new_tokens)
    if not request.get("decode_alone"):
        return {"seconds": seconds, "tokens": tokens}
    seconds -= timed(contender, one_token(wanted))
    steps = max(wanted.new_tokens) - 1
    return {
        "seconds": seconds,
        "tokens": tokens - len(wanted.prompts),
        "parts": {"each step": seconds / steps},
    }


def serve(make: Callable[[dict[str, Any]], Contender]) -> None:
    """Makes the contender of the task, and answers the driver until it closes the pipe.

    A request {"call": name, …} is answered by the contender's method of that name, given the rest.
    """
    channel, task = worker.Channel(), worker.task()
    contender = make(task)
    channel.send(contender.about)
    while (request := channel.receive()) is not None:
        if (name := request.pop("call", None)) is not None:
            channel.send(getattr(contender, name)(**request))
        else:
            channel.send(answer(contender, request))
