"""An episode: one run of a workflow on one task. Workflows act through it, and it keeps what came of that."""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import numpy as np

from jaxrl_llm.data.chat import NotAppendOnly
from jaxrl_llm.data.tokenizers import Tokenizer
from jaxrl_llm.rollouts.conversation import Conversation, New, Turn
from jaxrl_llm.rollouts.deadlines import Late, call_tool, within
from jaxrl_llm.rollouts.engine import Engine
from jaxrl_llm.rollouts.requests import Completion, Request
from jaxrl_llm.rollouts.single_turn import stop_finder


@dataclasses.dataclass(frozen=True)
class Role:
    """A part that a model plays.

    Attributes:
      model: its name among the engines.
      max_new_tokens: of one reply, at most; less where the engine's `max_length` leaves less.
      temperature, top_p, top_k, min_p: as `sampling.logits.Sampling`.
      stop_strings: texts that end a reply (and stay in it).
      deadline: seconds after which a reply ends with what it has.
      keep: remember what was read and written, so that a next turn reads only what is new. Saves time; its
        figures then differ in the last bits, depending on whether the engine still remembers.
    """

    model: str
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_strings: tuple[str, ...] = ()
    deadline: float | None = None
    keep: bool = False


@dataclasses.dataclass(frozen=True)
class Cast:
    """What all episodes of a run share; the arguments of `run_workflows`."""

    engines: Mapping[str, Engine]
    roles: Mapping[str, Role]
    tokenizers: Mapping[str, Tokenizer]
    num_generations: int
    first_index: int
    max_calls: int
    fork: bool

    def check(self, episodes: int) -> None:
        """Raises a ValueError that names what does not fit together."""
        for name, role in self.roles.items():
            if role.model not in self.engines:
                raise ValueError(f"role {name!r}: no model {role.model!r}; one of {', '.join(self.engines)}")
            if role.stop_strings and role.model not in self.tokenizers:
                raise ValueError(f"role {name!r} has stop strings: give tokenizers[{role.model!r}]")
        if unknown := set(self.tokenizers) - set(self.engines):
            raise ValueError(f"tokenizers of {', '.join(sorted(unknown))}, but no such engine")
        if min(self.num_generations, self.max_calls) < 1:
            raise ValueError(
                f"num_generations={self.num_generations} and max_calls={self.max_calls} must be at least 1"
            )
        if episodes * len(self.roles) * self.max_calls > 2**31:
            raise ValueError(
                f"{episodes} episodes of {len(self.roles)} roles and max_calls={self.max_calls} need more "
                "than 2**31 numbers: lower max_calls"
            )

    def number(self, role: str) -> int:
        """Place of a role in `roles`."""
        return list(self.roles).index(role)

    def find_stop(self, role: Role) -> Callable[[np.ndarray], int | None] | None:
        """How the engine finds a role's stop strings, if it has any."""
        return stop_finder(self.tokenizers[role.model], role.stop_strings) if role.stop_strings else None

    def uid(self, index: int, role: str, call: int) -> int:
        """What a call's draws depend on: one number for each episode, role and call, below 2³¹."""
        of_role = (self.first_index + index) * len(self.roles) + self.number(role)
        return (of_role * self.max_calls + call) % 2**31


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a role has written.

    Attributes:
      role, call: who, and the number of the call among its calls in the episode.
      conversation, turn: where it stands.
    """

    role: str
    call: int
    conversation: Conversation
    turn: Turn

    @property
    def text(self) -> str:
        """Of the ids, special tokens left out; empty for a model without a tokenizer."""
        return self.turn.text

    @property
    def ids(self) -> list[int]:
        """As sampled, a stop token among them."""
        return self.turn.completion.tokens.tolist()

    @property
    def completion(self) -> Completion:
        """With log-probs, and why it ended."""
        return self.turn.completion


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a tool has returned, or why it has not.

    Attributes:
      tool: its name.
      value: None if it failed.
      error: what it raised; TimeoutError if it was late.
      seconds: how long it was waited for.
    """

    tool: str
    value: Any
    error: Exception | None
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether there is a value."""
        return self.error is None


class Dropped(Exception):
    """A workflow gave its task up."""


class GenerationFailed(RuntimeError):
    """The engine could not serve a request: its logits were NaN or infinite, for instance."""


class ContextFull(ValueError):
    """A conversation has no room for another token within the engine's `max_length`."""


