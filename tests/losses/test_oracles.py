"""Ours against trl 1.16.0, verl 0.9.1, liger-kernel 0.8.5, google-tunix 0.1.7: to 1e-5, value and gradient.

`tools/make_golden_losses.py` ran the libraries and stored what they gave in golden/<library>.json. Every case
there has its line in `oracle_table.OURS`, or its test in `test_differences`, where the other library is wrong
or means something else.
"""

import functools
import inspect
import json
import os
import pathlib
import subprocess
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle_parts import TRL, Batch, Ours, fused, objective, outcome, overlong
from oracle_table import OURS

from jaxrl_llm import advantages, losses
from jaxrl_llm.losses import Array, preference
from jaxrl_llm.losses.presets import PRESETS

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = pathlib.Path(__file__).parent / "golden"
PYTHONS = {
    "trl": "JAXRL_TORCH_PYTHON",
    "verl": "JAXRL_TORCH_PYTHON",
    "liger": "JAXRL_TORCH_PYTHON",
    "tunix": "JAXRL_TUNIX_PYTHON",
}
"""The environment variable that names an interpreter with the library."""

DIFFERENCES = {
    "trl": {"log-ratio of 1000", "garbage where masked"},
    "verl": {"grpo advantages, group of one"},
    "liger": {"luspo, ratios of tokens"},
    "tunix": {"orpo", "overlong penalty"},
}
"""Cases in which ours is not the same; each has its test below."""


@functools.cache
def load(path: pathlib.Path) -> tuple[Batch, dict[str, dict]]:
    """The inputs as arrays of 64 bits and the cases of a stored file."""
    stored = json.loads(path.read_text())
    with jax.enable_x64(True):
        batch = {key: jnp.asarray(x) for key, x in stored["inputs"].items()}
        return {key: x > 0 if key.endswith("mask") else x for key, x in batch.items()}, stored["cases"]


def evaluate(ours: Ours, batch: Batch, case: dict) -> tuple[Array, dict[str, Array]]:
    """Our value of a case, and the gradients of its sum by what the case trains."""
    batch = {key: batch[key] for key in case["inputs"]}

    def total(trained: Batch) -> tuple[Array, Array]:
        value = ours(batch | trained)
        return jnp.sum(value), value

    trained = {key: batch[key] for key in case["gradients"]}
    if not trained:
        return jax.jit(total)({})[1], {}
    gradients, value = jax.jit(jax.grad(total, has_aux=True))(trained)
    return value, gradients


def check(ours: Ours, batch: Batch, case: dict) -> None:
    """Ours and theirs differ by 1e-5 at most, and by 1e-5 of the largest entry where all are small."""
    value, gradients = evaluate(ours, batch, case)
    wanted = {key: np.array(g) for key, g in case["gradients"].items()}
    for found, theirs in ((value, np.array(case["value"])), *((gradients[k], g) for k, g in wanted.items())):
        assert np.all(np.isfinite(theirs)) and found.shape == theirs.shape
        largest = np.abs(theirs).max()
        # far ratios, up to e^20, have seven digits in float32
        tolerance = {"rtol": 1e-5} if largest > 1e3 else {"rtol": 0, "atol": 1e-5 * min(1, largest)}
        np.testing.assert_allclose(found, theirs, **tolerance)
    assert not wanted or any(np.any(g != 0) for g in wanted.values())


@pytest.mark.parametrize("library", OURS)
def test_every_stored_case_is_compared(library):
    _, cases = load(GOLDEN / f"{library}.json")
    assert set(cases) == set(OURS[library]) | DIFFERENCES[library]


@pytest.mark.parametrize("library, name", [(library, name) for library in OURS for name in OURS[library]])
def test_agrees_with_stored(library, name):
    batch, cases = load(GOLDEN / f"{library}.json")
    with jax.enable_x64(True):
        check(OURS[library][name], batch, cases[name])


@pytest.mark.oracle
@pytest.mark.parametrize("library", OURS)
def test_agrees_live(library, tmp_path):
    python = os.environ.get(PYTHONS[library])
    if not python:
        pytest.skip(f"{PYTHONS[library]} names no interpreter with {library}")
    out = tmp_path / f"{library}.json"
    script = ROOT / "tools" / "make_golden_losses.py"
    environment = {key: x for key, x in os.environ.items() if key not in ("PYTHONPATH", "XLA_FLAGS")}
    subprocess.run(
        [python, script, "--library", library, "--out", out], check=True, timeout=600, env=environment
    )
    batch, cases = load(out)
    assert set(cases) == set(OURS[library]) | DIFFERENCES[library]
    with jax.enable_x64(True):
        for name, ours in OURS[library].items():
            check(ours, batch, cases[name])


# --- where they differ


def differing(library: str, name: str, ours: Ours) -> tuple:
    """Their value and gradients, then our value and gradients, then the case's inputs."""
    assert name in DIFFERENCES[library]
    batch, cases = load(GOLDEN / f"{library}.json")
    case = cases[name]
    with jax.enable_x64(True):
        value, gradients = evaluate(ours, batch, case)
    theirs = {key: np.array(g) for key, g in case["gradients"].items()}
    return np.array(case["value"]), theirs, value, gradients, batch


