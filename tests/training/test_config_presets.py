"""Presets as configs: what a preset says reaches the trainer's objective and advantage."""

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxrl_llm.advantages import ADVANTAGES
from jaxrl_llm.losses import PRESETS, policy_objective
from jaxrl_llm.training.config import check, default, make_objective, use_preset

RNG = np.random.default_rng(0)
LOGP, OLD, REF = (jnp.asarray(-RNG.uniform(0.1, 1.1, (4, 6)), jnp.float32) for _ in range(3))
ADVANTAGE = jnp.asarray(RNG.normal(size=(4, 1)), jnp.float32)
MASK = jnp.arange(6) < jnp.array([[6], [3], [0], [5]])

TRAINED = {
    (preset, method)
    for preset, methods in PRESETS.items()
    for method, entry in methods.items()
    if isinstance(entry["objective"]["surrogate"], str) and entry["advantage"]["name"] in ADVANTAGES
}


def trained_config() -> ConfigDict:
    c = default()
    c.data.train.kind, c.reward.functions, c.tokenizer.kind = "jsonl", ("exact_match",), "bytes"
    return c


@pytest.mark.parametrize("preset, method", sorted(TRAINED))
def test_the_trainer_computes_what_the_preset_says(preset, method):
    """With the KL switched on, so that its estimator and options count too."""
    c = trained_config()
    use_preset(c, preset, method)
    c.loss.beta = 0.3
    check(c)
    entry = PRESETS[preset][method]["objective"]
    auxiliary = dict.fromkeys(entry.get("auxiliary", {"k3": 0}), 0.3)
    wanted = policy_objective(**entry | {"auxiliary": auxiliary, "norm": c.rollout.max_completion_length})
    arrays = {"ref_logp": REF, "entropy": -REF, "behaviour_logp": OLD}
    got, _ = make_objective(c)(LOGP, OLD, ADVANTAGE, MASK, **arrays)
    np.testing.assert_array_equal(got, wanted(LOGP, OLD, ADVANTAGE, MASK, **arrays)[0])
    assert c.advantage.name == PRESETS[preset][method]["advantage"]["name"]


def test_most_presets_can_be_trained_by_config():
    assert len(TRAINED) > 0.7 * sum(map(len, PRESETS.values()))


@pytest.mark.parametrize(
    "preset, method, message",
    [
        ("trl-1.15", "grpo", "unknown preset 'trl-1.15'.*did you mean 'trl-1.16'"),
        ("trl-1.16", "dapoo", "has no method 'dapoo'.*did you mean 'dapo'"),
        ("verl-0.9", "clip_cov", "needs arrays that this training loop does not make"),
    ],
)
def test_what_a_config_cannot_be_is_refused(preset, method, message):
    with pytest.raises(ValueError, match=message):
        use_preset(default(), preset, method)
