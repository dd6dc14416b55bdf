"""Conversations: their type, and the template of tokenizers that bring none."""

from collections.abc import Mapping, Sequence
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
