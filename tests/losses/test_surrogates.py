"""Closed forms of the surrogates, and what they reduce to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import SURROGATES, finalize, ppo_clip, reinforce


def value_and_grad(ratio, advantages, surrogate=ppo_clip, **options):
    """Token losses and their gradient by logp, for one row with old_logp = 0 (padded to 4 tokens)."""
    n = len(ratio)
    logp = jnp.log(jnp.asarray(np.append(ratio, np.ones(4 - n)), jnp.result_type(float)))[None]
    zeros, mask = jnp.zeros_like(logp), jnp.arange(4)[None] < n
    a = jnp.asarray(np.append(advantages, np.zeros(4 - n)), logp.dtype)[None]

    def total(x):
        loss, metrics = surrogate(x, zeros, a, mask, **options)
        return jnp.sum(loss), (loss, metrics)

    gradient, (loss, metrics) = jax.grad(total, has_aux=True)(logp)
    return np.asarray(loss)[0, :n], np.asarray(gradient)[0, :n], finalize(metrics)


def test_clip_in_all_four_corners():
    """ε = 0.2. Loss −A·r inside; the gradient by logp of −A·r is −A·r.

    r = 0.5, A = +2: a bad move, not clipped      loss −1.0   gradient −1.0
    r = 1.5, A = +2: beyond 1.2, clipped          loss −2.4   gradient 0
    r = 0.5, A = −2: below 0.8, clipped           loss  1.6   gradient 0
    r = 1.5, A = −2: a bad move, not clipped      loss  3.0   gradient 3.0
    """
    loss, gradient, metrics = value_and_grad([0.5, 1.5, 0.5, 1.5], [2, 2, -2, -2])
    np.testing.assert_allclose(loss, [-1.0, -2.4, 1.6, 3.0], rtol=1e-6)
    np.testing.assert_allclose(gradient, [-1.0, 0, 0, 3.0], rtol=1e-6)
    assert metrics == {
        "clip_ratio/low_mean": 1 / 4,
        "clip_ratio/high_mean": 1 / 4,
        "clip_ratio/region_mean": 2 / 4,
        "clamped_ratio": 0,
    }


def test_no_clip_inside():
    loss, gradient, metrics = value_and_grad([1.1, 0.9, 1.1, 0.9], [2, 2, -2, -2])
    np.testing.assert_allclose(loss, [-2.2, -1.8, 2.2, 1.8], rtol=1e-6)
    np.testing.assert_allclose(gradient, loss, rtol=1e-6)
    assert not any(metrics.values())


def test_upper_bound_of_its_own():
    """ε = 0.2, ε_high = 0.5: r = 1.4 is inside, r = 0.7 still outside."""
    loss, gradient, _ = value_and_grad([1.4, 1.6, 0.7], [1, 1, -1], epsilon_high=0.5)
    np.testing.assert_allclose(loss, [-1.4, -1.5, 0.8], rtol=1e-6)
    np.testing.assert_allclose(gradient, [-1.4, 0, 0], rtol=1e-6)


def test_dual_clip_acts_on_negative_advantages_alone():
    """δ = 3, ε off: A = −1 at r = 2 has loss 2, at r = 5 no more than 3; A = +1 at r = 5 is untouched."""
    loss, gradient, metrics = value_and_grad([2.0, 5.0, 5.0], [-1, -1, 1], epsilon=float("inf"), delta=3.0)
    np.testing.assert_allclose(loss, [2.0, 3.0, -5.0], rtol=1e-6)
    np.testing.assert_allclose(gradient, [2.0, 0, -5.0], rtol=1e-6)
    assert metrics["clip_ratio/dual_mean"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_bounds_themselves_are_inside(dtype):
    """At r = 1+ε, 1−ε and δ exactly the gradient is the full −A·r, not 0 and not the half of a tie."""
    with jax.enable_x64(dtype == np.float64):
        wished = [1.25, 0.75, 3.0, 1.0]
        high, low, dual, _ = jnp.exp(jnp.log(jnp.array(wished, dtype))).tolist()  # as exp rounds them
        advantages = np.array([2.0, -2.0, -2.0, 1.0])
        _, gradient, metrics = value_and_grad(
            wished, advantages, epsilon=1 - low, epsilon_high=high - 1, delta=dual
        )
        np.testing.assert_allclose(gradient, -advantages * wished, rtol=1e-6)
        assert not any(metrics.values())
        _, gradient, metrics = value_and_grad(
            wished, advantages, epsilon=1 - low - 1e-6, epsilon_high=high - 1 - 1e-6, delta=dual - 1e-6
        )
        assert gradient.tolist() == [0, 0, 0, -1]
        assert metrics["clip_ratio/region_mean"] == 0.5 and metrics["clip_ratio/dual_mean"] == 0.25


def test_beyond_the_clamp_there_is_no_gradient():
    """At log-ratio +100 and A < 0 the loss is −A·e^20."""
    loss, gradient, metrics = value_and_grad([np.exp(80), 2.0], [-1.0, -1.0])
    np.testing.assert_allclose(loss, [np.exp(20), 2], rtol=1e-5)
    np.testing.assert_allclose(gradient, [0, 2], rtol=1e-6)
    assert metrics["clamped_ratio"] == 0.5


def test_reinforce_weighs_log_probs():
    """−A·logp and −A: logp = ln 0.5, A = 2 gives 2·ln 2."""
    loss, gradient, _ = value_and_grad([0.5, 0.25], [2.0, -1.0], reinforce)
    np.testing.assert_allclose(loss, [2 * np.log(2), -2 * np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(gradient, [-2, 1])


@pytest.mark.parametrize("options", [{}, {"epsilon": float("inf")}, {"epsilon_high": 0.28, "delta": 3.0}])
def test_on_policy_ppo_is_reinforce(options):
    """Where r = 1, any clip leaves exactly REINFORCE's gradient, even if old_logp is logp itself."""
    logp = jnp.array([[-0.1, -1.0, -2.0, -9.0]])
    advantages, mask = jnp.array([[1.5, -2.0, 0.0, 3.0]]), jnp.array([[True, True, True, False]])
    ppo = jax.grad(lambda x: jnp.sum(ppo_clip(x, x, advantages, mask, **options)[0]))(logp)
    plain = jax.grad(lambda x: jnp.sum(reinforce(x, x, advantages, mask)[0]))(logp)
    assert ppo.tolist() == plain.tolist() == [[-1.5, 2, 0, 0]]


