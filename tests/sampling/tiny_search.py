"""A tiny model with its log-probs by the whole forward pass, and the searches that its tests share."""

import functools

import jax
import numpy as np

from jaxrl_llm.models import params as params_lib
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.sampling.autoregressive import generate, prepare
from jaxrl_llm.sampling.logits import sampling_params
from jaxrl_llm.sampling.sage import sage

V, END, WIDTH = 6, 5, 16
CFG = ModelConfig(
    vocab_size=V,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=24,
    window=4,
    layer_kinds=("local", "global"),
)
PROMPTS = ((1, 2, 3), (4, 0, 2, 1, 3), (2,))
TOKENS = np.array([[*p, *[0] * (5 - len(p))] for p in PROMPTS], np.int32)
LENGTHS = np.array([len(p) for p in PROMPTS], np.int32)


@functools.cache
def make_params():
    params = params_lib.init(jax.random.key(0), transformer.param_specs(CFG))
    # else every distribution would be flat, and a tied head would repeat what it read last
    head = 0.4 * jax.random.normal(jax.random.key(1), params["embed"].shape)
    return params | {"embed": params["embed"] * 10, "head": head}


@functools.cache
def prepared():
    return prepare(make_params(), CFG)


@jax.jit
def all_logp(params, tokens):
    hidden = transformer.forward(params, tokens, CFG)
    return jax.nn.log_softmax(transformer.logits(params, hidden, CFG), axis=-1)


@functools.cache
def next_logp(sequence: tuple[int, ...]) -> np.ndarray:
    """f64[V] by the whole model."""
    row = np.zeros((1, WIDTH), np.int32)
    row[0, : len(sequence)] = sequence
    return np.asarray(all_logp(make_params(), row)[0, len(sequence) - 1], np.float64)


def logp(prompt, sequence) -> np.ndarray:
    """Log-prob of each token of the sequence."""
    return np.array([next_logp(prompt + sequence[:i])[t] for i, t in enumerate(sequence)])


def found_rows(found, prompt: int) -> list[tuple[tuple[int, ...], float, bool]]:
    """Sequence, score and whether it ended, of what was found for a prompt."""
    out = []
    for tokens, length, value, finished in zip(
        *(np.asarray(x[prompt]) for x in (found.tokens, found.lengths, found.scores, found.finished))
    ):
        assert not tokens[length:].any()
        out.append((tuple(tokens[:length].tolist()), float(value), bool(finished)))
    return out


def assert_same(found, expected):
    """Sequences, ends and order are equal, scores to 1e-5, and the log-probs are the model's own."""
    for index, prompt in enumerate(PROMPTS):
        got, want = found_rows(found, index), expected[index]
        assert [(s, f) for s, _, f in got] == [(s, f) for s, _, f in want]
        np.testing.assert_allclose([v for _, v, _ in got], [v for _, v, _ in want], atol=1e-5)
        for place, (sequence, _, _) in enumerate(got):
            own = np.asarray(found.logp[index, place])
            np.testing.assert_allclose(own[: len(sequence)], logp(prompt, sequence), atol=1e-5)
            assert not own[len(sequence) :].any()


STEPS = {"max_steps": 3, "max_step_tokens": 3, "end_id": END, "delimiters": [(0,), (1, 2)]}


def draw_sage(beams=2, count=3, seed=3, **options):
    options = STEPS | {"uids": np.array([7, 8, 9])} | options
    uids = options.pop("uids")
    return sage(
        prepared(),
        CFG,
        TOKENS,
        LENGTHS,
        beams=beams,
        num_return=count,
        key=jax.random.key(seed),
        uids=uids,
        **options,
    )


def draw_plainly(tokens, lengths, seed):
    return generate(
        prepared(),
        CFG,
        tokens,
        lengths,
        num_generations=1,
        max_new_tokens=9,
        sampling=sampling_params(3),
        key=jax.random.key(seed),
        uids=np.array([7, 8, 9]),
        stop_ids=(END,),
        policy_version=4,
    )
