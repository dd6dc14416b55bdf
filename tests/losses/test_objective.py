"""The composition: its parts by hand, what reaches which part, and what it refuses."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_table import random_batch

from jaxrl_llm import losses
from jaxrl_llm.losses import SURROGATES, policy_objective
from jaxrl_llm.losses.ratios import log_ratio

BATCH = {key: jnp.asarray(x) for key, x in random_batch(3).items()}
LOGP, OLD, ADVANTAGES, MASK = (BATCH[key] for key in ("logp", "old_logp", "advantages", "mask"))
MORE = {key: BATCH[key] for key in ("ref_logp", "behaviour_logp", "entropy", "teacher_logp")}


def test_it_is_its_parts():
    """Every factor set to something else than its default."""
    objective = policy_objective(
        surrogate="dgpo",
        surrogate_options={"left_decay": 2.0},
        ratio="sequence_token",
        correction="token_mask",
        correction_options={"cap": 1.5, "floor": 0.7},
        auxiliary={"k3": 0.3, "entropy": 0.2, losses.negative_log_likelihood: 0.1, "k1": 0.0},
        aggregation="seq_mean_token_sum_norm",
        norm=5.0,
        count_empty=True,
    )
    got, metrics = objective(LOGP, OLD, ADVANTAGES, MASK, **MORE)
    loss, _ = losses.dgpo(LOGP, OLD, ADVANTAGES, MASK, left_decay=2.0, ratio=losses.RATIOS["sequence_token"])
    weights, _ = losses.importance_sampling_correction(
        OLD, BATCH["behaviour_logp"], MASK, mode="token_mask", cap=1.5, floor=0.7
    )
    loss = loss * weights + 0.3 * losses.kl_k3(LOGP, BATCH["ref_logp"], MASK)[0]
    loss += -0.2 * jnp.where(MASK, BATCH["entropy"], 0) - 0.1 * jnp.where(MASK, LOGP, 0)
    wanted = losses.aggregate(loss, MASK, "seq_mean_token_sum_norm", norm=5.0, count_empty=True)
    np.testing.assert_allclose(got.sum, wanted.sum, rtol=1e-6)
    assert float(got.weight) == float(wanted.weight) == len(MASK)
    assert {"kl", "entropy", "nll", "clip_ratio/low_mean", "sampling/importance_sampling_corrected"} <= set(
        metrics
    )


@pytest.mark.parametrize("name", SURROGATES)
def test_a_bare_objective_is_the_surrogate(name):
    got, _ = policy_objective(surrogate=name)(LOGP, OLD, ADVANTAGES, MASK, **MORE | {"flag": BATCH["flag"]})
    needed = [
        key for key, p in inspect.signature(SURROGATES[name]).parameters.items() if p.default is p.empty
    ]
    wanted = losses.aggregate(SURROGATES[name](**{key: BATCH[key] for key in needed})[0], MASK)
    np.testing.assert_array_equal(got, wanted)


def test_parts_may_be_functions_and_receive_arrays_by_name():
    def leaning(logp, old_logp, advantages, mask, teacher_logp, *, scale=1.0):
        return scale * jnp.where(mask, teacher_logp * advantages, 0), {}

    def between(logp, old_logp, mask, *, teacher_logp):
        return log_ratio(logp, (old_logp + teacher_logp) / 2, mask)

    objective = policy_objective(surrogate=leaning, surrogate_options={"scale": 2.0})
    got, _ = objective(LOGP, OLD, ADVANTAGES, MASK, teacher_logp=MORE["teacher_logp"])
    np.testing.assert_allclose(got.sum, 2 * jnp.sum(jnp.where(MASK, MORE["teacher_logp"] * ADVANTAGES, 0)))
    got, _ = policy_objective(ratio=between)(LOGP, OLD, ADVANTAGES, MASK, **MORE)
    wanted, _ = policy_objective()(LOGP, (OLD + MORE["teacher_logp"]) / 2, ADVANTAGES, MASK)
    np.testing.assert_array_equal(got, wanted)


def test_compiled_and_differentiated():
    objective = policy_objective(surrogate="cispo", ratio="sequence", auxiliary={"k2": 0.1})

    def mean(logp):
        loss, _ = objective(logp, OLD, ADVANTAGES, MASK, ref_logp=MORE["ref_logp"])
        return loss.sum / loss.weight

    plain, compiled = jax.grad(mean)(LOGP), jax.jit(jax.grad(mean))(LOGP)
    assert jnp.any(plain != 0)
    np.testing.assert_allclose(plain, compiled, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "keywords, message",
    {
        "surrogate": ({"surrogate": "pppo"}, "unknown surrogate 'pppo'; one of reinforce, ppo_clip"),
        "ratio": ({"ratio": "tokens"}, "unknown ratio 'tokens'; one of token, sequence"),
        "auxiliary": ({"auxiliary": {"k4": 1.0}}, "unknown auxiliary 'k4'; one of k1, k2"),
        "correction": ({"correction": "tis"}, "unknown correction 'tis'; one of none, token_truncate"),
        "aggregation": ({"aggregation": "mean"}, "unknown aggregation 'mean'; one of token_mean"),
        "option": ({"surrogate_options": {"eps": 1}}, "surrogate 'ppo_clip' has no option eps; it has logp"),
        "no ratio": ({"surrogate": "gspo", "ratio": "token"}, "'gspo' takes no other ratio than its own"),
        "options of no ratio": ({"ratio_options": {"clamp": 1}}, "without a ratio"),
        "options of nothing": ({"auxiliary_options": {"k3": {}}}, "auxiliary_options for k3"),
    }.values(),
)
def test_what_does_not_exist_is_refused_when_built(keywords, message):
    with pytest.raises(ValueError, match=message):
        policy_objective(**keywords)


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"auxiliary": {"k3": 0.1}}, "auxiliary 'k3' needs ref_logp: pass it"),
        ({"correction": "token_mask"}, "correction 'token_mask' needs behaviour_logp"),
    ],
)
def test_an_array_that_is_missing_is_named(keywords, message):
    with pytest.raises(ValueError, match=message):
        policy_objective(**keywords)(LOGP, OLD, ADVANTAGES, MASK)
