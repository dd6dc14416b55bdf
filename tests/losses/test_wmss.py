"""WMSS: the loss of mixed logits and its gradient, and the weights that samples are drawn with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_kernels.linear_logprob import linear_logprob
from jaxrl_llm.losses import finalize, negative_log_likelihood, wmss, wmss_sampling_weights

TOKENS = np.array([[0, 3, 1], [2, 2, 4]])
MASK = np.array([[True, True, False], [True, True, True]])
rng = np.random.default_rng(0)
STRONG, WEAK = (3 * rng.normal(size=(2, 3, 5)) for _ in range(2))


def run(strong, weak, **options):
    """The losses and the gradients of their sum by both models' logits."""

    def total(strong, weak):
        loss, _ = wmss(strong, weak, TOKENS, MASK, **options)
        return jnp.sum(loss), loss

    with jax.enable_x64(True):
        gradients, loss = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(strong, weak)
    return np.asarray(loss), *map(np.asarray, gradients)


@pytest.mark.parametrize("mixing", [0.25, 0.5])
def test_gradient_is_the_mixtures_error_shared_out(mixing):
    """λ·(p_mix − e_y) and (1−λ)·(p_mix − e_y)."""
    loss, strong, weak = run(STRONG, WEAK, mixing=mixing)
    p = np.asarray(jax.nn.softmax(jnp.asarray(mixing * STRONG + (1 - mixing) * WEAK), axis=-1), np.float64)
    error = np.where(MASK[..., None], p - np.eye(5)[TOKENS], 0)
    np.testing.assert_allclose(strong, mixing * error, atol=1e-6)
    np.testing.assert_allclose(weak, (1 - mixing) * error, atol=1e-6)
    np.testing.assert_allclose(np.exp(-loss[MASK]), p[MASK][np.arange(5), TOKENS[MASK]], rtol=1e-5)


def test_a_frozen_weak_model_gets_no_gradient():
    both, frozen = run(STRONG, WEAK), run(STRONG, WEAK, freeze_weak=True)
    np.testing.assert_array_equal(both[0], frozen[0])
    np.testing.assert_array_equal(both[1], frozen[1])
    assert np.any(both[2] != 0) and np.all(frozen[2] == 0)


def test_a_weak_model_equal_to_the_strong_one():
    """The mixture has the strong model's logits; its gradient is shared out, λ and 1 − λ."""
    loss, strong, weak = run(STRONG, STRONG, mixing=0.25)
    alone, gradient, _ = run(STRONG, WEAK, mixing=1.0)
    np.testing.assert_allclose(loss, alone, rtol=1e-12)
    np.testing.assert_allclose(strong, 0.25 * gradient, atol=1e-15)
    np.testing.assert_allclose(weak, 0.75 * gradient, atol=1e-15)


def test_a_constant_in_either_models_logits_changes_nothing():
    shift = rng.normal(size=(2, 3, 1)) * 5
    wanted = run(STRONG, WEAK)
    for arrays in ((STRONG + shift, WEAK), (STRONG, WEAK + shift)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), run(*arrays), wanted)


def strong_gradient(margin, weak_margin, mixing):
    """Of two tokens, the first of which is right: the size of the strong model's gradient."""
    logits = (jnp.array([[[m, 0.0]]]) for m in (margin, weak_margin))
    mask = jnp.ones((1, 1), bool)
    gradient = jax.grad(lambda x, w: jnp.sum(wmss(x, w, jnp.array([[0]]), mask, mixing=mixing)[0]))(*logits)
    return float(jnp.abs(gradient[0, 0, 0]))


def test_the_mixture_keeps_the_gradient_up_once_the_margins_part():
    """λ = ½, m_w = 8: more than plain training once m_s − m_w > 2·ln 2 = 1.386; at 4, ½·e² = 3.69 times."""
    for difference, is_more in ((1.3, False), (1.5, True)):
        mixed, plain = (strong_gradient(8 + difference, 8.0, mixing) for mixing in (0.5, 1.0))
        assert (mixed > plain) == is_more
    factor = strong_gradient(12.0, 8.0, 0.5) / strong_gradient(12.0, 8.0, 1.0)
    assert factor == pytest.approx(np.exp(2) / 2, rel=0.01)


