"""What every contender shares: one process per contender, one line of JSON per request, and the toy task.

The driver starts `python contenders/<name>.py '<task>'` with the contender's own interpreter. The contender
loads the model, sends `{"versions": …, "logits": …}`, and then answers each request with the time it took:

    driver     {"prompts": [[17, 3, …], …], "num_generations": 8, "temperature": 1.0, "seed": 4, …}
    contender  {"seconds": 0.83, "tokens": 2048}

Imports the standard library alone, because it runs inside other libraries' environments.
"""

import importlib.metadata
import json
import os
import sys
from typing import Any


class Channel:
    """The contender's end of the pipe. Whatever the libraries print goes to stderr, which the driver logs."""

    def __init__(self) -> None:
        self._replies = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def send(self, reply: dict[str, Any]) -> None:
        """One reply to the driver."""
        self._replies.write(json.dumps(reply) + "\n")

    def receive(self) -> dict[str, Any] | None:
        """The next request, or None when the driver has closed the pipe."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None


def task() -> dict[str, Any]:
    """What is to be measured: the benchmark's own sizes and, where there is a toy model, `model` (a Hugging
    Face folder), `config` (its config.json) and `prompts` (the logits f32[V] after the first are sent first,
    to compare the models)."""
    return json.loads(sys.argv[1])


def versions(*distributions: str) -> dict[str, str]:
    """Installed version of each distribution."""
    return {name: importlib.metadata.version(name) for name in distributions}


def even_share(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
    """The reward: each completion's share of even token ids. Deterministic and almost free."""
    return [sum(1 - token % 2 for token in ids) / len(ids) for ids in completion_ids]


class Numbers:
    """A tokenizer for which '17 3 250' is the text of the token ids 17, 3, 250.

    `eos` and `pad` lie outside the vocabulary, so no completion ends before its limit and no sampled token is
    mistaken for padding.
    """

    def __init__(self, vocab_size: int) -> None:
        self.outside = vocab_size

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return self.outside

    def pad_id(self) -> int:
        return self.outside
