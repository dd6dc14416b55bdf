"""DynaMO's factors: the entropy change against a finite step of the logits, closed forms and bounds."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_kernels.linear_distribution import linear_collision
from jaxrl_llm.advantages import (
    MODULATIONS,
    entropy_change,
    modulation_extremes,
    modulation_weights,
)
from jaxrl_llm.advantages.modulation import EXPECTATIONS
from jaxrl_llm.losses import finalize

LOGITS = np.array([[0.3, -1.2, 2.0, 0.9, -0.4], [0.0, 0.0, 0.0, 0.0, 0.0], [6.0, 0.0, -1.0, 1.0, 0.5]])


def entropy_of(logits):
    logp = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def every_token(logits, advantage=1.0):
    """ΔH for each token of each distribution as the one drawn, on-policy: [rows, V]."""
    logp = jax.nn.log_softmax(jnp.asarray(logits))
    collision = jnp.sum(jnp.exp(2 * logp) * (logp + entropy_of(logits)[:, None]), axis=-1)
    ones = jnp.ones_like(logp)
    mask = ones > 0
    change, _ = entropy_change(
        logp, logp, advantage * ones, mask, ones * entropy_of(logits)[:, None], ones * collision[:, None]
    )
    return logp, change


def test_change_of_entropy_is_the_derivative_along_the_step():
    """[H(z + ηξ(1[a] − π)) − H(z − …)]/2η for each of five tokens under three distributions."""
    with jax.enable_x64(True):
        for advantage in (1.0, -2.5):
            logp, change = every_token(LOGITS, advantage)
            eta = 1e-5 * advantage
            step = eta * (np.eye(5) - np.exp(logp)[:, None, :])  # [rows, drawn, V]
            up, down = (entropy_of(LOGITS[:, None, :] + sign * step) for sign in (1, -1))
            np.testing.assert_allclose(change, (up - down) / 2e-5, rtol=1e-6, atol=1e-9)
            mean = np.sum(np.exp(logp) * change, axis=1)  # over the token drawn, at constant ξ
            np.testing.assert_allclose(mean, 0, atol=1e-12)


def test_gradient_of_a_log_prob_fades_with_confidence():
    """‖∂ log π_a/∂z‖² = 1 − 2π_a + Σπ² for every token, on average 1 − Σπ², at most the entropy."""
    with jax.enable_x64(True):
        p = jax.nn.softmax(LOGITS)
        norm = np.sum((np.eye(5) - p[:, None, :]) ** 2, axis=-1)
        square = np.sum(p**2, axis=1)
        np.testing.assert_allclose(norm, 1 - 2 * p + square[:, None], rtol=1e-10)
        np.testing.assert_allclose(np.sum(p * norm, axis=1), 1 - square, rtol=1e-10)
        assert np.all(1 - square <= entropy_of(LOGITS))


def test_the_kernel_gives_the_covariance():
    """Σπ²Λ from hidden states and head is what `entropy_change` asks for."""
    logits = LOGITS.astype(np.float32)
    covariance = jax.jit(linear_collision)(jnp.array(logits), jnp.eye(5)).covariance
    logp, wanted = every_token(logits)
    mask = np.ones((3, 1), bool)
    change, _ = entropy_change(
        logp[:, 2:3], logp[:, 2:3], mask * 1.0, mask, entropy_of(logits)[:, None], covariance[:, None]
    )
    np.testing.assert_allclose(change[:, 0], wanted[:, 2], rtol=1e-5, atol=1e-7)


def test_step_is_zero_where_the_clip_acts():
    """ξ = r·A inside; r = 1.3 with A > 0 is beyond 1.28, r = 0.7 with A < 0 below 0.8; other signs stay."""
    r, a = np.array([[1.2, 1.3, 0.7, 0.7, 1.3, 1.0]]), np.array([[2.0, 2, -2, 2, -2, 0]])
    logp, mask = jnp.full((1, 6), -1.0), np.ones((1, 6), bool)
    h, covariance = np.full((1, 6), 1.5), np.full((1, 6), 0.1)
    change, _ = entropy_change(logp, logp - np.log(r), a, mask, h, covariance)
    own = np.exp(-1) * 0.5 - 0.1  # π·(log π + H) − Σπ²Λ
    np.testing.assert_allclose(change, -own * np.array([[2.4, 0, 0, 1.4, -2.6, 0]]), rtol=1e-5)


def test_sequence_mean():
    """The mean of π_a·Λ_a over the row's tokens: ¼(1.5 − ln 4) and ½(1.5 − ln 2) here, halved."""
    logp = jnp.log(jnp.array([[0.25, 0.5, 0.9]]))
    mask, h = np.array([[True, True, False]]), np.full((1, 3), 1.5)
    own = np.array([0.25 * (1.5 - np.log(4)), 0.5 * (1.5 - np.log(2))])
    change, _ = entropy_change(logp, logp, np.ones((1, 1)), mask, h, expectation="sequence_mean")
    np.testing.assert_allclose(change, [[*(own.mean() - own), 0]], rtol=1e-5, atol=1e-7)


