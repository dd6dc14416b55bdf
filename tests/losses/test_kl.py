"""KL estimators by exact enumeration of a small categorical: expected values and expected gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import KL_ESTIMATORS, finalize, kl_k3, kl_k3_corrected

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
    [("k1", None), ("k2", reverse), ("k3", forward), ("k3_corrected", reverse)],
)
def test_expected_gradient_on_policy(name, gradient_of):
    with jax.enable_x64(True):
        logits = jnp.asarray(LOGITS)
        gradient = jax.grad(lambda x: expected(name, x, REF_LOGITS, jax.lax.stop_gradient(x)))(logits)
        wanted = jnp.zeros(4) if gradient_of is None else jax.grad(gradient_of)(logits)
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-14)
        other = jax.grad(forward if gradient_of is reverse else reverse)(logits)
        assert np.max(np.abs(gradient - other)) > 0.05  # the two directions can be told apart here


@pytest.mark.parametrize(
    "name, is_unbiased", [("k1", True), ("k2", False), ("k3", True), ("k3_corrected", True)]
)
def test_expected_value_on_policy(name, is_unbiased):
    with jax.enable_x64(True):
        logits = jnp.asarray(LOGITS)
        error = float(expected(name, logits, REF_LOGITS, logits) - reverse(logits))
    assert (abs(error) < 1e-14) == is_unbiased


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
