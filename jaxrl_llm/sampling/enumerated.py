"""An exact denoiser: a small weighted corpus, conditioned on whatever is not masked.

Every probability that decoding and training of masked diffusion models approximate is known here, so it is
what they are tested on. `key_corpus` is a corpus on which FoCore can be told from classifier-free guidance,
with the guidance weight at which the answer flips in closed form.
"""

import dataclasses
import functools
import math
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.sampling.diffusion_state import Denoiser

Array = jax.Array

LEAST = 1e-30
"""Probability that stands for 0, so that logits are finite."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """S sequences of L tokens below V and their probabilities.

    Attributes:
      sequences: i32[S, L].
      probs: f64[S], sum 1.
      vocab_size: V, the mask token not among them.
    """

    sequences: np.ndarray
    probs: np.ndarray
    vocab_size: int

    def __post_init__(self) -> None:
        if self.sequences.ndim != 2 or self.probs.shape != self.sequences.shape[:1]:
            raise ValueError(
                f"{self.sequences.shape} sequences do not go with {self.probs.shape} probabilities"
            )
        if not math.isclose(self.probs.sum(), 1) or np.any(self.probs <= 0):
            raise ValueError(f"probabilities must be above 0 and sum to 1, not to {self.probs.sum()}")
        if self.sequences.min() < 0 or self.sequences.max() >= self.vocab_size:
            raise ValueError(f"tokens must lie between 0 and {self.vocab_size - 1}")

    @property
    def mask_id(self) -> int:
        """V: one more than the largest token."""
        return self.vocab_size

    @property
    def params(self) -> dict[str, Array]:
        """What `denoiser` computes with: the sequences, and ln p of each."""
        return {
            "sequences": jnp.asarray(self.sequences, jnp.int32),
            "logp": jnp.asarray(np.log(self.probs), jnp.float32),
        }


@functools.cache
def denoiser(vocab_size: int) -> Denoiser:
    """p(x_i | what is not masked), exactly, as logits over V + 1 tokens; takes `Corpus.params`.

    The mask token is V and has the probability `LEAST`. What no sequence of the corpus agrees with is
    followed by anything, uniformly. Rows are as long as the corpus: a prompt and its response fill L columns.
    """
    vocab = vocab_size

    def states(params: Any, tokens: Array, lengths: Array, columns: Array) -> Array:
        sequences = params["sequences"]
        length = sequences.shape[1]
        tokens = tokens[:, None, :length]
        agrees = jnp.all((tokens == vocab) | (tokens == sequences), axis=-1)
        # relative to the likeliest that agrees: nothing underflows
        logp = jnp.where(agrees, params["logp"], -jnp.inf)
        weights = jnp.exp(logp - jnp.maximum(jnp.max(logp, axis=1, keepdims=True), -1e30))
        one_hot = jax.nn.one_hot(sequences, vocab).reshape(len(sequences), -1)
        mass = jnp.dot(weights, one_hot, precision=jax.lax.Precision.HIGHEST)
        mass = mass.reshape(-1, length, vocab)
        total = jnp.sum(weights, axis=1)[:, None, None]
        probs = jnp.where(total > 0, mass / jnp.where(total > 0, total, 1), 1 / vocab)
        logits = jnp.log(jnp.maximum(jnp.pad(probs, ((0, 0), (0, 0), (0, 1))), LEAST))
        return jnp.take_along_axis(logits, columns[:, :, None], axis=1)

    return Denoiser(states, lambda params, logits: logits, vocab)


KEYS = (3, 1, 4, 0, 5, 2, 7, 6)
"""π: the likeliest key token for each prompt."""
KEY_PROBS = (0.5, 0.14, 0.1, 0.08, 0.06, 0.05, 0.04, 0.03)
"""Of (h - π_k) mod 8 = 0..7."""
ANSWERS = (1, 2, 3, 4, 5, 6, 7, 1)
"""f: the right answer for each key token."""
HABIT, RIGHT, NOISE = 0.45, 0.30, 0.25
"""Probability of the answer 0 whatever the key, of the right answer, and of the six wrong ones together."""
FILLERS = 4
STYLES = (8, 9, 10)
"""Filler tokens; the four fillers of a sequence are alike."""


def key_corpus(*, copied: bool = False) -> Corpus:
    """A corpus with a strong generic habit, in which one committed token carries the answer.

    The prompt is k, and the response h, four fillers, v. The key token h depends on k; the answer v is out of
    habit 0 more often than it is f(h), the right one. Plain decoding always answers 0. Guidance by a negative
    input without h prefers what h speaks for; guidance by one without k does nothing as long as h is seen.

    Args:
      copied: h is π_k for certain, a copy of the prompt; then hiding h alone does nothing either.
    """
    sequences, probs = [], []
    for k, h, style, v in product(range(8), range(8), STYLES, range(8)):
        p_key = float(h == KEYS[k]) if copied else KEY_PROBS[(h - KEYS[k]) % 8]
        if p_key:
            sequences.append((k, h, *(style,) * FILLERS, v))
            probs.append(p_key * _answer_prob(v, h) / (8 * len(STYLES)))
    return Corpus(np.array(sequences, np.int32), np.array(probs), vocab_size=8 + len(STYLES))


def _answer_prob(v: int, h: int) -> float:
    """p(v | h)."""
    return HABIT if v == 0 else RIGHT if v == ANSWERS[h] else NOISE / 6


def flip_weight(k: int, *, copied: bool = False) -> float:
    """w* = ln(habit / right) / ln(p(v | h) / p(v | without h)), above which FoCore answers v = f(h).

    Without h the prompt k is still there, except where it is `copied`: then the prompt must be hidden too,
    and what is left is p(v).
    """
    right = ANSWERS[KEYS[k]]
    if copied:
        without = sum(_answer_prob(right, h) for h in range(8)) / 8
    else:
        without = sum(KEY_PROBS[(h - KEYS[k]) % 8] * _answer_prob(right, h) for h in range(8))
    return math.log(HABIT / RIGHT) / math.log(RIGHT / without)
