"""What the contenders of the loss benchmark share: the problem, and the requests that they answer.

    driver     {"prepare": {"sequences": 8, "tokens": 128, "features": 256, "vocab": 32768}}
    contender  {"losses": {"policy": 0.0123}, "gradients": [0.031, 0.018], "temporaries": 134742016}
    driver     {"time": true}
    contender  {"seconds": 0.83, "tokens": 1024}
    driver     {"compile_for": {"topology": "v5p:2x2x1", "sequences": 8, …}}
    contender  {"temporaries": 5003493888}

`losses` and `gradients` (the norms of those of hidden and head) are there to be compared between contenders.
`temporaries` (bytes) is null where no compiler tells. Imports numpy and the standard library alone, because
it runs inside other libraries' environments.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import worker

EPSILON = 0.2
"""Clip of the probability ratio, below and above."""


class Problem(NamedTuple):
    """B sequences of T completion tokens, hidden states of D features, a vocabulary of V.

    Attributes:
      hidden: f[B, T, D], at t the state that predicts token t.
      head: f[V, D].
      targets: i32[B, T].
      old_logp: f32[B, T], about 0.2 nats from the log-probs.
      advantages: f32[B].
      mask: f32[B, T], from lengths of half of T and more.
    """

    hidden: Any
    head: Any
    targets: Any
    old_logp: Any
    advantages: Any
    mask: Any


def make_problem(sequences: int, tokens: int, features: int, vocab: int) -> Problem:
    """The same arrays in every process: logits of standard deviation about 2, ratios inside and outside the
    clip. The old log-probs come from the log-sum-exp of a Gaussian, log V + variance / 2, which needs no
    logits."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((sequences, tokens, features), np.float32)
    head = rng.standard_normal((vocab, features), np.float32)
    head *= np.float32(2 / features**0.5)
    targets = rng.integers(0, vocab, (sequences, tokens), np.int32)
    lengths = rng.integers(tokens // 2, tokens + 1, sequences)
    lse = np.log(vocab) + np.sum(hidden**2, axis=-1) * 2 / features
    logp = np.sum(hidden * head[targets], axis=-1) - lse
    return Problem(
        hidden=hidden,
        head=head,
        targets=targets,
        old_logp=(logp + rng.normal(0, 0.2, logp.shape)).astype(np.float32),
        advantages=rng.standard_normal(sequences, np.float32),
        mask=(np.arange(tokens) < lengths[:, None]).astype(np.float32),
    )


def norm(array: np.ndarray) -> float:
    """Euclidean, summed over rows in float64."""
    return float(np.linalg.norm(np.linalg.norm(array, axis=-1).astype(np.float64)))


class Contender(Protocol):
    """One library's loss."""

    def prepare(self, problem: Problem) -> dict[str, Any]:
        """Takes the problem over, compiles, and computes once; the reply to `prepare`."""

    def time(self) -> dict[str, Any]:
        """Value and gradients once more: {"seconds": …} and possibly {"parts": …}."""

    def compile_for(self, topology: str, **sizes: int) -> int | None:
        """Bytes of temporaries of the same in bfloat16 on one chip of a TPU topology, or None."""


def serve(contender: Contender, *distributions: str) -> None:
    """Answers the driver until it closes the pipe; `distributions` are those whose versions it is told."""
    channel = worker.Channel()
    channel.send({"versions": worker.versions(*distributions)})
    tokens = 0
    while (request := channel.receive()) is not None:
        if "prepare" in request:
            problem = make_problem(**request["prepare"])
            tokens = problem.targets.size
            channel.send(contender.prepare(problem))
        elif "compile_for" in request:
            channel.send({"temporaries": contender.compile_for(**request["compile_for"])})
        else:
            channel.send({"tokens": tokens, **contender.time()})