def test_off_policy_without_clip_is_importance_weighted_reinforce():
    ratio, advantages = [0.2, 0.9, 1.7, 6.0], [1.0, -1.0, 2.0, -3.0]
    _, gradient, _ = value_and_grad(ratio, advantages, epsilon=float("inf"))
    np.testing.assert_allclose(gradient, -np.array(advantages) * np.array(ratio), rtol=1e-6)


@pytest.mark.parametrize("name", SURROGATES)
def test_advantages_of_rows_are_those_of_their_tokens(name):
    rng = np.random.default_rng(1)
    logp, old_logp = -rng.uniform(0, 1, (2, 4, 4)).astype(np.float32)
    rows = rng.normal(size=(4, 1)).astype(np.float32)
    mask = rng.random((4, 4)) > 0.3
    mask[2] = False
    tokens = np.broadcast_to(rows, (4, 4)).copy()
    surrogate = jax.jit(SURROGATES[name])
    by_row, by_token = (surrogate(logp, old_logp, a, mask) for a in (rows, tokens))
    jax.tree.map(np.testing.assert_array_equal, by_row, by_token)
    rows[2] = np.nan  # a row without a token may have any advantage
    jax.tree.map(np.testing.assert_array_equal, by_row, surrogate(logp, old_logp, rows, mask))
    with pytest.raises(ValueError, match=r"advantages\[:, None\]"):  # would be taken for tokens, as N = T
        SURROGATES[name](logp, old_logp, rows[:, 0], mask)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epsilon": -0.1}, "epsilon=-0.1"),
        ({"epsilon_high": -1.0}, "epsilon_high=-1.0"),
        ({"delta": 1.0}, "delta=1.0"),
    ],
)
def test_bad_options_are_named(options, message):
    x = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match=message):
        ppo_clip(x, x, x, jnp.ones((1, 1), bool), **options)
