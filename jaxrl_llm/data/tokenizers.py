"""Text to token ids and back, for people, prompts and supervised data; trajectories are never re-encoded."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from jaxrl_llm.data import huggingface, sentencepieces
from jaxrl_llm.data.chat import Message, Text
from jaxrl_llm.data.sentencepieces import train_sentencepiece as train_sentencepiece


class Tokenizer(Protocol):
    """What the library asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Rows that the model's embedding needs: 1 + the largest id."""

    @property
    def pad_id(self) -> int:
        """Id that fills unused positions; no mask is ever made from it."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a completion; the first is the one that plain completions are trained to end with."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added at either end."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens left out."""

    def token_bytes(self) -> list[bytes | None]:
        """What each id writes, in UTF-8; None where it is a special token or none at all."""

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to and including the header of the reply to come."""

    def encode_prompt(self, prompt: Text) -> list[int]:
        """Ids that the policy continues: a conversation by its template, a string as it is (after BOS)."""

    def encode_completion(self, prompt: Text, completion: Text) -> tuple[list[int], list[bool]]:
        """Ids that follow `encode_prompt(prompt)` in supervised data, and which are the policy's to write.

        The policy writes what assistants say and the token that ends it.
        """

    def encode_next(self, messages: Sequence[Message], reply: str, more: Sequence[Message]) -> list[int]:
        """Ids that a policy reads after its `reply` to `messages`: the end of its turn, `more`, a header.

        Raises NotAppendOnly if the template changes what was there before.
        """

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the files from which `load` makes the same tokenizer again."""


def load(kind: str, *, path: str = "", alphabet: str = "") -> Tokenizer:
    """A tokenizer.

    Args:
      kind: a key of `TOKENIZERS`: 'folder' (a Hugging Face folder), 'sentencepiece' (a .model file, or a
        folder with a tokenizer.model), 'bytes' (UTF-8: ids 0 to 255 and six special tokens), or 'characters'
        (one id per character of `alphabet`, in its order, and six special tokens).
      path: of 'folder' and 'sentencepiece'.
      alphabet: of 'characters'.

    Raises:
      ValueError: unknown kind, an argument that is missing or that the kind does not take, unreadable files.
      FileNotFoundError: there is nothing at `path`.
    """
    if kind not in TOKENIZERS:
        raise ValueError(f"unknown tokenizer kind {kind!r}; one of {', '.join(TOKENIZERS)}")
    build, wants = TOKENIZERS[kind]
    given = {"path": os.fspath(path), "alphabet": alphabet}
    for name, value in given.items():
        if value and name != wants:
            raise ValueError(f"tokenizer kind {kind!r} takes no {name}, got {value!r}")
        if not value and name == wants:
            raise ValueError(f"tokenizer kind {kind!r} needs {name}")
    return build(given[wants]) if wants else build()


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuses a tokenizer whose ids do not fit a model of `vocab_size` (V) embedding rows.

    Raises:
      ValueError: some id has no row. (More rows than ids is fine: models pad their vocabulary.)
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model's vocabulary {vocab_size} rows: "
            "this is not the tokenizer that the model was trained with, or tokens were added without "
            f"resizing the embedding to {tokenizer.vocab_size} rows"
        )


def check_mask(tokenizer: Tokenizer, mask_id: int) -> None:
    """Refuses a mask token that stands for something else in texts: what it hides could not be learned.

    Raises:
      ValueError: the tokenizer ends or pads with it, or writes text with it.
    """
    use = ""
    if mask_id in tokenizer.eos_ids:
        use = "it is an end of text"
    elif mask_id == tokenizer.pad_id:
        use = "it is the padding"
    elif text := tokenizer.decode([mask_id]):
        use = f"it writes {text!r}"
    if use:
        raise ValueError(
            f"mask_id={mask_id} is a token that the tokenizer uses: {use}. Take an id of its own, such as "
            f"{tokenizer.vocab_size}, the one after the tokenizer's last (model.mask_id=None of a config)"
        )


TOKENIZERS: dict[str, tuple[Callable[..., Tokenizer], str]] = {
    "folder": (huggingface.folder, "path"),
    "sentencepiece": (sentencepieces.load, "path"),
    "bytes": (huggingface.bytes_tokenizer, ""),
    "characters": (huggingface.characters, "alphabet"),
}
"""kind -> (what builds it, the argument that it needs)."""