def test_closed_form():
    """μ = 1.4, λ = 0.6, γ = 2, x₀ = ½ on entropies 0, 1, 2 and changes 0, −4, 2 of at most 4.

    β_comp: (2 − H)/2 = 1, ½, 0 for A > 0, so 1.4, 1.2 and, A < 0, 1
    β_stab: σ(2(½ − x)) at x = 0, 1, ½: σ(1), σ(−1), ½
    """
    h, change = jnp.array([[0.0, 1, 2]]), jnp.array([[0.0, -4, 2]])
    a, mask = jnp.array([[0.5, 3, -1]]), jnp.ones((1, 3), bool)
    extremes = modulation_extremes(h, change, mask)
    weights, metrics = modulation_weights(
        a, h, change, mask, extremes, max_boost=1.4, min_stability=0.6, steepness=2.0, midpoint=0.5
    )
    sigmoid = 1 / (1 + np.exp([-1.0, 1.0, 0.0]))
    np.testing.assert_allclose(weights[0], np.array([1.4, 1.2, 1]) * (0.6 + 0.4 * sigmoid), rtol=1e-6)
    assert finalize(metrics) == pytest.approx(
        {"modulation/compensation": 1.3, "modulation/stability": np.mean(0.6 + 0.4 * sigmoid)}
    )


@cache
def weigher(**options):
    """(advantages, entropy, change) -> factors under the batch's own extremes, compiled once."""

    def weigh(a, h, change):
        mask = jnp.ones(h.shape, bool)
        return modulation_weights(a, h, change, mask, modulation_extremes(h, change, mask), **options)[0]

    return jax.jit(weigh)


tokens = st.lists(st.floats(-2, 2, width=32, allow_subnormal=False), min_size=6, max_size=6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(a=tokens, h=tokens, change=tokens, mode=st.sampled_from(list(MODULATIONS)))
def test_properties(a, h, change, mode):
    """Bounds, signs, direction; equal extremes and μ = λ = 1 leave the advantages as they are."""
    a, h, change = (np.array(x, np.float32).reshape(2, 3) for x in (a, np.abs(h), change))
    options = MODULATIONS[mode]
    weights, compensation, stability, none = (
        np.asarray(weigher(**(options | alone))(a, h, change))
        for alone in (
            {},
            {"min_stability": 1.0},
            {"max_boost": 1.0},
            {"max_boost": 1.0, "min_stability": 1.0},
        )
    )
    low, high = options["min_stability"], options["max_boost"]
    assert np.all(weights >= low * (1 - 1e-6)) and np.all(weights <= high * (1 + 1e-6))  # so signs stay
    np.testing.assert_allclose(weights, compensation * stability, rtol=1e-6)
    assert np.all(none == 1)

    assert np.all(compensation >= 1) and np.all(compensation[a <= 0] == 1)
    assert np.all(np.diff(compensation[a > 0][np.argsort(h[a > 0])]) <= 1e-6)
    assert np.all(stability <= 1)
    assert np.all(np.diff(stability.ravel()[np.argsort(np.abs(change).ravel())]) <= 1e-6)

    assert np.all(weigher(**options)(a, np.full_like(h, 0.7), 0 * change) == 1)


def test_scale_of_the_change_has_no_effect():
    h, change, mask = jnp.ones((1, 3)), jnp.array([[0.1, -0.4, 0.38]]), jnp.ones((1, 3), bool)
    one, many = (
        modulation_weights(h, h, c, mask, modulation_extremes(h, c, mask))[0] for c in (change, 64 * change)
    )
    np.testing.assert_array_equal(one, many)


def test_extremes_of_pieces_and_of_nothing():
    """The least and the greatest of two pieces are the whole's; without a token every factor is 1."""
    rng = np.random.default_rng(0)
    h, change, mask = rng.random((4, 3)), rng.normal(size=(4, 3)), rng.random((4, 3)) > 0.3
    whole = modulation_extremes(h, change, mask)
    a, b = (modulation_extremes(h[rows], change[rows], mask[rows]) for rows in (slice(1), slice(1, 4)))
    pieces = (
        jnp.minimum(a.entropy_low, b.entropy_low),
        jnp.maximum(a.entropy_high, b.entropy_high),
        jnp.maximum(a.change_high, b.change_high),
    )
    np.testing.assert_array_equal(whole, pieces)
    none = modulation_extremes(h, change, np.zeros_like(mask))
    assert np.all(modulation_weights(h, h, change, mask, none)[0] == 1)


def test_an_entropy_beyond_the_extremes_counts_as_them():
    one, mask = jnp.ones((1, 2)), jnp.ones((1, 2), bool)
    extremes = modulation_extremes(jnp.array([[1.0, 2.0]]), 0 * one, mask)
    weights, _ = modulation_weights(one, jnp.array([[0.5, 5.0]]), 0 * one, mask, extremes, max_boost=1.5)
    np.testing.assert_allclose(weights, [[1.5, 1.0]], rtol=1e-6)


def test_errors_name_what_is_wrong():
    x, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    assert EXPECTATIONS == ("exact", "sequence_mean")
    with pytest.raises(ValueError, match="expectation 'mean'; one of exact, sequence_mean"):
        entropy_change(x, x, x, mask, x, expectation="mean")
    with pytest.raises(ValueError, match="needs covariance"):
        entropy_change(x, x, x, mask, x)
    with pytest.raises(ValueError, match=r"covariance \(1, 1\)"):
        entropy_change(x, x, x, mask, x, x[:, :1])
    extremes = modulation_extremes(x, x, mask)
    with pytest.raises(ValueError, match=r"max_boost=0\.5"):
        modulation_weights(x, x, x, mask, extremes, max_boost=0.5)
    with pytest.raises(ValueError, match=r"min_stability=1\.5"):
        modulation_weights(x, x, x, mask, extremes, min_stability=1.5)
    with pytest.raises(ValueError, match="advantages"):
        modulation_weights(jnp.zeros(2), x, x, mask, extremes)
