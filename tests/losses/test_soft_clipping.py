"""Surrogates whose tokens keep a gradient beyond the bounds: what is particular to each.

Closed forms of all weights on a grid of ratios are in test_surrogates.py.
"""

import numpy as np
import pytest
from closed_form import value_and_grad
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.losses import aspo, ce_gppo, cispo, dgpo, gppo, ppo_clip, sapo

INFINITE = float("inf")


def test_cispo_keeps_every_gradient():
    """Gradient −A·clip(r, 0.8, 1.4), whatever the sign of A; the value is that times log r (old_logp = 0)."""
    ratio, a = np.array([0.5, 2.0, 0.5, 2.0]), np.array([2.0, 2.0, -2.0, -2.0])
    weight = np.array([0.8, 1.4, 0.8, 1.4])
    loss, gradient, metrics = value_and_grad(ratio, a, cispo, epsilon=0.2, epsilon_high=0.4)
    np.testing.assert_allclose(gradient, -a * weight, rtol=1e-6)
    np.testing.assert_allclose(loss, -a * weight * np.log(ratio), rtol=1e-6)
    assert metrics == pytest.approx(
        {"clip_ratio/low_mean": 0.5, "clip_ratio/high_mean": 0.5, "clip_ratio/region_mean": 1}
        | {"clamped_ratio": 0}
    )
    _, gradient, metrics = value_and_grad(ratio, a, cispo, epsilon=float("inf"), epsilon_high=0.4)
    np.testing.assert_allclose(gradient, -a * np.array([0.5, 1.4, 0.5, 1.4]), rtol=1e-6)
    assert metrics["clip_ratio/low_mean"] == 0


def dgpo_weight(ratio, advantage, **options):
    """w = r̃ by its two ways: from the value −A·r̃ and from the gradient −A·w."""
    loss, gradient, _ = value_and_grad(ratio, [advantage] * len(ratio), dgpo, **options)
    np.testing.assert_allclose(gradient, loss, rtol=1e-6)
    return -gradient / advantage


def test_dgpo_in_all_four_corners():
    """ε = 0.2, ε_high = 0.5, n = 2, m = 3.

    r = 0.4, A < 0: 0.4³/0.8² = 0.1         r = 12, A > 0: 12^⅔·1.5^⅓ = (144·1.5)^⅓ = 6
    r = 0.4, A > 0 and r = 12, A < 0: r
    """
    options = {"epsilon_high": 0.5, "left_decay": 2, "right_decay": 3}
    loss, gradient, metrics = value_and_grad([0.4, 12, 0.4, 12], [-1, 1, 1, -1], dgpo, **options)
    np.testing.assert_allclose(loss, [0.1, -6, -0.4, 12], rtol=1e-6)
    np.testing.assert_allclose(gradient, loss, rtol=1e-6)
    assert metrics == pytest.approx(
        {"clip_ratio/low_mean": 0.25, "clip_ratio/high_mean": 0.25, "clip_ratio/region_mean": 0.5}
        | {"clamped_ratio": 0}
    )


@settings(max_examples=20, deadline=None, derandomize=True)
@given(n=st.floats(1, 4), m=st.floats(1.1, 8), epsilon=st.floats(0.05, 0.5), high=st.floats(0.05, 0.5))
def test_dgpo_decays_monotonically_from_the_bounds(n, m, epsilon, high):
    options = {"epsilon": epsilon, "epsilon_high": high, "left_decay": n, "right_decay": m}
    low, high = 1 - epsilon, 1 + high
    left = np.array([1e-6, 0.3, 0.9, 0.99999]) * low
    w = dgpo_weight(left, -1.0, **options)
    assert np.all(np.diff(w) > 0) and np.all(w <= left)
    assert np.all(np.diff(w / left) > 0)  # of the gradient by π, for w/r is W·π_old; it goes to 0 for n ≥ 1
    assert w[0] / left[0] < 2e-6
    np.testing.assert_allclose(w[-1], low, rtol=1e-3)  # continuous
    right = np.array([1.00001, 1.1, 3, 1e6]) * high
    w = dgpo_weight(right, 1.0, **options)
    assert np.all(np.diff(w) > 0) and np.all(np.diff(w / right) < 0)
    np.testing.assert_allclose(w[0], high, rtol=1e-3)