class Episode:
    """One run of a workflow on one task: what the workflow acts through, and what remains of it.

    Attributes:
      task, index, prompt: the task, the number of this run among all, and that of its task.
      replies, tools: in the order in which they came.
      conversations: with the role of each.
      status: running; then done, dropped, deadline (of the task) or failed.
      value: what the workflow returned.
      error: why it did not come to its end.
      rewards: by (role, or None for all roles, and name), as given to `reward`.
      forks: how often a chat template made a conversation begin a new row.
    """

    def __init__(self, cast: Cast, task: Any, index: int):
        self.cast, self.task, self.index = cast, task, index
        self.prompt = index // cast.num_generations
        self.replies: list[Reply] = []
        self.tools: list[Outcome] = []
        self.conversations: list[tuple[str, Conversation]] = []
        self.status = "running"
        self.value: Any = None
        self.error: Exception | None = None
        self.rewards: dict[tuple[str | None, str], float] = {}
        self._calls: dict[str, set[int]] = {role: set() for role in cast.roles}
        self._busy: dict[Conversation, asyncio.Task[Completion]] = {}

    # --- what workflows call

    async def generate(
        self,
        role: str,
        new: New,
        *,
        after: Reply | None = None,
        call: int | None = None,
        rules: tuple[Any, ...] = (),
    ) -> Reply:
        """Lets a role read something and write a reply.

        Args:
          new: what it reads: messages, plain text, or token ids.
          after: the last reply of the conversation that goes on; None = a new one begins.
          call: number of the call, below `max_calls`; None = counted. Where branches of a workflow run
            beside each other and each calls the role several times, their order may depend on time: then
            numbers of your own make draws repeatable.
          rules: as `Request`.

        Raises:
          ContextFull: what it reads fills the engine's `max_length`.
          GenerationFailed: the engine failed to serve it.
          NotAppendOnly: the chat template rewrites earlier turns (without `fork`); this ends the whole run.
          ValueError: an unknown role, a reply that something follows already, a number that was given
            before, or as `Conversation.draft` and `Engine.submit`.
        """
        if self.status != "running":
            raise RuntimeError(f"episode {self.index} is over ({self.status})")
        call = self._number(role, call)
        conversation = self._conversation(role, after)
        draft = conversation.draft(new)
        part = self.cast.roles[role]
        engine = self.cast.engines[part.model]
        room = engine.max_length - len(draft.ids)
        if room < 1:
            raise ContextFull(
                f"{len(draft.ids)} tokens fill max_length={engine.max_length} of {part.model!r}"
            )
        request = Request(
            draft.ids,
            min(part.max_new_tokens, room),
            part.temperature,
            part.top_p,
            part.top_k,
            part.min_p,
            uid=self.cast.uid(self.index, role, call),
            find_stop=self.cast.find_stop(part),
            keep=part.keep,
            deadline=part.deadline,
            rules=rules,
        )
        self._busy[conversation] = asyncio.ensure_future(engine.complete(request))
        try:
            completion = await self._busy[conversation]
        finally:
            del self._busy[conversation]
        if completion.reason in ("failed", "cancelled"):
            raise GenerationFailed(completion.error or f"the request was {completion.reason}")
        if after is None:
            self.conversations.append((role, conversation))
        reply = Reply(role, call, conversation, conversation.commit(draft, completion))
        self.replies.append(reply)
        return reply

    async def call(
        self, tool: Callable[..., Any], *args: Any, timeout: float | None = 60.0, **kwargs: Any
    ) -> Outcome:
        """Calls a tool or an environment; what goes wrong is returned, not raised.

        Args:
          tool: a function, asynchronous or not; the latter runs in a thread of its own, which is left behind
            if it is late.
          timeout: seconds; None = as long as it takes.
        """
        name = getattr(tool, "__qualname__", type(tool).__name__)
        start = time.monotonic()
        value: Any = None
        error: Exception | None = None
        try:
            value = await within(call_tool(tool, *args, **kwargs), timeout)
        except Late:
            error = TimeoutError(f"{name} gave no answer within {timeout} seconds")
        except Exception as raised:
            error = raised
        outcome = Outcome(name, value, error, time.monotonic() - start)
        self.tools.append(outcome)
        return outcome

    def reward(
        self, value: float, *, of: str | Conversation | Reply | None = None, name: str = "reward"
    ) -> None:
        """Adds to a reward, now or after the run.

        Args:
          of: None = the episode: all its rows. A role: its rows. A conversation: its row. A reply: the turn,
            whose reward stands at its last token (`token_rewards`, without a name).

        Raises:
          ValueError: an unknown role.
        """
        if isinstance(of, Reply):
            of.turn.reward += value
        elif isinstance(of, Conversation):
            of.rewards[name] = of.rewards.get(name, 0.0) + value
        else:
            if of is not None:
                self._check_role(of)
            self.rewards[of, name] = self.rewards.get((of, name), 0.0) + value

    def drop(self, reason: str = "") -> None:
        """Gives the task up: none of its rows is trained on.

        Raises:
          Dropped: always; it ends the workflow.
        """
        raise Dropped(reason)

    # --- what is left of it

    @property
    def forks(self) -> int:
        """How often a conversation began a new row, because the chat template had rewritten earlier turns."""
        return sum(max(len(conversation.rows) - 1, 0) for _, conversation in self.conversations)

    def rewards_of(self, role: str, conversation: Conversation) -> dict[str, float]:
        """By name: the sum of what was given to the episode, to the role and to the conversation."""
        total = dict(conversation.rewards)
        for (of, name), value in self.rewards.items():
            if of in (None, role):
                total[name] = total.get(name, 0.0) + value
        return total

    async def play(
        self, workflow: Callable[[Any, "Episode"], Coroutine[Any, Any, Any]], deadline: float | None
    ) -> None:
        """Runs the workflow to its end, whatever that is.

        Raises:
          NotAppendOnly: a chat template cannot be used, for this task nor for others.
        """
        try:
            self.value = await within(workflow(self.task, self), deadline)
            self.status = "done"
        except Dropped as error:
            self.status, self.error = "dropped", error
        except Late:
            self.status = "deadline"
            self.error = TimeoutError(f"episode {self.index} was not done within {deadline} seconds")
        except NotAppendOnly:
            self.status = "failed"
            raise
        except Exception as error:
            self.status, self.error = "failed", error
        finally:
            for request in self._busy.values():  # of branches that nobody waits for any more
                request.cancel()

    def _check_role(self, role: str) -> None:
        if role not in self.cast.roles:
            raise ValueError(f"unknown role {role!r}; one of {', '.join(self.cast.roles)}")

    def _number(self, role: str, call: int | None) -> int:
        self._check_role(role)
        given = self._calls[role]
        number = len(given) if call is None else call
        if not 0 <= number < self.cast.max_calls:
            raise ValueError(f"call {number} of role {role!r} is beyond max_calls={self.cast.max_calls}")
        if number in given:
            raise ValueError(f"call {number} of role {role!r} was made before: number all calls, or none")
        given.add(number)
        return number

    def _conversation(self, role: str, after: Reply | None) -> Conversation:
        part = self.cast.roles[role]
        if after is None:
            return Conversation(
                role=self.cast.number(role),
                temperature=part.temperature,
                tokenizer=self.cast.tokenizers.get(part.model),
                fork=self.cast.fork,
            )
        if after.role != role:
            raise ValueError(f"role {role!r} cannot go on after a reply of {after.role!r}: begin anew")
        conversation = after.conversation
        if conversation in self._busy or conversation.turns[-1] is not after.turn:
            raise ValueError(f"something follows turn {after.turn.number} already: go on after the last one")
        return conversation
