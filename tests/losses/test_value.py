"""The clipped value loss, and the loss that suppresses a predecessor's errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import clipped_value_loss, error_suppression, finalize


def value_loss(values, old_values, returns, **options):
    """Loss and gradient of a row of tokens, and the metrics."""
    v, old, r = (jnp.atleast_2d(jnp.asarray(x, float)) for x in (values, old_values, returns))

    def total(x):
        loss, metrics = clipped_value_loss(x, old, r, jnp.ones(v.shape, bool), **options)
        return jnp.sum(loss), (loss, metrics)

    gradient, (loss, metrics) = jax.jit(jax.grad(total, has_aux=True))(v)
    return np.asarray(loss)[0], np.asarray(gradient)[0], finalize(metrics)


def test_values_in_every_corner():
    """V_old = 0, ε = 0.5; V and R, the errors of V and of the clipped value:

    V = 1, R = 2: 1² < 1.5²: clipped, ½·2.25     V = 1, R = −1: 2² > 1.5²: ½·4, gradient 2
    V = −1, R = −2: clipped, ½·2.25              V = 0.25, R = 1: inside, ½·0.5625, gradient −0.75
    V = 1, R = 0.75: a tie of ¼: not clipped, ½/16, gradient ¼
    """
    loss, gradient, metrics = value_loss([1, 1, -1, 0.25, 1], [0] * 5, [2, -1, -2, 1, 0.75], epsilon=0.5)
    np.testing.assert_array_equal(loss, [1.125, 2, 1.125, 0.28125, 0.03125])
    np.testing.assert_array_equal(gradient, [0, 2, 0, -0.75, 0.25])
    assert metrics == {"clip_ratio/value": pytest.approx(0.4)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_value_on_the_bound_keeps_its_gradient(dtype):
    """V − V_old = ±0.5 exactly, towards the return; maximum would halve the gradient."""
    with jax.enable_x64(dtype == np.float64):
        arrays = np.array([[0.75, 0.25], [0.25, 0.75], [2, -2]], dtype)
        _, gradient, metrics = value_loss(*arrays, epsilon=0.5)
        np.testing.assert_array_equal(gradient, arrays[0] - arrays[2])
        assert metrics["clip_ratio/value"] == 0


def test_the_loss_is_the_larger_of_two():
    rng = np.random.default_rng(0)
    v, old, r = rng.normal(size=(3, 200)).astype(np.float32)
    loss, gradient, metrics = value_loss(v, old, r, epsilon=0.3)
    plain, bounded = (v - r) ** 2 / 2, (old + np.clip(v - old, -0.3, 0.3) - r) ** 2 / 2
    np.testing.assert_allclose(loss, np.maximum(plain, bounded), rtol=1e-5)
    is_clipped = bounded > plain * (1 + 1e-5)
    np.testing.assert_allclose(gradient, np.where(is_clipped, 0, v - r), rtol=1e-5)
    assert 0.1 < metrics["clip_ratio/value"] == pytest.approx(is_clipped.mean())


def test_a_common_shift_of_values_and_returns_changes_nothing():
    arrays = np.random.default_rng(1).integers(-8, 8, (3, 50)) / 4
    for one, other in zip(value_loss(*arrays, epsilon=0.25), value_loss(*(arrays + 16), epsilon=0.25)):
        np.testing.assert_equal(one, other)


def test_errors_by_hand():
    """π = (½, ¼, ⅛, ⅛); y = 0, the predecessor said 1, 0, 2. κ = 0.5, β = 2, margin ln 2.

    e = 1: ln 2 + 2·ln(1 + 2·½) = 3·ln 2    e = 0: ½·ln 2    e = 2: ln 2 + 2·ln(1 + 2·¼) = ln 2 + 2·ln 1.5
    """
    ln2 = float(np.log(2))
    logits = np.tile(np.log([0.5, 0.25, 0.125, 0.125]), (1, 3, 1))
    y, e, mask = np.array([[0, 0, 0]]), np.array([[1, 0, 2]]), jnp.ones((1, 3), bool)
    loss, metrics = error_suppression(logits, y, e, mask, beta=2.0, margin=ln2, correct_weight=0.5)
    np.testing.assert_allclose(loss, [[3 * ln2, ln2 / 2, ln2 + 2 * np.log(1.5)]], rtol=1e-6)
    wanted = {"nll": ln2, "predecessor_error_ratio": 2 / 3, "suppressed_ratio": 1}
    assert finalize(metrics) == pytest.approx(wanted)


def test_closed_form_gradient_of_error_suppression():
    """w·(π − 1_y) + β·1[e ≠ y]·σ(z_e − z_y + margin)·(1_e − 1_y), by logits."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        z, y, e = rng.normal(0, 2, (4, 6, 5)), rng.integers(0, 5, (4, 6)), rng.integers(0, 5, (4, 6))
        e[0] = y[0]
        options = {"beta": 0.7, "margin": 0.3, "correct_weight": 0.2}
        gradient = jax.jit(jax.grad(lambda z: jnp.sum(suppression_loss(z, y, e, **options))))(z)
        one_y, one_e, is_error = np.eye(5)[y], np.eye(5)[e], (e != y)[..., None]
        p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        gap = np.sum(z * (one_e - one_y), axis=-1, keepdims=True) + 0.3
        wanted = np.where(is_error, 1, 0.2) * (p - one_y)
        wanted += 0.7 * is_error / (1 + np.exp(-gap)) * (one_e - one_y)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-11, atol=1e-14)


def suppression_loss(z, y, e, **options):
    return error_suppression(z, y, e, jnp.ones(y.shape, bool), **options)[0]


def test_logits_matter_up_to_a_constant_and_the_wrong_token_falls():
    z = np.array([[[0.5, 1.0, -0.25, 2.0]]])
    y, e = jnp.array([[0]]), jnp.array([[3]])
    of = jax.jit(jax.value_and_grad(lambda z, beta: suppression_loss(z, y, e, beta=beta)[0, 0]))
    value, gradient = of(z, 0.5)
    np.testing.assert_allclose(of(z + 64, 0.5)[0], value, rtol=1e-6)
    gradient, plain = gradient[0, 0], of(z, 0.0)[1][0, 0]
    assert gradient[3] > plain[3] > 0 > plain[0] > gradient[0]
    np.testing.assert_allclose(gradient[1:3], plain[1:3], rtol=1e-6)  # β touches those two alone


def test_padding_ids_of_any_size_are_harmless():
    """Token ids beyond the vocabulary, as where padding is −100."""
    z, mask = jnp.zeros((1, 3, 4)), jnp.array([[True, False, False]])
    y, e = jnp.array([[1, -100, 2]]), jnp.array([[1, 10**6, -100]])
    total = jax.jit(jax.value_and_grad(lambda z: jnp.sum(error_suppression(z, y, e, mask)[0])))
    loss, gradient = total(z)
    assert loss == pytest.approx(np.log(4)) and np.all(gradient[0, 1:] == 0)


def test_bad_arguments_are_named():
    x, mask = jnp.zeros((2, 3)), jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match=r"epsilon=-0\.1"):
        clipped_value_loss(x, x, x, mask, epsilon=-0.1)
    with pytest.raises(ValueError, match=r"returns \(2,\)"):
        clipped_value_loss(x, x, x[:, 0], mask)
    with pytest.raises(ValueError, match=r"logits \(2, 3\)"):
        error_suppression(x, mask, mask, mask)