def test_dgpo_reduces_to_no_clip_a_constant_weight_and_the_hard_clip():
    left, right = np.array([0.1, 0.5, 0.79]), np.array([1.21, 2.0, 50.0])
    np.testing.assert_allclose(dgpo_weight(left, -1.0, left_decay=0), left, rtol=1e-6)
    np.testing.assert_allclose(dgpo_weight(left[:2], -1.0, left_decay=200.0), [0, 0], atol=1e-30)
    np.testing.assert_allclose(dgpo_weight(right, 1.0, right_decay=float("inf")), right, rtol=1e-6)
    constant = dgpo_weight(right, 1.0, right_decay=1)
    np.testing.assert_allclose(constant, 1.2, rtol=1e-6)
    np.testing.assert_allclose(constant, -value_and_grad(right, [1.0] * 3, cispo)[1], rtol=1e-6)
    for epsilon in (1.0, float("inf")):  # nothing lies below a bound of 0 or less
        np.testing.assert_allclose(dgpo_weight(left, -1.0, epsilon=epsilon), left, rtol=1e-6)
    np.testing.assert_allclose(dgpo_weight(right, 1.0, epsilon=float("inf")), right, rtol=1e-6)


def test_dgpo_is_unclipped_ppo_wherever_nothing_is_clipped():
    """Inside the bounds, and beyond them on the side where A pulls back: loss and gradient, exactly."""
    for ratio, a in (([0.8001, 1.0, 1.1999], 2.0), ([0.01, 0.5, 0.79], 1.0), ([1.21, 3.0, 90.0], -1.0)):
        ours, plain = (
            value_and_grad(ratio, [a] * 3, surrogate, **options)[:2]
            for surrogate, options in ((dgpo, {}), (ppo_clip, {"epsilon": INFINITE}))
        )
        np.testing.assert_array_equal(ours, plain)


def test_as_a_token_vanishes_dgpo_lets_go_of_it_and_gppo_does_not():
    """Of the gradient by π itself, W·π_old = w/r; at r = 0.1 w = 0.1²/0.8 = 0.0125 and 0.8."""
    r = np.array([0.1, 1e-2, 1e-3, 1e-4])
    ours = dgpo_weight(r, -1.0, left_decay=1)
    theirs = value_and_grad(r, [-1.0] * 4, gppo)[1]
    np.testing.assert_allclose([ours[0], theirs[0]], [0.0125, 0.8], rtol=1e-6)
    assert np.all(np.diff(ours / r) < 0) and ours[-1] / r[-1] < 2e-4
    np.testing.assert_allclose(theirs / r, 0.8 / r, rtol=1e-6)


def test_gppo_clips_the_value_alone():
    """Its loss is PPO's everywhere, its gradient beyond the bounds that of CISPO."""
    ratio, a = [0.5, 2.0, 0.9, 2.0], [-1.0, 1.0, 1.0, -1.0]
    loss, gradient, metrics = value_and_grad(ratio, a, gppo, epsilon_high=0.5)
    ppo_loss, ppo_gradient, ppo_metrics = value_and_grad(ratio, a, ppo_clip, epsilon_high=0.5)
    np.testing.assert_allclose(loss, ppo_loss, rtol=1e-6)
    assert metrics == ppo_metrics
    _, cispo_gradient, _ = value_and_grad(ratio, a, cispo, epsilon_high=0.5)
    np.testing.assert_allclose(gradient[:2], cispo_gradient[:2], rtol=1e-6)
    np.testing.assert_allclose(gradient[2:], ppo_gradient[2:], rtol=1e-6)


