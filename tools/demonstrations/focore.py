r"""Where FoCore changes an answer and classifier-free guidance cannot, on a corpus known exactly.

    python tools/demonstrations/focore.py

The corpus (`sampling.enumerated.key_corpus`): a prompt k, and a response of a key h that depends on k, four
fillers, and an answer v. Out of habit v is 0, with probability .45; the answer that h speaks for has .30. An
exact denoiser decodes plainly, and guided by l + w(l - l⁻) with each negative input. Its answer should flip
from habit to the right one where w exceeds

    w* = ln(.45 / .30) / ln(p(v | h) / p(v | what the negative input shows))

if the negative input hides h, and nowhere if h is still in it: then p(v | ...) is the same and w* infinite.

Prints what came out, and ends with exit code 1 if anything is not as the formula says.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxrl_llm.sampling import enumerated
from jaxrl_llm.sampling.diffusion import decode
from jaxrl_llm.sampling.diffusion_options import Method, settings

RESPONSE = 2 + enumerated.FILLERS
WEIGHTS = (0.0, 0.5, 0.7, 0.75, 0.8, 1.0, 1.05, 1.15, 2.0, 5.0, 20.0)
CLOSE = 1e-3
"""How near below and above w* the flip is looked for."""

CASES = (
    ("plain", False, Method(RESPONSE), False),
    ("CFG (hides the prompt)", False, Method(RESPONSE, guidance="prompt"), False),
    (
        "A-CFG (hides what is least sure: at first, h)",
        False,
        Method(RESPONSE, guidance="low_confidence"),
        True,
    ),
    ("FoCore (hides what is informative: h)", False, Method(RESPONSE, guidance="high_information"), True),
    ("h copies the prompt: CFG", True, Method(RESPONSE, guidance="prompt"), False),
    ("h copies the prompt: FoCore", True, Method(RESPONSE, guidance="high_information"), False),
    (
        "h copies the prompt: FoCore, prompt hidden too",
        True,
        Method(RESPONSE, guidance="high_information", negative_prompt="mask"),
        True,
    ),
)
"""Name, whether h is a copy of the prompt, the method, and whether its answers flip."""


def answers_right(copied: bool, method: Method, weights: np.ndarray) -> np.ndarray:
    """bool[8, W]: whether each prompt k gets the answer its key speaks for, at each of f[8, W] weights.

    Raises:
      ValueError: an answer that is neither habit nor right.
    """
    corpus = enumerated.key_corpus(copied=copied)
    prompts = jnp.repeat(jnp.arange(8), weights.shape[1])[:, None]
    count = len(prompts)
    out = decode(
        enumerated.denoiser(corpus.vocab_size),
        corpus.params,
        prompts,
        jnp.ones(count, jnp.int32),
        method,
        settings(method, count, guidance_weight=weights.reshape(-1)),
        key=jax.random.key(0),
        uids=jnp.arange(count),
    )
    tokens = np.asarray(out.tokens)
    right = tokens[:, -1] == np.array(enumerated.ANSWERS)[tokens[:, 0]]
    if not np.all(right | (tokens[:, -1] == 0)):
        raise ValueError(f"answers that are neither habit nor right: {tokens[:, -1].tolist()}")
    return right.reshape(8, -1)


def main() -> None:
    console = Console(width=120)
    table = Table("right answers of 8 at w =", *(f"{w:g}" for w in WEIGHTS), "as computed", box=None)
    ok = True
    for name, copied, method, flips in CASES:
        analytic = np.array([enumerated.flip_weight(k, copied=copied) for k in range(8)])[:, None]
        shared = np.tile(WEIGHTS, (8, 1))
        weights = np.concatenate([shared, analytic - CLOSE, analytic + CLOSE], axis=1)
        right = answers_right(copied, method, weights)
        good = np.array_equal(right, (weights > analytic) & flips)
        ok &= good
        counts = right[:, : len(WEIGHTS)].sum(axis=0)
        table.add_row(name, *map(str, counts), "yes" if good else "NO")
    console.print(table)
    for copied, what in ((False, "h hidden"), (True, "h a copy of the prompt, both hidden")):
        found = " ".join(f"{enumerated.flip_weight(k, copied=copied):.3f}" for k in range(8))
        console.print(f"w* of the prompts 0 to 7, {what}: {found}")
    console.print(
        f"As computed: so are the answers at these weights, and {CLOSE:g} below and above each prompt's w*."
    )
    if not ok:
        sys.exit("an answer is not as computed")


if __name__ == "__main__":
    main()
