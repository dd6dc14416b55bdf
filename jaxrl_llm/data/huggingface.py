"""Tokenizers of the Hugging Face kind: from a folder, or built in (bytes, characters)."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxrl_llm.data.chat import CHAT_TEMPLATE, END, PAD, ROLES, Message, Text, as_reply, text_after_reply

# Ids that a text-only model may lack: Gemma 3's 1B has no row for the image placeholder of its family.
MEDIA = re.compile("image|audio|video", re.IGNORECASE)

# What decoders of tokens consist of that are bytes, or pieces with a mark in place of a space.
PLAIN_DECODERS = {"ByteLevel", "ByteFallback", "Replace", "Metaspace", "Fuse", "Strip", "Sequence"}


class HuggingFaceTokenizer:
    """A transformers fast tokenizer; also what the byte and character tokenizers are made of."""

    def __init__(self, fast: Any, *, generation_config: dict[str, Any] | None = None) -> None:
        """`fast`: a `PreTrainedTokenizerFast`. `generation_config`: its folder's, for further EOS ids."""
        self._fast = fast
        self._generation_config = generation_config or {}
        more = self._generation_config.get("eos_token_id", [])
        ids = [fast.eos_token_id, *(more if isinstance(more, list) else [more])]
        self._eos_ids = tuple(dict.fromkeys(int(i) for i in ids if i is not None))
        if not self._eos_ids:
            raise ValueError(
                "the tokenizer names no EOS token, so no completion could end: set eos_token in "
                "tokenizer_config.json or eos_token_id in generation_config.json"
            )
        special = set(fast.all_special_tokens)
        ids_of = {i: token for token, i in fast.get_vocab().items()}
        while (last := max(ids_of)) and ids_of[last] in special and MEDIA.search(ids_of[last]):
            del ids_of[last]
        self._vocab_size = last + 1

    @property
    def vocab_size(self) -> int:
        """1 + the largest id, placeholders of images, audio and video at the end not counted."""
        return self._vocab_size

    @property
    def pad_id(self) -> int:
        """The tokenizer's own, or the first EOS id where it has none."""
        return self._eos_ids[0] if self._fast.pad_token_id is None else int(self._fast.pad_token_id)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokenizer's EOS, then those of generation_config.json."""
        return self._eos_ids

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added. Text that spells a special token becomes it, as in transformers.

        Raises ValueError for a character that an alphabet lacks.
        """
        return self._encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens and ids beyond the vocabulary left out."""
        kept = [int(i) for i in ids]
        return self._fast.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def token_bytes(self) -> list[bytes | None]:
        """What each id writes, within a text; None where it is special or there is no such token.

        Raises:
          ValueError: a kind of tokenizer whose tokens are not simply the bytes they write.
        """
        decoder = json.dumps(json.loads(self._fast.backend_tokenizer.to_str())["decoder"])
        strange = set(re.findall('"type": "([A-Za-z]+)"', decoder)) - PLAIN_DECODERS
        if strange:
            raise ValueError(f"tokens of the kind {', '.join(sorted(strange))} have no bytes of their own")
        byte_of = {name: bytes([byte]) for byte, name in enumerate(_byte_names())}
        added = self._fast.added_tokens_decoder
        out: list[bytes | None] = [None] * self._vocab_size
        for token, i in self._fast.get_vocab().items():
            if i >= len(out) or token in self._fast.all_special_tokens or (i in added and added[i].special):
                continue
            if i in added:
                out[i] = token.encode()
            elif "ByteLevel" in decoder:
                out[i] = b"".join(byte_of[name] for name in token)
            elif "ByteFallback" in decoder and re.fullmatch("<0x[0-9A-F]{2}>", token):
                out[i] = bytes([int(token[3:5], 16)])
            else:
                out[i] = (token.replace("▁", " ") if "▁" in decoder else token).encode()
        return out

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the conversation and of the reply's header."""
        return self.encode(self._render(messages, generation_prompt=True))

    def encode_prompt(self, prompt: Text) -> list[int]:
        """Ids of a conversation, or of a string with whatever the tokenizer puts in front (BOS)."""
        if not isinstance(prompt, str):
            return self.encode_chat(prompt)
        ids = self._encode(prompt, add_special_tokens=True)
        # Some tokenizers also close what they encode; a prompt is to be continued.
        if ids[-1:] and ids[-1] in self.eos_ids and self.encode(prompt)[-1:] != ids[-1:]:
            ids.pop()
        return ids

    def encode_completion(self, prompt: Text, completion: Text) -> tuple[list[int], list[bool]]:
        """Ids after the prompt and which of them are the policy's.

        Raises:
          ValueError: a chat template that rewrites earlier turns, or a form that `as_reply` refuses.
        """
        reply = as_reply(prompt, completion)
        if isinstance(reply, str):
            ids = self.encode_prompt(prompt)
            start = len(ids)
            ids += self._continue(ids, self.encode_prompt(f"{prompt}{reply}"), reply)
            if ids[-1] not in self.eos_ids or len(ids) == start:
                ids.append(self.eos_ids[0])
            return ids[start:], [True] * (len(ids) - start)
        messages = [*prompt]
        steps = []  # the conversation as it grows, and whether the policy wrote what is new in it
        for message in reply:
            if message["role"] == "assistant":
                steps.append((self._render(messages, generation_prompt=True), False))
            messages.append(message)
            steps.append((self._render(messages, generation_prompt=False), message["role"] == "assistant"))
        rendered = steps[0][0]
        ids = self.encode(rendered)
        start, mask = len(ids), [False] * len(ids)
        for whole, spoken in steps[1:]:
            if not whole.startswith(rendered):
                raise ValueError(
                    "the chat template is not append-only: earlier text is rendered differently once "
                    "the conversation goes on, so training would show prompts that sampling never does"
                )
            piece = self._continue(ids, self.encode(whole), whole[len(rendered) :])
            written = 0
            if spoken:
                ends = [i + 1 for i, token in enumerate(piece) if token in self.eos_ids]
                if not ends:
                    piece.append(self.eos_ids[0])
                written = ends[-1] if ends else len(piece)
            ids += piece
            mask += [True] * written + [False] * (len(piece) - written)
            rendered = whole
        last = max(i for i, m in enumerate(mask) if m)
        return ids[start : last + 1], mask[start : last + 1]

    def encode_next(self, messages: Sequence[Message], reply: str, more: Sequence[Message]) -> list[int]:
        """Ids of what the template puts after a reply. Raises NotAppendOnly as `text_after_reply` does."""
        text = text_after_reply(
            lambda turns, header: self._render(turns, generation_prompt=header),
            messages,
            reply,
            more,
            template=repr(self._fast.name_or_path or type(self._fast).__name__),
        )
        return self._continue(self.encode(reply), self.encode(reply + text), text)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and its company, which `load("folder", ...)` and AutoTokenizer read."""
        os.makedirs(folder, exist_ok=True)
        self._fast.save_pretrained(os.fspath(folder))
        target = Path(folder) / "generation_config.json"
        if self._generation_config and not target.exists():
            target.write_text(json.dumps(self._generation_config, indent=2) + "\n")

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            return list(self._fast.encode(text, add_special_tokens=add_special_tokens))
        except Exception as error:  # the Rust library raises nothing narrower
            if "UNK" not in str(error):
                raise
            self._name_unknown(text)
            raise

    def _name_unknown(self, text: str) -> None:
        special = "|".join(map(re.escape, self._fast.all_special_tokens))
        blanked = re.sub(special, lambda found: "\0" * len(found[0]), text)
        vocab = self._fast.get_vocab()
        for position, character in enumerate(text):
            if blanked[position] != "\0" and character not in vocab:
                known = "".join(
                    token for token, _ in sorted(vocab.items(), key=lambda x: x[1]) if len(token) == 1
                )
                raise ValueError(
                    f"character {character!r} at position {position} of {text[:80]!r} is not in the "
                    f"tokenizer's alphabet {known!r}: add it there, or use the 'bytes' tokenizer"
                )

    def _render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        if self._fast.chat_template is None:
            raise ValueError(
                "the prompt is a list of messages and the tokenizer has no chat template: give prompts as "
                "strings, or put a chat_template.jinja into its folder"
            )
        from jinja2 import TemplateError

        try:
            return self._fast.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def _continue(self, prefix: list[int], joint: list[int], tail: str) -> list[int]:
        """Ids of `tail` after `prefix`, cut from the joint encoding unless that merges across the border."""
        return joint[len(prefix) :] if joint[: len(prefix)] == prefix else self.encode(tail)


def folder(path: str) -> HuggingFaceTokenizer:
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        raise FileNotFoundError(f"no tokenizer folder at {path!r}")
    try:
        fast = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"transformers finds no tokenizer that it can read in {path!r}: {error}") from error
    file = Path(path) / "generation_config.json"
    return HuggingFaceTokenizer(
        fast, generation_config=json.loads(file.read_text()) if file.is_file() else None
    )


def _built_in(backend: Any) -> HuggingFaceTokenizer:
    from transformers import PreTrainedTokenizerFast

    roles = [f"<|{role}|>" for role in ROLES]
    backend.add_special_tokens([PAD, END, *roles])
    return HuggingFaceTokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token=PAD,
            eos_token=END,
            additional_special_tokens=roles,
            chat_template=CHAT_TEMPLATE,
        )
    )


def _byte_names() -> list[str]:
    """GPT-2's alphabet: a printable character for every byte, those that print already for themselves."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def bytes_tokenizer() -> HuggingFaceTokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    names = {name: byte for byte, name in enumerate(_byte_names())}
    backend = Backend(models.BPE(vocab=names, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _built_in(backend)


def characters(alphabet: str) -> HuggingFaceTokenizer:
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    repeated = {c for c in alphabet if alphabet.count(c) > 1}
    if repeated:
        raise ValueError(f"the alphabet {alphabet!r} repeats {''.join(sorted(repeated))!r}")
    backend = Backend(models.WordLevel({c: i for i, c in enumerate(alphabet)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return _built_in(backend)
