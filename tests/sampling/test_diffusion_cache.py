"""Block caches against a transformer in numpy that keeps stale keys and values in so many words."""

from typing import Any

import diffusion_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_denoiser import EOS, LENGTHS, MASK, PLAIN, PROMPTS, VOCAB

from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.denoiser import prepare
from jaxrl_llm.models.params import map_specs
from jaxrl_llm.sampling.diffusion import decode
from jaxrl_llm.sampling.diffusion_options import Method, settings
from jaxrl_llm.sampling.diffusion_state import of_model

SIZE = 12
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=24,
    qk_norm=False,
    tied_head=False,
    causal=False,
    mask_id=MASK,
)
LLADA = ModelConfig(family="llada", **SHAPE)
DREAM = ModelConfig(family="Dream", logits_shift=1, **SHAPE)
rng = np.random.default_rng(3)
PARAMS = map_specs(
    lambda spec: rng.normal(0 if spec.init == "normal" else 1, 0.7, spec.shape).astype(np.float32),
    transformer.param_specs(LLADA),
)
PREPARED = prepare(PARAMS, LLADA)


def unit(x, weight):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * weight


def turned(x, places):
    """Rotary embedding of x [n, heads, 4]; pairs are (0, 2) and (1, 3)."""
    angles = np.asarray(places)[:, None, None] * 10_000.0 ** (-np.arange(0, 4, 2) / 4)
    a, b = x[..., :2], x[..., 2:]
    return np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1
    )


class Stale:
    """A transformer that keeps, per layer, the unrotated keys and the values of its last pass over all."""

    def __init__(self, shift):
        self.shift, self.kept = shift, None

    def __call__(self, ids, low=0, high=None):
        """ids [L] -> logits [L, V], NaN but in columns low to high - 1."""
        high = len(ids) if high is None else high
        own, kept, fresh = np.arange(low, high), self.kept, []
        x = np.asarray(PARAMS["embed"], np.float64)[ids[low:high]]
        for n in range(2):
            w = {name: np.asarray(value[n], np.float64) for name, value in PARAMS["layers"].items()}
            y = unit(x, w["attn_norm"])
            q, k, v = (np.einsum("nd,dhk->nhk", y, w[name]) for name in "qkv")
            if len(own) < len(ids):
                k, v = (np.concatenate([old[:low], new, old[high:]]) for old, new in zip(kept[n], (k, v)))
            else:
                fresh.append((k, v))
            keys = np.repeat(turned(k, range(len(ids))), 2, axis=1)
            scores = np.einsum("nhk,mhk->hnm", turned(q, own), keys) / 2
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            scores /= scores.sum(axis=-1, keepdims=True)
            seen = np.einsum("hnm,mhk->nhk", scores, np.repeat(v, 2, axis=1))
            x = x + np.einsum("nhk,hkd->nd", seen, w["o"])
            y = unit(x, w["mlp_norm"])
            gate = y @ w["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (y @ w["up"])) @ w["down"]
        if fresh:
            self.kept = fresh
        logits = unit(x, PARAMS["final_norm"]) @ PARAMS["head"].T.astype(np.float64)
        if self.shift:
            logits = np.concatenate([logits[:1], logits[:-1]])
        out = np.full((len(ids), VOCAB), np.nan)
        out[low:high] = logits
        return out


QUOTAS = [{}, {"steps": 6}, {"steps": 3}]
LEVELS = [{"threshold": x} for x in (0.3, 0.6, 0.9)]
CASES = [
    ("llada", {"block_size": 4}, [*QUOTAS, {"steps": 6, "stop_at_eos": True, "eos_id": EOS}]),
    ("llada", {"block_size": 4, "commit": "threshold"}, LEVELS),
    ("llada", {"block_size": 6, "commit": "factor"}, [{"factor": x} for x in (0.5, 1.0, 2.0)]),
    ("dream", {"block_size": 4, "order": "entropy"}, QUOTAS),
    ("dream", {"block_size": 4, "order": "maskgit_plus", "commit": "threshold"}, LEVELS),
]
WEIGHTS = [{"guidance_weight": a, "guidance_end": b} for a, b in ((0, 0), (0.5, 0.5), (1.5, 1.5), (0, 2))]
GUIDED = [
    ("dual", "llada", {"block_size": 4, "guidance": "prompt"}, [*WEIGHTS, WEIGHTS[1] | {"steps": 6}]),
    ("prefix", "dream", {"block_size": 4, "order": "entropy", "guidance": "prompt"}, WEIGHTS),
]


def run(family, structure, numbers, params=PREPARED):
    """Every setting on every prompt, all in one batch: rows begin their blocks in different rounds."""
    method = Method(SIZE, family=family, **structure)
    rows, names = len(numbers) * len(PROMPTS), {name for one in numbers for name in one}
    default = diffusion_oracle.DEFAULTS | {"steps": SIZE, "eos_id": -1}
    values = {
        name: np.repeat([one.get(name, default[name]) for one in numbers], len(PROMPTS)) for name in names
    }
    out = decode(
        of_model(DREAM if family == "dream" else LLADA),
        params,
        np.tile(PROMPTS, (len(numbers), 1)),
        np.tile(LENGTHS, len(numbers)),
        method,
        settings(method, rows, **values),
        key=jax.random.key(0),
        uids=jnp.arange(rows),
    )
    return jax.tree.map(np.asarray, out)


CACHED = [(cache, *case) for case in CASES for cache in ("prefix", "dual")]
UNCACHED = [("none", *CASES[1]), ("none", *CASES[3])]


def name(case):
    cache, family, structure, _ = case
    return "-".join(map(str, [family, *structure.values(), cache]))


@pytest.mark.parametrize("case", CACHED + UNCACHED + GUIDED, ids=name)
def test_cached_decoding_is_that_of_stale_keys_and_values(case):
    cache, family, structure, numbers = case
    structure = structure | {"cache": cache}
    out = run(family, structure, numbers)
    for i, one in enumerate(numbers):
        for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS)):
            stale, other = Stale(family == "dream"), Stale(family == "dream")
            plain = diffusion_oracle.decode(
                stale, prompt[:length], MASK, SIZE, other, family=family, **structure, **one
            )
            assert plain.margin > 1e-5, "a near tie: choose other weights"
            at = i * len(PROMPTS) + row
            assert out.tokens[at].tolist() == plain.tokens, (one, row, plain.margin)
            assert out.commit_step[at].tolist() == plain.commit_step, (one, row)
            assert (out.steps[at], out.nfe[at]) == (plain.steps, plain.nfe), (one, row)
            np.testing.assert_allclose(out.raw_logp[at], plain.raw_logp, atol=5e-5)


def test_what_cannot_be_cached():
    method = Method(SIZE, block_size=4, cache="dual")
    lengths, rows = LENGTHS, jnp.arange(len(LENGTHS))
    for denoiser, message in ((PLAIN, "needs a denoiser with `window`"), (of_model(DREAM), "family='dream'")):
        with pytest.raises(ValueError, match=message):
            decode(denoiser, PREPARED, PROMPTS, lengths, method, settings(method, 4), key=None, uids=rows)
    for options in (
        {"guidance": "low_confidence"},
        {"guidance": "high_information"},
        {"allow_mask_proposal": True},
    ):
        with pytest.raises(ValueError, match="cache='dual' needs guidance='none' or 'prompt'"):
            Method(SIZE, cache="dual", **options)
    with pytest.raises(ValueError, match="unknown cache='both'; one of none, prefix, dual"):
        Method(SIZE, cache="both")
