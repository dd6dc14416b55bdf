"""KL estimators by exact enumeration of a small categorical: expected values and expected gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import (
    KL_ESTIMATORS,
    finalize,
    kl_k3,
    kl_k3_corrected,
    kl_k3_score_corrected,
    kl_k3_straight_through,
)

LOGITS = np.array([0.3, -1.2, 0.8, 2.0])
REF_LOGITS = np.array([1.0, 0.5, -0.7, 0.4])
OLD_LOGITS = np.array([-0.5, 0.9, 0.3, 1.1])


def expected(name, logits, ref_logits, old_logits):
    """Σ_y p_old(y)·estimator(y), the sampling probabilities held constant as they are in training."""
    logp, ref_logp, old_logp = (jax.nn.log_softmax(x)[None] for x in (logits, ref_logits, old_logits))
    loss, _ = KL_ESTIMATORS[name](logp, ref_logp, jnp.ones(logp.shape, bool), old_logp=old_logp)
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(old_logp)) * loss)


def kl(p_logits, q_logits):
    p, q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    return jnp.sum(jnp.exp(p) * (p - q))


def reverse(logits):
    return kl(logits, REF_LOGITS)


def forward(logits):
    return kl(REF_LOGITS, logits)


@pytest.mark.parametrize(
    "name, gradient_of",
    [
        ("k1", None),
        ("k2", reverse),
        ("k3", forward),
        ("k3_corrected", reverse),
        ("k3_score_corrected", reverse),
        ("k3_straight_through", reverse),
    ],
)
def test_expected_gradient_on_policy(name, gradient_of):
    with jax.enable_x64(True):
        logits = jnp.asarray(LOGITS)
        gradient = jax.grad(lambda x: expected(name, x, REF_LOGITS, jax.lax.stop_gradient(x)))(logits)
        wanted = jnp.zeros(4) if gradient_of is None else jax.grad(gradient_of)(logits)
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-14)
        other = jax.grad(forward if gradient_of is reverse else reverse)(logits)
        assert np.max(np.abs(gradient - other)) > 0.05  # the two directions can be told apart here


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_expected_value_on_policy(name):
    with jax.enable_x64(True):
        logits = jnp.asarray(LOGITS)
        error = float(expected(name, logits, REF_LOGITS, logits) - reverse(logits))
    assert (abs(error) < 1e-14) == (name != "k2")


def test_the_corrected_form_is_right_for_tokens_of_an_older_policy():
    """Value and gradient of KL(π‖ref) under p_old; none of the plain forms has that gradient."""
    with jax.enable_x64(True):
        logits = jnp.asarray(LOGITS)
        wanted, wanted_gradient = jax.value_and_grad(reverse)(logits)
        for name in KL_ESTIMATORS:
            value, gradient = jax.value_and_grad(lambda x, n=name: expected(n, x, REF_LOGITS, OLD_LOGITS))(
                logits
            )
            is_right = name == "k3_corrected"
            assert (abs(value - wanted) < 1e-14) == is_right
            assert (np.max(np.abs(gradient - wanted_gradient)) < 1e-14) == is_right


WEIGHTS = {
    "k1": lambda x, d: jnp.ones_like(x),
    "k2": lambda x, d: x,
    "k3": lambda x, d: 1 - jnp.exp(-x),
    "k3_corrected": lambda x, d: jnp.exp(d) * x,
    "k3_score_corrected": lambda x, d: x,
    "k3_straight_through": lambda x, d: x,
}
"""Of ∇log π in a token's gradient, by x = log π − log π_ref and d = log π − log π_old."""


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_gradient_weights(name):
    """Of every token, and so of the expectation over tokens of an older policy."""
    with jax.enable_x64(True):
        logp, ref_logp, old_logp = (jax.nn.log_softmax(x)[None] for x in (LOGITS, REF_LOGITS, OLD_LOGITS))

        def total(x):
            return jnp.sum(KL_ESTIMATORS[name](x, ref_logp, jnp.ones((1, 4), bool), old_logp=old_logp)[0])

        weights = WEIGHTS[name](logp - ref_logp, logp - old_logp)
        np.testing.assert_allclose(jax.grad(total)(logp), weights, rtol=1e-13)
        gradient = jax.grad(lambda x: expected(name, x, REF_LOGITS, OLD_LOGITS))(jnp.asarray(LOGITS))
        weighted = jnp.exp(old_logp) * weights  # Σ_y π_old(y)·w(y)·(e_y − π)
        wanted = weighted - jnp.sum(weighted) * jnp.exp(logp)
        np.testing.assert_allclose(gradient, wanted[0], rtol=0, atol=1e-14)


def test_k1_off_policy_moves_away_from_the_old_policy():
    """Its gradient does not know the reference: it is that of −KL(π_old‖π)."""
    with jax.enable_x64(True):
        logits = jnp.asarray(LOGITS)
        gradient = jax.grad(lambda x: expected("k1", x, REF_LOGITS, OLD_LOGITS))(logits)
        wanted = jax.grad(lambda x: -kl(OLD_LOGITS, x))(logits)
    np.testing.assert_allclose(gradient, wanted, atol=1e-14)


