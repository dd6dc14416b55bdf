"""The decoder against a plain one in numpy: the same tokens, order, steps, passes and log-probs."""

from typing import Any

import diffusion_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_denoiser import (
    EOS,
    EOT,
    LENGTHS,
    MASK,
    PARAMS,
    PLAIN,
    PROMPTS,
    SHIFTED,
    VOCAB,
    predict,
    predict_shifted,
)

from jaxrl_llm.sampling.diffusion import decode
from jaxrl_llm.sampling.diffusion_options import Method, settings

SIZE = 12
LEXICAL = (2, 3, 5, 7, 11)
STOPS = {"eos_id": EOS, "eot_id": EOT}
INFORMED = {"guidance": "high_information"}
FAST: dict[str, Any] = {"accelerate": True, "order": "low_confidence", **INFORMED}

LLADA: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    (
        {},
        [
            {},
            {"steps": 6},
            {"steps": 5},
            {"steps": 6, "forbid_eos": True, **STOPS},
            {"steps": 6, "distrust_eos": True, **STOPS},
            {"stop_at_eos": True, **STOPS},
        ],
    ),
    ({"block_size": 4, "order": "topk_margin"}, [{}, {"steps": 6}, {"steps": 3}]),
    ({"block_size": 1}, [{}]),
    (
        {"block_size": 6, "order": "entropy", "commit": "entropy_bound"},
        [{"entropy_bound": x} for x in (0.0, 1.0, 3.0)],
    ),
    ({"block_size": 4, "commit": "threshold"}, [{"threshold": x} for x in (0.3, 0.6, 0.9)]),
    ({"commit": "factor"}, [{"factor": x} for x in (0.5, 1.0, 2.0)]),
    (
        {"block_size": 4, "guidance": "prompt"},
        [{"guidance_weight": 0.0}, {"guidance_weight": 1.5}, {"guidance_end": 2.0, "steps": 6}],
    ),
    (
        {"block_size": 6, "guidance": "low_confidence"},
        [{}, {"guidance_weight": 1.5, "informative_share": 0.7}, {"steps": 4, "guidance_end": 0.0}],
    ),
    ({"detector": "early", **INFORMED}, [{}, {"guidance_weight": 1.5, "radius": 2}, {"steps": 4}]),
    (
        {"block_size": 4, "confidence_from": "plain", **INFORMED},
        [{}, {"plausible": 0.3, "guidance_weight": 3.0}, {"steps": 6, "informative_share": 1.0}],
    ),
    (
        {"block_size": 6, "detector": "settle", "detector_scope": "block", **INFORMED},
        [{}, {"guidance_weight": 1.5, "steps": 6}],
    ),
    (
        FAST,
        [
            {},
            {"change_limit": 0.3, "stable_probability": 0.3, "window": 2},
            {"change_limit": 0.7, "stable_probability": 0.2, "skip_negative": False, "patience": 2},
            {"patience": 0, "stable_probability": 0.0, "stable_steps": 0, "window": np.inf},
        ],
    ),
    (
        {"block_size": 6, "detector": "early", "max_informative": 2, **FAST},
        [{"change_limit": 0.3, "stable_probability": 0.4}, {"change_limit": 0.7, "stable_steps": 1}],
    ),
    ({"block_size": 4, "allow_mask_proposal": True}, [{}, {"steps": 6}]),
]
DREAM: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    (
        {"order": "maskgit_plus"},
        [{}, {"steps": 4}, {"steps": 7, "top_k": 2}, {"steps": 6, "top_p": 0.5}],
    ),
    (
        {"order": "topk_margin", "guidance": "prompt"},
        [{"guidance_weight": 0.0, "steps": 4}, {"guidance_weight": 1.5}, {"steps": 6}],
    ),
    (
        {"order": "entropy", "guidance": "low_confidence", "block_size": 6},
        [{"guidance_weight": 0.0}, {"guidance_weight": 1.5}, {"steps": 6}],
    ),
    ({"order": "entropy", "detector": "pmi", **INFORMED}, [{}, {"steps": 4, "guidance_weight": 1.5}]),
    (
        {
            "order": "maskgit_plus",
            "commit": "threshold",
            "block_size": 4,
            "detector": "lexical",
            "negative_prompt": "mask",
            **INFORMED,
        },
        [{}, {"threshold": 0.5, "guidance_weight": 1.5, "informative_share": 1.0}],
    ),
    (
        {"block_size": 6, **FAST},
        [
            {},
            {"change_limit": 0.7, "stable_probability": 0.3, "stable_steps": 1},
            {"change_limit": 0.7, "steps": 6},
        ],
    ),
]
CASES = [("llada", *case) for case in LLADA] + [("dream", *case) for case in DREAM]


def name(case: Any) -> str:
    family, structure, _ = case
    return "-".join([family, *(f"{value}" for value in structure.values())])


def run(family: str, structure: dict[str, Any], numbers: list[dict[str, Any]]) -> Any:
    """Every setting on every prompt, all in one batch: rows may differ in all that is traced."""
    method = Method(SIZE, family=family, **structure)
    names = {key for one in numbers for key in one}
    count = len(PROMPTS)
    values = {key: np.repeat([one.get(key, DEFAULT[key]) for one in numbers], count, axis=0) for key in names}
    rows = len(numbers) * count
    lexical = None
    if structure.get("detector") == "lexical":
        lexical = jnp.asarray(np.isin(np.arange(VOCAB), LEXICAL))
    return decode(
        PLAIN if family == "llada" else SHIFTED,
        PARAMS,
        np.tile(PROMPTS, (len(numbers), 1)),
        np.tile(LENGTHS, len(numbers)),
        method,
        settings(method, rows, **values),
        key=jax.random.key(0),
        uids=jnp.arange(rows),
        lexical=lexical,
    )


DEFAULT = diffusion_oracle.DEFAULTS | {
    "steps": SIZE,
    "guidance_end": diffusion_oracle.DEFAULTS["guidance_weight"],
    "eos_id": -1,
    "eot_id": -1,
}


def test_there_are_settings_enough():
    assert sum(len(numbers) for _, _, numbers in CASES) >= 40


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_decoder_is_the_plain_one(case):
    family, structure, numbers = case
    if any("guidance_weight" in one for one in numbers):
        numbers = [{"guidance_end": one.get("guidance_weight", 0.5), **one} for one in numbers]
    out = jax.tree.map(np.asarray, run(family, structure, numbers))
    for i, one in enumerate(numbers):
        for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS)):
            options = {"family": family, "lexical": LEXICAL, **structure, **one}
            plain = diffusion_oracle.decode(
                predict if family == "llada" else predict_shifted, prompt[:length], MASK, SIZE, **options
            )
            assert plain.margin > 1e-5, "a near tie: choose other weights"
            at = i * len(PROMPTS) + row
            assert out.tokens[at].tolist() == plain.tokens, (one, row, plain.margin)
            assert out.commit_step[at].tolist() == plain.commit_step, (one, row, plain.margin)
            assert (out.steps[at], out.nfe[at]) == (plain.steps, plain.nfe), (one, row)
            np.testing.assert_allclose(out.raw_logp[at], plain.raw_logp, atol=2e-5)
    assert not np.any(out.failed) and not np.any(out.commit_logp)
