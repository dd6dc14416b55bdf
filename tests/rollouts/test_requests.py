"""What the engine refuses, and trajectories from what it completed."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import make_engine

from jaxrl_llm.rollouts.engine import Completion, Request, trajectories


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tokens": []}, "empty context"),
        ({"tokens": [3] * 120}, "do not fit into max_length=128"),
        ({"tokens": [3, 150]}, "token id 150 is outside the vocabulary of 150"),
        ({"tokens": [-1, 3]}, "token id -1"),
        ({"tokens": [1.5, 3]}, "float64"),
        ({"tokens": [[3]]}, r"shape \(1, 1\)"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"top_k": -2}, "top_k=-2"),
        ({"uid": 2**31}, "uid=2147483648"),
        ({"rules": (1,)}, "1 states for the engine's 0 rules"),
    ],
)
def test_what_cannot_be_served_is_refused_and_counted(change, words):
    engine = make_engine()
    good = Request([7], max_new_tokens=9, uid=0)
    with pytest.raises(ValueError, match=words):
        engine.generate([good, dataclasses.replace(good, **change)])
    assert engine.step() and not engine.waiting and not engine.running
    assert engine.counts == {"refused": 1, "cancelled": 1}  # nobody would have got the good one's completion


def test_engines_that_cannot_be_built():
    for change, words in (
        ({"stop_ids": (3, 150)}, "stop token 150 is outside the vocabulary of 150"),
        ({"kv_dtype": "int32"}, "kv_dtype=int32 must be a type of floats, int8, or None"),
        ({"slots": 0}, "slots=0"),
        ({"block": 0}, "block=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"buckets": ()}, "buckets"),
    ):
        with pytest.raises(ValueError, match=words):
            make_engine(**change)


def test_trajectories_join_contexts_and_completions():
    requests = [Request([7, 8], 5, temperature=0.5), Request([9], 5)]
    completions = [
        Completion(*(np.array(x, "f4") for x in ([1, 2], [-1, -2], [-3, -4], [-5, -6])),
                              np.array([0, 1], np.int32), "stop"),
        Completion(*(np.zeros(0, "f4"),) * 4, np.zeros(0, np.int32), "cancelled"),
    ]  # fmt: skip
    t = trajectories(requests, completions, group=[4, 4], width=5)
    assert t.tokens.tolist() == [[7, 8, 1, 2, 0], [9, 0, 0, 0, 0]]
    assert t.tokens.dtype == jnp.int32 and t.lengths.tolist() == [4, 1]
    assert t.action_mask.tolist() == [[False, False, True, True, False], [False] * 5]
    assert t.behaviour_logp.tolist() == [[0, 0, -1, -2, 0], [0] * 5]
    assert t.raw_logp.tolist() == [[0, 0, -3, -4, 0], [0] * 5]
    assert t.log_kept.tolist() == [[0, 0, -5, -6, 0], [0] * 5]
    assert t.policy_version.tolist() == [[-1, -1, 0, 1, -1], [-1] * 5]
    assert t.temperature.tolist() == [0.5, 1.0] and t.finished.tolist() == [True, False]
    assert t.group.tolist() == [4, 4]
    assert trajectories(requests, completions, group=[0, 1]).tokens.shape == (2, 4)
    for options, words in (({"group": [0]}, "1 groups"), ({"group": [0, 0], "width": 3}, "width=3")):
        with pytest.raises(ValueError, match=words):
            trajectories(requests, completions, **options)
