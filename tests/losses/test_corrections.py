"""Weights for the mismatch between sampler and trainer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import (
    IMPORTANCE_SAMPLING_CORRECTIONS,
    finalize,
    importance_sampling_correction,
    off_policy_sequence_mask,
)

# Token ratios; the third row has no token. Products over the rows' tokens: 0.25·1·4 = 1 and 0.5·8 = 4.
RATIO = np.array([[0.25, 1, 4], [0.5, 8, 99], [99, 99, 99]], np.float32)
MASK = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 0]], bool)


def correction(mode, **options):
    return importance_sampling_correction(jnp.log(RATIO), jnp.zeros((3, 3)), MASK, mode=mode, **options)


@pytest.mark.parametrize(
    "mode, options, wanted",
    [
        ("none", {}, [[1, 1, 1], [1, 1, 1]]),
        ("token_truncate", {}, [[0.25, 1, 3], [0.5, 3, 1]]),
        ("token_truncate", {"cap": 5.0, "floor": 0.4}, [[0.4, 1, 4], [0.5, 5, 1]]),
        ("token_mask", {"cap": 5.0, "floor": 0.4}, [[0, 1, 4], [0.5, 0, 1]]),
        ("sequence_truncate", {}, [[1, 1, 1], [3, 3, 1]]),
        ("sequence_mask", {}, [[1, 1, 1], [0, 0, 1]]),
        ("sequence_mask", {"cap": 4.5}, [[1, 1, 1], [4, 4, 1]]),
    ],
)
def test_closed_forms(mode, options, wanted):
    weights, _ = correction(mode, **options)
    np.testing.assert_allclose(weights, [*wanted, [1, 1, 1]], rtol=1e-6)


def test_every_mode_has_a_closed_form():
    modes = {arguments[0] for arguments in test_closed_forms.pytestmark[0].args[1]}
    assert modes == set(IMPORTANCE_SAMPLING_CORRECTIONS)


def test_metrics_are_those_of_the_raw_ratio():
    """Tokens 0.25, 1, 4, 0.5, 8 have mean 2.75; rows 1 and 4. |ln ρ| is (2, 0, 2, 1, 3)·ln 2."""
    shared = {"sampling/sampling_logp_difference/mean": 1.6 * np.log(2)}
    shared["sampling/sampling_logp_difference/max"] = 3 * np.log(2)
    ratio = "sampling/importance_sampling_ratio"
    tokens = {f"{ratio}/min": 0.25, f"{ratio}/mean": 2.75, f"{ratio}/max": 8}
    rows = {f"{ratio}/min": 1, f"{ratio}/mean": 2.5, f"{ratio}/max": 4}
    corrected = "sampling/importance_sampling_corrected"
    for mode, wanted in {
        "none": tokens | {corrected: 0},
        "token_truncate": tokens | {corrected: 2 / 5},
        "token_mask": tokens | {corrected: 2 / 5},
        "sequence_truncate": rows | {corrected: 1 / 2},
        "sequence_mask": rows | {corrected: 1 / 2},
    }.items():
        assert finalize(correction(mode)[1]) == pytest.approx(shared | wanted, rel=1e-5)


def test_the_bounds_themselves_are_inside():
    """Of the ratios 0.25, 1, 4 and 0.5, 8 (as exp rounds them) 0.5 and 4 stay, 0.25 and 8 go."""
    ratio = np.asarray(jnp.exp(jnp.log(RATIO)))
    weights, metrics = correction("token_mask", floor=float(ratio[1, 0]), cap=float(ratio[0, 2]))
    np.testing.assert_array_equal(weights, np.where(MASK, ratio * (ratio != ratio[0, 0]) * (ratio < 5), 1))
    assert finalize(metrics)["sampling/importance_sampling_corrected"] == 2 / 5


def test_equal_policies_are_not_corrected():
    logp = -jnp.arange(9.0).reshape(3, 3)
    for mode in IMPORTANCE_SAMPLING_CORRECTIONS:
        weights, metrics = importance_sampling_correction(logp, logp, MASK, mode=mode)
        assert np.all(weights == 1)
        assert finalize(metrics)["sampling/sampling_logp_difference/max"] == 0


def test_long_products_stay_finite():
    """Two or three tokens at ρ = e^30: the product counts as e^20."""
    logp = jnp.zeros((3, 3))
    weights, metrics = importance_sampling_correction(
        logp, logp - 30, MASK, mode="sequence_truncate", cap=float("inf")
    )
    np.testing.assert_allclose(weights, np.where(MASK, np.exp(20), 1), rtol=1e-6)
    assert finalize(metrics)["sampling/importance_sampling_ratio/max"] == pytest.approx(np.exp(20), rel=1e-6)


def test_weights_carry_no_gradient():
    def total(old_logp, behaviour_logp):
        return jnp.sum(
            importance_sampling_correction(old_logp, behaviour_logp, MASK, mode="token_truncate")[0]
        )

    assert not np.any(jax.grad(total, argnums=(0, 1))(jnp.log(RATIO), jnp.zeros((3, 3))))


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="'truncate'; one of none, token_truncate"):
        correction("truncate")
    with pytest.raises(ValueError, match=r"floor=0.0 and cap=0.5"):
        correction("token_mask", cap=0.5)


# log π_behaviour − log π by token, NaN where masked; means over tokens 0.5, 1, −2 and none
DRIFT = np.array([[0, 1, np.nan], [1, 1, 1], [-2, np.nan, -2], [np.nan] * 3], np.float32)


def off_policy(advantages, threshold):
    mask = ~np.isnan(DRIFT)
    return off_policy_sequence_mask(
        jnp.full((4, 3), -1.0), jnp.asarray(DRIFT - 1), jnp.asarray(advantages), mask, threshold=threshold
    )


def test_off_policy_mask_drops_bad_rows_that_are_far_away():
    """A < 0: the second row alone is above 0.5; the first is at the bound, which is inside."""
    weights, metrics = off_policy(-np.ones((4, 1)), 0.5)
    assert weights.tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 1], [1, 1, 1]]
    assert finalize(metrics) == {"sampling/off_policy_masked": pytest.approx(3 / 7)}
    assert off_policy(-np.ones((4, 1)), 0.4)[0].tolist() == [[0, 0, 1], [0, 0, 0], [1, 1, 1], [1, 1, 1]]
    assert np.all(off_policy(-np.ones((4, 1)), float("inf"))[0] == 1)


def test_off_policy_mask_keeps_what_counts_in_favour():
    """Of advantages that differ along the row, the negative ones are dropped."""
    advantages = np.array([[-1, 1, -1], [-1, 0, 2], [-1, -1, -1], [-1, -1, -1]], np.float32)
    weights, metrics = off_policy(advantages, 0.25)
    assert weights.tolist() == [[0, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]]
    assert finalize(metrics) == {"sampling/off_policy_masked": pytest.approx(2 / 7)}


def test_off_policy_mask_carries_no_gradient():
    def total(logp, behaviour_logp, a):
        weights, _ = off_policy_sequence_mask(logp, behaviour_logp, a, MASK, threshold=0.5)
        return jnp.sum(weights)

    x = jnp.zeros((3, 3))
    for gradient in jax.grad(total, argnums=(0, 1, 2))(x - 1, x, x - 1):
        assert not np.any(gradient)