def test_ce_gppo_scales_the_two_sides():
    """β1·(1 − 0.2) = 0.4 and β2·(1 + 0.5) = 1.2; the dual clip stops at δ = 3 where A < 0."""
    options = {"epsilon_high": 0.5, "beta1": 0.5, "beta2": 0.8, "delta": 3.0}
    loss, gradient, metrics = value_and_grad([0.1, 9.0, 9.0, 2.0], [-1, 1, -1, -1], ce_gppo, **options)
    np.testing.assert_allclose(loss, [0.4, -1.2, 3, 2], rtol=1e-6)
    np.testing.assert_allclose(gradient, [0.4, -1.2, 0, 2], rtol=1e-6)
    assert metrics == pytest.approx(
        {"clip_ratio/low_mean": 0.25, "clip_ratio/high_mean": 0.25, "clip_ratio/region_mean": 0.5}
        | {"clip_ratio/dual_mean": 0.25, "clamped_ratio": 0}
    )


def test_aspo_turns_the_weights_of_good_tokens_round():
    """A > 0: r = 0.5 counts 2, r = 1.1 counts 1/1.1, r = 0.1 the cap 3 and r = 1.5 nothing (loss −1/1.2)."""
    loss, gradient, metrics = value_and_grad([0.5, 1.1, 0.1, 1.5], [1.0] * 4, aspo)
    np.testing.assert_allclose(loss, [-2, -1 / 1.1, -3, -1 / 1.2], rtol=1e-6)
    np.testing.assert_allclose(gradient, [-2, -1 / 1.1, -3, 0], rtol=1e-6)
    assert metrics == pytest.approx(
        {"clip_ratio/low_mean": 0, "clip_ratio/high_mean": 0.25, "clip_ratio/region_mean": 0.25}
        | {"clip_ratio/dual_mean": 0.25, "clamped_ratio": 0}
    )


def test_aspo_on_bad_tokens_is_ppo_under_a_soft_cap():
    """A < 0: r = 0.5 is clipped at 0.8, r = 5 counts 3 and keeps its gradient."""
    loss, gradient, metrics = value_and_grad([0.5, 0.9, 2.0, 5.0], [-1.0] * 4, aspo)
    np.testing.assert_allclose(loss, [0.8, 0.9, 2, 3], rtol=1e-6)
    np.testing.assert_allclose(gradient, [0, 0.9, 2, 3], rtol=1e-6)
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/dual_mean"] == 0.25


def test_sapo_by_hand():
    """σ(0) = ½, σ(±2·0.5) at τ = 2: −A·(4/τ)·σ, gate 4σ(1−σ) = 4·0.7310586·0.2689414 = 0.7864477."""
    options = {"temperature_pos": 2.0, "temperature_neg": 4.0}
    loss, gradient, _ = value_and_grad([1.0, 1.5, 0.5, 1.25], [3.0, 1.0, 1.0, -1.0], sapo, **options)
    np.testing.assert_allclose(loss, [-3, -2 * 0.7310586, -2 * 0.2689414, 0.7310586], rtol=1e-6)
    wanted = [-3, -1.5 * 0.7864477, -0.5 * 0.7864477, 1.25 * 0.7864477]
    np.testing.assert_allclose(gradient, wanted, rtol=1e-6)


def test_sapo_gate_falls_on_both_sides_faster_for_a_larger_temperature():
    ratio = np.array([0.4, 0.7, 1.0, 1.3])
    steep, flat = (
        value_and_grad(ratio, [-1.0] * 4, sapo, temperature_neg=tau)[1] / ratio for tau in (3.0, 1.0)
    )
    assert steep[2] == flat[2] == 1
    others = [0, 1, 3]
    assert np.all(steep[others] < flat[others]) and np.all(flat[others] < 1)
    assert steep[0] < steep[1] and steep[1] == pytest.approx(steep[3], rel=1e-5)


@pytest.mark.parametrize("surrogate", [dgpo, gppo, ce_gppo, aspo, sapo])
@pytest.mark.parametrize("a", [1.0, -1.0])
def test_beyond_the_clamp_there_is_no_gradient(surrogate, a):
    loss, gradient, metrics = value_and_grad([np.exp(30), np.exp(-30), 1.0], [a] * 3, surrogate)
    assert np.all(np.isfinite(loss)) and gradient[0] == gradient[1] == 0 and gradient[2] == -a
    assert metrics["clamped_ratio"] == pytest.approx(2 / 3)
