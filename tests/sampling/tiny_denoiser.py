"""A small random network that predicts every token from all others, in jax and, on its own, in numpy."""

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.sampling.diffusion_state import Denoiser

VOCAB, MASK, WIDTH, LONGEST = 13, 12, 16, 24

rng = np.random.default_rng(0)
PARAMS = {
    "embed": rng.normal(0, 1, (VOCAB, WIDTH)).astype(np.float32),
    "place": rng.normal(0, 1, (LONGEST, WIDTH)).astype(np.float32),
    "mix": rng.normal(0, 0.5, (LONGEST, LONGEST)).astype(np.float32),
    "own": rng.normal(0, 0.3, (WIDTH, WIDTH)).astype(np.float32),
    "other": rng.normal(0, 0.3, (WIDTH, WIDTH)).astype(np.float32),
    "head": rng.normal(0, 1, (VOCAB, WIDTH)).astype(np.float32),
}


def predict(ids, params=PARAMS):
    """[L] -> [L, V] in numpy."""
    n = len(ids)
    x = params["embed"][ids]
    seen = params["mix"][:n, :n] @ x
    hidden = np.tanh(x @ params["own"] + seen @ params["other"] + params["place"][:n])
    return hidden @ params["head"].T


def predict_shifted(ids):
    """Position j by the output at j - 1, as Dream does."""
    logits = predict(ids)
    return np.concatenate([logits[:1], logits[:-1]])


def states(params, tokens, lengths, columns):
    size = tokens.shape[1]
    inside = jnp.arange(size) < lengths[:, None]
    x = params["embed"][tokens]
    seen = jnp.einsum("ij,njd->nid", params["mix"][:size, :size], jnp.where(inside[..., None], x, 0))
    hidden = jnp.tanh(x @ params["own"] + seen @ params["other"] + params["place"][:size])
    return jnp.take_along_axis(hidden, columns[:, :, None], axis=1)


def shifted_states(params, tokens, lengths, columns):
    return states(params, tokens, lengths, jnp.maximum(columns - 1, 0))


def head(params, hidden):
    return hidden @ params["head"].T


PLAIN = Denoiser(states, head, MASK)
SHIFTED = Denoiser(shifted_states, head, MASK)
EOS, EOT = 0, 1
PROMPTS = np.array([[3, 7, 4], [5, 11, 0], [2, 0, 0], [9, 0, 6]], np.int32)
LENGTHS = np.array([3, 2, 1, 3], np.int32)
"""Zeros at the end of a row are padding; the one inside the last prompt is a token."""
