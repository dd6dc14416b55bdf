"""Conversations as token ids: what a policy reads and writes, turn after turn, in one row.

    row     prompt ...  reply 0 ... $  end of turn, tool's answer, header ...  reply 1 ... $
    turn    0           0              1                                       1
    action  no          yes            no                                      yes

Only what is new is ever encoded; what the policy wrote stays as it was sampled.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeAlias, cast

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.data.chat import Message, NotAppendOnly, Text
from jaxrl_llm.data.tokenizers import Tokenizer
from jaxrl_llm.rollouts.requests import Completion
from jaxrl_llm.trajectory import Trajectories

New: TypeAlias = Text | Sequence[int] | np.ndarray
"""What a policy is to read: messages, plain text, or token ids."""


@dataclasses.dataclass
class Turn:
    """What a policy wrote at one go.

    Attributes:
      number: within the conversation, from 0.
      start: place of its first token in the row.
      completion: its tokens and what is known of them.
      text: of its tokens, special ones left out; empty without a tokenizer.
      reward: of this turn alone.
    """

    number: int
    start: int
    completion: Completion
    text: str = ""
    reward: float = 0.0

    @property
    def end(self) -> int:
        """Place after its last token in the row."""
        return self.start + len(self.completion.tokens)


@dataclasses.dataclass
class Row:
    """Token ids in the order in which the model saw them, and which of them it wrote itself."""

    ids: list[int]
    turns: list[Turn] = dataclasses.field(default_factory=list)

    @property
    def written(self) -> list[Turn]:
        """Turns that have a token at least: a deadline may leave one without."""
        return [turn for turn in self.turns if len(turn.completion.tokens)]


@dataclasses.dataclass(frozen=True)
class Draft:
    """What a policy reads before its next turn.

    Attributes:
      ids: of all the row up to there.
      messages: the conversation up to there; None = it is more than messages.
      is_row: whether a new row begins with it.
    """

    ids: list[int]
    messages: list[Message] | None
    is_row: bool


class Conversation:
    """One conversation of one role.

    Args:
      role: number of the role.
      temperature: at which all of it is sampled.
      tokenizer: of the model; None = token ids are all that it is given.
      fork: what becomes of it when the chat template renders earlier turns in another way: False = an error,
        True = a new row begins with the prompt as it is rendered then.

    Attributes:
      rows: one, and one more for every fork.
      rewards: by name, of the conversation as a whole.
    """

    def __init__(
        self,
        *,
        role: int = 0,
        temperature: float = 1.0,
        tokenizer: Tokenizer | None = None,
        fork: bool = False,
    ):
        self.role, self.temperature, self.tokenizer, self.fork = role, temperature, tokenizer, fork
        self.rows: list[Row] = []
        self.messages: list[Message] | None = None
        self.rewards: dict[str, float] = {}

    @property
    def turns(self) -> list[Turn]:
        """Of all rows, in order."""
        return [turn for row in self.rows for turn in row.turns]

    def draft(self, new: New) -> Draft:
        """What the policy reads if `new` comes next: nothing is changed yet.

        Raises:
          NotAppendOnly: the chat template changes what was there before, and `fork` is False.
          ValueError: nothing to begin with, no tokenizer for a text, or messages after something that is
            none.
        """
        if isinstance(new, str):
            if not self.rows:
                return Draft(self._tokenizer().encode_prompt(new), None, True)
            return Draft(self.rows[-1].ids + self._tokenizer().encode(new), None, False)
        is_chat = isinstance(new[0], Mapping) if len(new) else self.messages is not None
        if is_chat:
            return self._draft_messages(cast(Sequence[Message], new))
        ids = [int(i) for i in cast(Sequence[int], new)]
        if not self.rows and not ids:
            raise ValueError("nothing to begin a conversation with: give messages, a text or token ids")
        return Draft(self.rows[-1].ids + ids if self.rows else ids, None, not self.rows)

    def _draft_messages(self, more: Sequence[Message]) -> Draft:
        tokenizer = self._tokenizer()
        if not self.rows:
            return Draft(tokenizer.encode_chat(more), [*more], True)
        if self.messages is None:
            raise ValueError(
                "messages cannot follow plain text or token ids: no chat template knows what is there. Give "
                "text or ids again, or messages from the beginning"
            )
        row = self.rows[-1]
        *messages, reply = self.messages
        both = [*self.messages, *more]
        try:
            ids = tokenizer.encode_next(messages, reply["content"], more)
        except NotAppendOnly:
            if not self.fork:
                raise
            return Draft(tokenizer.encode_chat(both), both, True)
        # A reply that ended by itself has written the end of its turn already.
        ended = row.turns[-1].completion.tokens[-1:].tolist()
        if ended and ended == ids[:1] and ended[0] in tokenizer.eos_ids:
            ids = ids[1:]
        return Draft(row.ids + ids, both, False)

    def commit(self, draft: Draft, completion: Completion) -> Turn:
        """Adds what was drafted, and what the policy wrote after it."""
        ids = completion.tokens.tolist()
        text = self.tokenizer.decode(ids) if self.tokenizer else ""
        turn = Turn(len(self.turns), len(draft.ids), completion, text)
        if draft.is_row:
            self.rows.append(Row([]))
        self.rows[-1].ids = draft.ids + ids
        self.rows[-1].turns.append(turn)
        self.messages = None
        if draft.messages is not None:
            self.messages = [*draft.messages, {"role": "assistant", "content": text}]
        return turn

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("messages and text need the model's tokenizer: name it, or give token ids")
        return self.tokenizer


def stack(
    rows: Sequence[tuple[Conversation, Row]],
    *,
    group: Sequence[int],
    rewards: Sequence[Mapping[str, float]],
    width: int,
) -> Trajectories:
    """Joins N rows. Each ends with the last token that its policy wrote: it has read nothing after that.

    Args:
      rows: with the conversation of each; the policy has written something in every one.
      group: N numbers; rows of one group are compared with each other.
      rewards: of each row, by name; where a name is missing there is NaN.
      width: T, columns of the result.

    Returns:
      `Trajectories`. Rewards of turns are `token_rewards` at their last tokens. A token that was read has the
      turn that it led to, and policy_version -1.

    Raises:
      ValueError: a row that is longer than `width`.
    """
    lengths = np.array([row.written[-1].end for _, row in rows], np.int32)
    if len(rows) and lengths.max() > width:
        raise ValueError(f"a row of {lengths.max()} tokens does not fit into width={width}")
    shape = len(rows), width
    tokens, turns = np.zeros((2, *shape), np.int32)
    version = np.full(shape, -1, np.int32)
    action = np.zeros(shape, bool)
    behaviour, raw, kept, token_rewards = np.zeros((4, *shape), np.float32)
    for n, (_, row) in enumerate(rows):
        tokens[n, : lengths[n]] = row.ids[: lengths[n]]
        read = 0
        for turn in row.written:
            own, c = slice(turn.start, turn.end), turn.completion
            turns[n, read : turn.end] = turn.number
            read = turn.end
            action[n, own] = True
            behaviour[n, own], raw[n, own], kept[n, own] = c.behaviour_logp, c.raw_logp, c.log_kept
            version[n, own] = c.policy_version
            token_rewards[n, turn.end - 1] = turn.reward
    names = sorted({name for given in rewards for name in given})
    return Trajectories(
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray(lengths),
        action_mask=jnp.asarray(action),
        behaviour_logp=jnp.asarray(behaviour),
        raw_logp=jnp.asarray(raw),
        log_kept=jnp.asarray(kept),
        temperature=jnp.asarray([c.temperature for c, _ in rows], jnp.float32),
        finished=jnp.asarray([row.turns[-1].completion.finished for _, row in rows], bool),
        group=jnp.asarray(group, jnp.int32),
        rewards={
            name: jnp.asarray([given.get(name, np.nan) for given in rewards], jnp.float32) for name in names
        },
        token_rewards=jnp.asarray(token_rewards),
        policy_version=jnp.asarray(version),
        turn=jnp.asarray(turns),
        role=jnp.asarray([c.role for c, _ in rows], jnp.int32),
    )