def test_closed_forms():
    """x = ln 2 (π twice the reference), −ln 2, 0, and ln 2 where masked.

    k1: ±0.693147; k2: 0.693147²/2 = 0.240227; k3: 1/2 + 0.693147 − 1 = 0.193147 and
    2 − 0.693147 − 1 = 0.306853; corrected, π_old = π/3: three times k3.
    """
    logp, ref_logp = jnp.log(jnp.array([[0.4, 0.4, 0.3, 0.4]])), jnp.log(jnp.array([[0.2, 0.8, 0.3, 0.2]]))
    mask, old_logp = jnp.array([[True, True, True, False]]), logp - np.log(3)
    wanted = {
        "k1": [0.693147, -0.693147, 0, 0],
        "k2": [0.240227, 0.240227, 0, 0],
        "k3": [0.193147, 0.306853, 0, 0],
        "k3_corrected": [0.579442, 0.920558, 0, 0],
        "k3_score_corrected": [0.193147, 0.306853, 0, 0],
        "k3_straight_through": [0.193147, 0.306853, 0, 0],
    }
    assert wanted.keys() == KL_ESTIMATORS.keys()
    for name, values in wanted.items():
        loss, metrics = KL_ESTIMATORS[name](logp, ref_logp, mask, old_logp=old_logp)
        np.testing.assert_allclose(loss, [values], rtol=1e-5, atol=1e-7)
        assert finalize(metrics)["kl"] == pytest.approx(sum(values) / 3, rel=1e-5, abs=1e-6)


def test_the_clamp_is_counted_and_has_no_gradient():
    """x = −1000 would be e^1000: it counts as x = −20, e^20 − 21. At x = −1 the gradient is 1 − e."""
    logp, zeros, mask = jnp.array([[-1000.0, -1, 0, 0]]), jnp.zeros((1, 4)), jnp.ones((1, 4), bool)
    loss, metrics = kl_k3(logp, zeros, mask)
    assert float(loss[0, 0]) == pytest.approx(np.exp(20) - 21, rel=1e-6)
    assert finalize(metrics)["kl_clamped_ratio"] == 0.25
    gradient = jax.grad(lambda x: jnp.sum(kl_k3(x, zeros, mask)[0]))(logp)
    np.testing.assert_allclose(gradient, [[0, 1 - np.e, 0, 0]], rtol=1e-6)


def test_the_value_clamp_is_counted_and_has_no_gradient():
    """k3 at x = −1, −2, −3 is e − 2 = 0.718, e² − 3 = 4.389, e³ − 4 = 16.1; the clamp itself is inside."""
    logp, zeros, mask = jnp.array([[-1.0, -2, -3, -1000]]), jnp.zeros((1, 4)), jnp.ones((1, 4), bool)
    clamp = float(jnp.expm1(2.0) - 2.0)
    loss, metrics = kl_k3(logp, zeros, mask, value_clamp=clamp)
    np.testing.assert_allclose(loss, [[0.718282, clamp, clamp, clamp]], rtol=1e-5)
    numbers = finalize(metrics)
    assert numbers["kl_value_clamped_ratio"] == 0.5 and numbers["kl_clamped_ratio"] == 0.25
    assert numbers["kl"] == pytest.approx((0.718282 + 3 * clamp) / 4, rel=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(kl_k3(x, zeros, mask, value_clamp=clamp)[0]))(logp)
    np.testing.assert_allclose(gradient, [[1 - np.e, 1 - np.exp(2), 0, 0]], rtol=1e-6)
    with pytest.raises(ValueError, match="value_clamp=0 must be above 0"):
        kl_k3(logp, zeros, mask, value_clamp=0)


def test_beyond_the_clamps_the_corrected_forms_differ():
    """x = −25: k3 = e^20 − 21 in both. The score's part of the gradient stays; straight through it is x."""
    logp, zeros, mask = jnp.array([[-25.0]]), jnp.zeros((1, 1)), jnp.ones((1, 1), bool)
    forms = (kl_k3_score_corrected, np.exp(20) - 21), (kl_k3_straight_through, -25)
    for estimator, wanted in forms:
        value, gradient = jax.value_and_grad(lambda x, f=estimator: jnp.sum(f(x, zeros, mask)[0]))(logp)
        assert float(value) == pytest.approx(np.exp(20) - 21, rel=1e-6)
        np.testing.assert_allclose(gradient, [[wanted]], rtol=1e-6)
    loss, metrics = kl_k3_straight_through(logp, zeros, mask, value_clamp=10.0)
    assert loss.tolist() == [[10.0]] and finalize(metrics)["kl_value_clamped_ratio"] == 1


def test_either_clamp_of_the_corrected_form_is_counted():
    """Tokens beyond the clamp in x, in log r, in both, in neither."""
    logp = jnp.array([[-100.0, -1, -100, -1]])
    ref_logp, old_logp = jnp.array([[0.0, 0, 0, 0]]), jnp.array([[-100.0, -90, -1, -1]])
    _, metrics = kl_k3_corrected(logp, ref_logp, jnp.ones((1, 4), bool), old_logp=old_logp)
    assert finalize(metrics)["kl_clamped_ratio"] == 0.75


def test_a_small_kl_survives_float32():
    """At x = 1e-4, k3 = 5e-9, less than the spacing of float32 numbers around 1."""
    loss, _ = kl_k3(jnp.full((1, 4), 1e-4), jnp.zeros((1, 4)), jnp.ones((1, 4), bool))
    assert float(loss[0, 0]) == pytest.approx(5e-9, rel=0.01)
