"""Sentencepiece models: reading one, and fitting a small one."""

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxrl_llm.data.chat import ROLES, Message, Text, as_reply

FILE = "tokenizer.model"


def train_sentencepiece(texts: Iterable[str], path: str | os.PathLike[str], *, vocab_size: int) -> None:
    """Fits a unigram model to `texts` and writes it to `path`. Deterministic.

    Every text survives encoding and decoding as it is, newlines and runs of spaces included; characters that
    were not seen fall back to their UTF-8 bytes. There are ids for padding and for each role of a chat.

    Args:
      texts: what to fit to; a few hundred lines are enough for a few hundred pieces.
      path: the .model file to write.
      vocab_size: pieces, at most (short texts give fewer); 256 bytes, 7 special tokens and every character
        that occurs must fit.

    Raises:
      ValueError: no text, or a `vocab_size` that is too small.
    """
    import sentencepiece

    texts = [text for text in texts if text]
    if not texts:
        raise ValueError("no text to fit a sentencepiece model to")
    needed = 256 + 3 + len(ROLES) + len(set("".join(texts)) | {"▁"})
    if vocab_size < needed:
        raise ValueError(
            f"vocab_size={vocab_size} is too small for these texts, which need {needed} pieces or more"
        )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        model_type="unigram",
        # Text must come back as it was: the defaults fold characters, spaces and newlines.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        byte_fallback=True,
        character_coverage=1.0,
        # Longer texts would be left out silently.
        max_sentence_length=max(len(text.encode()) for text in texts) + 1,
        # Control symbols have ids that no text encodes to.
        control_symbols=[_header(role) for role in ROLES],
        pad_id=2,
        eos_id=1,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    Path(path).write_bytes(model.getvalue())


class SentencePieceTokenizer:
    """A sentencepiece model under the library's own chat template: `<|role|>`, content, EOS per message.

    A role's header is its control symbol where the model has one and plain text where it has none.
    """

    def __init__(self, processor: Any) -> None:
        """`processor`: a `sentencepiece.SentencePieceProcessor`."""
        self._model = processor
        if processor.eos_id() < 0:
            raise ValueError(
                "the sentencepiece model has no EOS id, so no completion could end: train it with one"
            )
        headers = {role: processor.piece_to_id(_header(role)) for role in ROLES}
        self._headers = {
            role: [i] if processor.is_control(i) else processor.encode(_header(role))
            for role, i in headers.items()
        }

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return int(self._model.get_piece_size())

    @property
    def pad_id(self) -> int:
        """The model's own, or EOS where it has none."""
        return int(self._model.pad_id()) if self._model.pad_id() >= 0 else self.eos_ids[0]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The model's EOS."""
        return (int(self._model.eos_id()),)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added."""
        return list(self._model.encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, control symbols and ids beyond the vocabulary left out."""
        size = self.vocab_size
        return self._model.decode([int(i) for i in ids if 0 <= i < size])

    def token_bytes(self) -> list[bytes | None]:
        """What each id writes, within a text; None where it is a control symbol or unknown."""
        model = self._model
        out: list[bytes | None] = []
        for i in range(self.vocab_size):
            piece = model.id_to_piece(i)
            if model.is_byte(i):
                out.append(bytes([int(piece[3:5], 16)]))  # <0x0A>
            elif model.is_control(i) or model.is_unknown(i) or model.is_unused(i):
                out.append(None)
            else:
                out.append(piece.replace("▁", " ").encode())
        return out

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the conversation and of the reply's header."""
        ids = self._bos()
        for message in messages:
            ids += self._header_of(message) + self._content(message)
        return ids + self._headers["assistant"]

    def encode_prompt(self, prompt: Text) -> list[int]:
        """Ids of a conversation or of a string, after BOS where the model has one."""
        return self._bos() + self.encode(prompt) if isinstance(prompt, str) else self.encode_chat(prompt)

    def encode_completion(self, prompt: Text, completion: Text) -> tuple[list[int], list[bool]]:
        """Ids after the prompt and which of them are the policy's. Raises ValueError as `as_reply` does."""
        reply = as_reply(prompt, completion)
        if isinstance(reply, str):
            ids = [*self.encode(reply), self.eos_ids[0]]
            return ids, [True] * len(ids)
        ids, mask = [], []
        for index, message in enumerate(reply):
            header = self._header_of(message) if index else []  # the first one is part of the prompt
            content = self._content(message)
            ids += header + content
            mask += [False] * len(header) + [message["role"] == "assistant"] * len(content)
        return ids, mask

    def encode_next(self, messages: Sequence[Message], reply: str, more: Sequence[Message]) -> list[int]:
        """Ids of EOS, `more` and the next header: each message is encoded alone, so nothing else changes."""
        ids = [self.eos_ids[0]]
        for message in more:
            ids += self._header_of(message) + self._content(message)
        return ids + self._headers["assistant"]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.model; `load("sentencepiece", path=folder)` reads it."""
        os.makedirs(folder, exist_ok=True)
        (Path(folder) / FILE).write_bytes(self._model.serialized_model_proto())

    def _bos(self) -> list[int]:
        return [self._model.bos_id()] if self._model.bos_id() >= 0 else []

    def _content(self, message: Message) -> list[int]:
        return [*self.encode(message["content"]), self.eos_ids[0]]

    def _header_of(self, message: Message) -> list[int]:
        if message["role"] not in self._headers:
            raise ValueError(f"unknown role {message['role']!r}; one of {', '.join(ROLES)}")
        return list(self._headers[message["role"]])


def load(path: str) -> SentencePieceTokenizer:
    """Reads a .model file, or the tokenizer.model of a folder."""
    import sentencepiece

    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no sentencepiece model at {os.fspath(file)!r}")
    try:
        return SentencePieceTokenizer(sentencepiece.SentencePieceProcessor(model_file=os.fspath(file)))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{os.fspath(file)!r} is not a sentencepiece model: {error}") from error


def _header(role: str) -> str:
    return f"<|{role}|>"
