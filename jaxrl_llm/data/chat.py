"""Conversations: their type, the template of tokenizers that bring none, and how a conversation goes on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, Any]
"""One turn of a conversation: `{"role": ..., "content": ...}`."""

Text: TypeAlias = str | Sequence[Message]
"""Plain text, or a conversation."""

ROLES = ("system", "user", "assistant", "tool")
PAD, END = "<|pad|>", "<|end|>"

# Used where a tokenizer brings no template of its own. Append-only: what is rendered once never changes
# when the conversation grows, so a sampled reply can be continued without encoding it again.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{% if message['role'] not in {list(ROLES)} %}}"
    "{{ raise_exception('unknown role ' + message['role'] + '; one of " + ", ".join(ROLES) + "') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '" + END + "' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def as_reply(prompt: Text, completion: Text) -> Text:
    """`completion` in the form of `prompt`: a string for a string, messages for a conversation.

    Raises:
      ValueError: several messages for a plain prompt, or a reply not begun and ended by the assistant.
    """
    if not isinstance(completion, str):
        roles = [message["role"] for message in completion]
        if not roles or roles[0] != "assistant" or roles[-1] != "assistant":
            raise ValueError(f"a completion begins and ends with an assistant's message, got roles {roles}")
    if isinstance(prompt, str):
        if isinstance(completion, str):
            return completion
        if len(completion) > 1:
            raise ValueError(
                f"a completion of {len(completion)} messages needs a prompt that is a list of messages"
            )
        return str(completion[0]["content"])
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


class NotAppendOnly(ValueError):
    """A chat template renders what was there already in another way once the conversation goes on."""


def text_after_reply(
    render: Callable[[Sequence[Message], bool], str],
    messages: Sequence[Message],
    reply: str,
    more: Sequence[Message],
    *,
    template: str,
) -> str:
    """What stands between a reply and the next one: the end of its turn, `more`, and the next header.

    A policy has read the rendered `messages` and written `reply`. What it reads next may only be added to
    that. Blanks around the reply are of no account: the policy's own tokens stay, whatever is rendered.

    Args:
      render: (messages, whether the header of the next reply follows) -> text.
      messages: before the reply.  reply: text of the policy's tokens.  more: after it; may be empty.
      template: its name, for the error.

    Raises:
      NotAppendOnly: the template changes the messages, or the reply.
    """
    said = {"role": "assistant", "content": reply}
    asked = render(messages, True)
    answered = render([*messages, said], False)
    whole = render([*messages, said, *more], True)
    # What ends a turn is found behind a word that no template has a reason to change.
    word = "reply"
    marked = render([*messages, said | {"content": word}], False)
    for before, after in ((asked + word, marked), (asked, answered), (answered, whole)):
        if not after.startswith(before):
            _refuse(template, before, after)
    end = marked[len(asked + word) :]
    content = answered[len(asked) : len(answered) - len(end)]
    if not answered.endswith(end) or content.strip() != reply.strip():
        _refuse(template, asked + reply + end, answered)
    return end + whole[len(answered) :]


def _refuse(template: str, before: str, after: str) -> None:
    differs = (i for i, (x, y) in enumerate(zip(before, after)) if x != y)
    place = next(differs, min(len(before), len(after)))
    raise NotAppendOnly(
        f"the chat template of {template} is not append-only: from character {place} on, "
        f"{before[place : place + 40]!r} becomes {after[place : place + 40]!r} as the conversation goes on. "
        "What the policy has read and written cannot be continued as it is: use a template that leaves "
        "earlier turns alone, or fork=True (a new row begins with the prompt as it is rendered then)"
    )
