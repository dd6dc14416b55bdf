"""Workflows: what one or several roles do for a task, as coroutines that share the engines' batches.

    async def workflow(task, ctx):
        reply = await ctx.generate("solver", [{"role": "user", "content": task["question"]}])
        tool = await ctx.call(calculator, reply.text, timeout=2.0)
        content = str(tool.value) if tool.ok else f"error: {tool.error}"
        reply = await ctx.generate("solver", [{"role": "tool", "content": content}], after=reply)
        ctx.reward(float(reply.text == task["answer"]))

    roles = {"solver": Role("policy", max_new_tokens=64)}
    results = run_workflows(workflow, tasks, {"policy": engine}, roles, tokenizers={"policy": tokenizer})
    trajectories = results.trajectories()["policy"]

A call without `after` begins a conversation, and with it a row; one with `after` goes on in the same row.
What a call draws depends on the number of its episode, its role and its own number among the role's calls:
not on what else runs, nor on when. To the last bit this holds for roles that do not `keep` their contexts.
"""

import asyncio
import collections
import dataclasses
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeAlias

from jaxrl_llm.data.prompts import bucket_length, ladder
from jaxrl_llm.data.tokenizers import Tokenizer
from jaxrl_llm.rollouts.conversation import Conversation, Row, stack
from jaxrl_llm.rollouts.deadlines import run
from jaxrl_llm.rollouts.engine import Engine
from jaxrl_llm.rollouts.episode import (
    Cast,
    ContextFull,
    Dropped,
    Episode,
    GenerationFailed,
    Outcome,
    Reply,
    Role,
)
from jaxrl_llm.trajectory import Trajectories

__all__ = [
    "ContextFull",
    "Dropped",
    "Episode",
    "GenerationFailed",
    "Outcome",
    "Reply",
    "Results",
    "Role",
    "Workflow",
    "run_workflows",
]

Workflow: TypeAlias = Callable[[Any, Episode], Coroutine[Any, Any, Any]]


@dataclasses.dataclass(frozen=True)
class Results:
    """What a run leaves.

    Attributes:
      episodes: one for every task and generation, in order; G in a row belong to one task.
    """

    cast: Cast
    episodes: list[Episode]

    @property
    def counts(self) -> collections.Counter[str]:
        """How many episodes were done, dropped, …; replies ended how; tools answered or not; rows forked."""
        counts: collections.Counter[str] = collections.Counter()
        for episode in self.episodes:
            counts[f"episode/{episode.status}"] += 1
            counts["fork"] += episode.forks
            counts.update(f"reply/{reply.completion.reason}" for reply in episode.replies)
            counts.update(
                "tool/ok" if tool.ok else f"tool/{type(tool.error).__name__}" for tool in episode.tools
            )
        return counts

    def rows(self, model: str) -> list[tuple[Episode, str, Conversation, Row]]:
        """A model's rows with their episode, role and conversation, in the order of `trajectories`.

        Only those of episodes that are done, and in which the model has written something.
        """
        calls: dict[Conversation, int] = {}
        for episode in self.episodes:
            for reply in episode.replies:
                calls[reply.conversation] = min(reply.call, calls.get(reply.conversation, reply.call))
        rows = [
            (episode, role, conversation, row)
            for episode in self.episodes
            if episode.status == "done"
            for role, conversation in episode.conversations
            for row in conversation.rows
            if self.cast.roles[role].model == model and row.written
        ]
        return sorted(rows, key=lambda x: (x[0].index, x[2].role, calls[x[2]]))

    def trajectories(self, width: int | None = None) -> dict[str, Trajectories]:
        """By model, what there is to train on; rewards as given so far.

        Rows of one group are those of one role for one task.

        Args:
          width: T; None = the least of a few widths that holds all rows.
        """
        out = {}
        for model, engine in self.cast.engines.items():
            rows = self.rows(model)
            pairs = [(episode.prompt, conversation.role) for episode, _, conversation, _ in rows]
            groups = {pair: number for number, pair in enumerate(sorted(set(pairs)))}
            longest = max((row.written[-1].end for *_, row in rows), default=1)
            widths = ladder(engine.max_length, multiple_of=min(64, engine.max_length))
            out[model] = stack(
                [(conversation, row) for *_, conversation, row in rows],
                group=[groups[pair] for pair in pairs],
                rewards=[e.rewards_of(role, conversation) for e, role, conversation, _ in rows],
                width=bucket_length(longest, widths) if width is None else width,
            )
        return out


def run_workflows(
    workflow: Workflow,
    tasks: Sequence[Any],
    engines: Mapping[str, Engine],
    roles: Mapping[str, Role],
    *,
    tokenizers: Mapping[str, Tokenizer] | None = None,
    num_generations: int = 1,
    deadline: float | None = None,
    max_concurrent: int = 1024,
    first_index: int = 0,
    max_calls: int = 64,
    fork: bool = False,
) -> Results:
    """Runs a workflow on every task, many beside each other.

    Args:
      workflow: `async def workflow(task, ctx)`, with an `Episode` as `ctx`. It must not block; slow functions
        go through `ctx.call`.
      tasks: M of any kind.
      engines: by model; every model has its own.
      roles: by name, in an order that numbers them.
      tokenizers: by model; those without one read and write token ids alone.
      num_generations: G episodes per task; episode i·G + j is of task i.
      deadline: seconds that an episode has from its start.
      max_concurrent: episodes that run beside each other.
      first_index: number of the first episode; draws depend on it, so go on counting from run to run.
      max_calls: calls that a role makes in an episode, at most.
      fork: what happens when a chat template renders earlier turns in another way as a conversation goes on:
        False = an error, True = a new row begins.

    Returns:
      `Results`. Episodes that failed, were dropped or were late are recorded there, and their rows are not
      among the trajectories.

    Raises:
      ValueError: arguments that do not fit together.
      NotAppendOnly: the chat template of a model rewrites earlier turns, and `fork` is False.
    """
    cast = Cast(engines, roles, tokenizers or {}, num_generations, first_index, max_calls, fork)
    cast.check(len(tasks) * num_generations)
    if max_concurrent < 1:
        raise ValueError(f"max_concurrent={max_concurrent} must be at least 1")
    episodes = [Episode(cast, tasks[i // num_generations], i) for i in range(len(tasks) * num_generations)]
    left = iter(episodes)

    async def play() -> None:
        for episode in left:
            await episode.play(workflow, deadline)

    async def main() -> None:
        players = [asyncio.ensure_future(play()) for _ in range(min(max_concurrent, len(episodes)))]
        try:
            await asyncio.gather(*players)
        finally:
            for player in players:
                player.cancel()
            await _idle(engines)

    run(main())
    return Results(cast, episodes)


async def _idle(engines: Mapping[str, Engine]) -> None:
    """Returns when no round is under way, so that nothing of a run that ended early is left in the slots."""
    loop = asyncio.get_running_loop()
    movers = [engine.mover for engine in engines.values()]
    under_way = [mover for mover in movers if mover is not None and mover.get_loop() is loop]
    if under_way:
        await asyncio.wait(under_way)