def test_trl_has_no_gradient_at_a_log_ratio_of_1000():
    """An overflowing ratio that the clip does not choose gets 0 · inf."""

    def ours(b: Batch) -> Array:
        return objective(TRL, "grpo")(b | {"old_logp": b["overflow_logp"]})

    wanted, theirs, value, gradients, _ = differing("trl", "log-ratio of 1000", ours)
    assert np.isnan(theirs["logp"][0, 0]) and np.sum(np.isnan(theirs["logp"])) == 1
    np.testing.assert_allclose(value, wanted, atol=1e-5)  # A > 0: clipped at 1.2
    np.testing.assert_allclose(gradients["logp"], np.nan_to_num(theirs["logp"]), atol=1e-7)


def test_trl_multiplies_garbage_by_the_mask():
    def ours(b: Batch) -> Array:
        return objective(TRL, "grpo")(b | {"logp": b["garbage_logp"]})

    wanted, theirs, value, gradients, _ = differing("trl", "garbage where masked", ours)
    assert np.isnan(wanted) and np.any(np.isnan(theirs["garbage_logp"]))
    _, cases = load(GOLDEN / "trl.json")
    np.testing.assert_allclose(value, cases["grpo"]["value"], atol=1e-5)
    np.testing.assert_allclose(gradients["garbage_logp"], cases["grpo"]["gradients"]["logp"], atol=1e-7)


def test_verl_gives_a_group_of_one_its_reward():
    def ours(b: Batch) -> Array:
        return outcome(advantages.grpo)(b | {"group": b["lonely_group"]})

    wanted, _, value, _, batch = differing("verl", "grpo advantages, group of one", ours)
    mask = np.asarray(batch["mask"])
    np.testing.assert_allclose(wanted[0], np.asarray(batch["rewards"])[0] * mask[0], rtol=1e-5)
    assert np.all(np.asarray(value)[0] == 0)  # one row says nothing about better or worse
    np.testing.assert_allclose(np.asarray(value)[1:], wanted[1:], atol=1e-5)


def test_liger_trains_masked_tokens_under_luspo_with_token_ratios():
    """It also divides by the mask's width; TRL does neither."""
    ours = fused(objective(TRL, "luspo", ratio="token"))
    wanted, theirs, value, gradients, batch = differing("liger", "luspo, ratios of tokens", ours)
    masked_out = ~np.asarray(batch["mask"]) & np.asarray(batch["mask"]).any(1, keepdims=True)
    assert np.any(theirs["hidden"][masked_out] != 0)
    assert np.all(np.asarray(gradients["hidden"])[masked_out] == 0)
    assert abs(float(value) - wanted) > 0.1


def test_tunix_has_orpo_of_whole_answers():
    """The odds of summed log-probs, where the paper (eq. 3) and TRL take the mean per token."""

    def ours(b: Batch) -> Array:
        mask, four = b["nonempty_mask"], jnp.ones(4, bool)
        means = jnp.split(preference.sequence_logp(b["logp"], mask, normalise=True), 2)
        sums = jnp.split(preference.sequence_logp(b["logp"], mask), 2)
        likelihood = -jnp.mean(means[0])
        of_sums = jnp.mean(preference.orpo(*sums, four, beta=0.1)[0] + sums[0]) + likelihood
        return jnp.stack([of_sums, jnp.mean(preference.orpo(*means, four, beta=0.1)[0])])

    wanted, _, value, _, _ = differing("tunix", "orpo", ours)
    assert abs(float(value[0]) - wanted) < 1e-5 < abs(float(value[1]) - wanted)


def test_tunix_counts_characters_and_has_no_floor():
    wanted, _, value, _, _ = differing("tunix", "overlong penalty", overlong)
    np.testing.assert_allclose(value, np.maximum(wanted, -1), atol=1e-6)
    assert wanted.min() < -2  # of 130 characters, which may be 30 tokens


# --- the presets


def find(name: str) -> Callable:
    """A function of the advantages by its name in the table, or in its module."""
    modules = (advantages.group, advantages.returns, advantages.several_rewards, advantages.pass_at_k)
    return advantages.ADVANTAGES.get(name) or next(
        getattr(module, name) for module in modules if hasattr(module, name)
    )


@pytest.mark.parametrize(
    "preset, method", [(preset, method) for preset in PRESETS for method in PRESETS[preset]]
)
def test_a_preset_names_what_exists(preset, method):
    entry = PRESETS[preset][method]
    assert set(entry) == {"objective", "advantage", "sampler"}
    losses.policy_objective(**entry["objective"] | entry["sampler"], norm=8.0)
    options = dict(entry["advantage"])
    function = find(options.pop("name"))
    assert set(options) <= set(inspect.signature(function).parameters)
