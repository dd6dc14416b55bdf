"""The text of tokens that arrive piece by piece."""

import codecs
from collections.abc import Sequence

from jaxrl_llm.data.tokenizers import Tokenizer


class TextStream:
    """Tokens in, text out: whatever is given out never changes with the tokens that follow.

    Held back until it is settled: the first bytes of a character, and what may be the beginning of a stop
    string. The pieces join to the text of all tokens, up to the stop string that was complete first.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []
        self._given = 0

    def push(self, ids: Sequence[int], *, last: bool) -> str:
        """Text that `ids` add. `last`: nothing follows, so nothing is held back."""
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self._stops if stop in text]
        _, cut = min(found, default=(0, len(text)))
        if not last and cut == len(text):
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
            cut = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        new = text[self._given : cut]
        self._given = max(self._given, cut)
        return new


class Offsets:
    """Where in the text each token begins, in characters, as if nothing had stopped it.

    A token that begins within a character begins where the character does.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = 0

    def push(self, written: bytes) -> int:
        """The offset of the next token, which writes these bytes."""
        self._at += len(self._decoder.decode(written[:1]))
        within = bool(self._decoder.getstate()[0])  # a character that has begun and not ended
        at = self._at - (bool(written) and not within)
        self._at += len(self._decoder.decode(written[1:]))
        return at


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)