def test_the_mixture_is_one_model_with_states_and_heads_side_by_side():
    """So large vocabularies need no logits."""
    d = np.random.default_rng(1)
    hidden, weak_hidden = (d.normal(size=(6, n)).astype(np.float32) for n in (4, 3))
    head, weak_head = (d.normal(size=(9, n)).astype(np.float32) for n in (4, 3))
    tokens, mixing = d.integers(0, 9, 6), 0.3
    joined = np.concatenate([mixing * hidden, (1 - mixing) * weak_hidden], axis=1)
    logp = linear_logprob(joined, np.concatenate([head, weak_head], axis=1), jnp.asarray(tokens))[0]
    logits, weak_logits = hidden @ head.T, weak_hidden @ weak_head.T
    mask = jnp.ones((1, 6), bool)
    loss, metrics = wmss(logits[None], weak_logits[None], tokens[None], mask, mixing=mixing)
    wanted, same = negative_log_likelihood(logp[None], mask)
    np.testing.assert_allclose(loss, wanted, rtol=1e-4)
    assert finalize(metrics) == pytest.approx(finalize(same), rel=1e-4)


BEFORE = jnp.array([1.0, 2.0, 1.0, 0.0])
AFTER = jnp.array([0.5, 0.5, 2.0, 0.0])


def test_sampling_weights_have_three_masses():
    """H0/ΣH0 = (¼, ½, ¼, 0); ΔH = (−½, −1½, 1, 0): consolidation (¼, ¾, 0, 0), repair (0, 0, 1, 0)."""
    p, metrics = wmss_sampling_weights(BEFORE, AFTER)
    np.testing.assert_allclose(p, [0.025 + 0.2, 0.05 + 0.6, 0.025 + 0.1, 0], rtol=1e-6)
    assert finalize(metrics) == pytest.approx({"wmss/entropy_change": -0.25, "wmss/rebound": 0.25})
    for masses, wanted in (((1, 0, 0), [1 / 4, 1 / 2, 1 / 4, 0]), ((0, 0, 2), [0, 0, 1, 0])):
        names = dict(zip(("difficulty", "consolidation", "repair"), masses))
        np.testing.assert_allclose(wmss_sampling_weights(BEFORE, AFTER, **names)[0], wanted, rtol=1e-6)


def test_without_a_rebound_the_third_term_is_left_out():
    """ΔH = −H0: what is left of the masses, 0.1 and 0.8, both go by H0."""
    p, _ = wmss_sampling_weights(BEFORE, jnp.zeros(4))
    np.testing.assert_allclose(p, BEFORE / 4, rtol=1e-6)


def test_sampling_weights_without_any_entropy_are_uniform():
    p, _ = wmss_sampling_weights(jnp.zeros(4), jnp.zeros(4), jnp.array([True, True, False, True]))
    np.testing.assert_allclose(p, [1 / 3, 1 / 3, 0, 1 / 3], rtol=1e-6)


def test_what_is_not_valid_is_not_drawn():
    """Rows 1 and 2 alone; a NaN elsewhere does not matter. No valid row: zeros."""
    valid = jnp.array([False, True, True, False])
    p, _ = wmss_sampling_weights(BEFORE.at[3].set(jnp.nan), AFTER.at[0].set(jnp.inf), valid)
    np.testing.assert_allclose(p, [0, 0.2 / 3 + 0.8, 0.1 / 3 + 0.1, 0], rtol=1e-6)
    p, metrics = wmss_sampling_weights(BEFORE, AFTER, jnp.zeros(4, bool))
    assert p.tolist() == [0, 0, 0, 0] and finalize(metrics) == {}


def test_errors_name_the_value():
    with pytest.raises(ValueError, match=r"mixing=0 must lie in \(0, 1\]"):
        wmss(STRONG, WEAK, TOKENS, MASK, mixing=0)
    with pytest.raises(ValueError, match=r"weak_logits \(2, 3, 4\)"):
        wmss(STRONG, WEAK[..., :4], TOKENS, MASK)
    with pytest.raises(ValueError, match="repair=-1"):
        wmss_sampling_weights(BEFORE, AFTER, repair=-1)
