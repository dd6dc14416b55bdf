"""Closed forms of the surrogates, and what they reduce to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.losses import (
    AGGREGATIONS,
    SURROGATES,
    aggregate,
    cispo,
    dgpo,
    finalize,
    gspo,
    ppo_clip,
    reinforce,
)


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


def test_on_policy_every_surrogate_is_reinforce():
    """At r = 1 nothing is clipped: gradient −A·∇log π. Under gspo that is so for one advantage a row."""
    logp, mask = jnp.array([[-0.1, -1.0, -2.0, -9.0]]), jnp.array([[True, True, True, False]])
    for name, surrogate in SURROGATES.items():
        gradient = jax.grad(lambda x, f=surrogate: jnp.sum(f(x, x, jnp.array([[1.5]]), mask)[0]))(logp)
        np.testing.assert_allclose(gradient, [[-1.5, -1.5, -1.5, 0]], rtol=1e-6, err_msg=name)


def rows_of(ratios, advantages, surrogate, **options):
    """As `value_and_grad`, for rows [N, 4] of ratios; NaN is a token that does not count."""
    ratios = np.asarray(ratios)
    logp, a = jnp.log(jnp.asarray(ratios, jnp.float32)), jnp.asarray(advantages, jnp.float32)

    def total(x):
        loss, metrics = surrogate(x, jnp.zeros_like(x), a, ~np.isnan(ratios), **options)
        return jnp.sum(loss), (loss, metrics)

    gradient, (loss, metrics) = jax.grad(total, has_aux=True)(logp)
    return np.asarray(loss), np.asarray(gradient), finalize(metrics)


NAN = float("nan")


@pytest.mark.parametrize("form", ["sequence", "token"])
def test_gspo_clips_the_geometric_mean(form):
    """ε = 0.2; s = √(0.5·2) = 1, ∛(2·4·1) = 2, 0.5 over one token, and √(9·1) = 3.

    s = 1, A = 3: inside           loss −3 at both tokens    gradient −3
    s = 2, A = 2: clipped at 1.2   loss −2.4 at all three    gradient 0
    s = 0.5, A = −1: clipped       loss 0.8                  gradient 0
    s = 3, A = −1: a bad move      loss 3                    gradient 3
    """
    ratios = [[0.5, NAN, 2, NAN], [2, 4, 1, NAN], [NAN, NAN, NAN, 0.5], [9, 1, NAN, NAN]]
    loss, gradient, metrics = rows_of(
        ratios, [[3], [2], [-1], [-1]], gspo, epsilon=0.2, epsilon_high=None, form=form
    )
    wanted = [[-3, 0, -3, 0], [-2.4, -2.4, -2.4, 0], [0, 0, 0, 0.8], [3, 3, 0, 0]]
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-3, 0, -3, 0], [0] * 4, [0] * 4, [3, 3, 0, 0]], rtol=1e-6)
    assert metrics == pytest.approx(
        {"clip_ratio/low_mean": 1 / 8, "clip_ratio/high_mean": 3 / 8, "clip_ratio/region_mean": 4 / 8}
        | {"clamped_ratio": 0}
    )


def test_gspo_forms_differ_in_who_gets_the_gradient():
    """s = 2, no clip, A = 3, 0 and −1: −s·A_u by token, −s·(3 + 0 − 1)/3 each by sequence."""
    options = {"epsilon": float("inf"), "epsilon_high": None}
    arrays = [[2.0, 4, 1, NAN]], [[3.0, 0, -1, 0]]
    by_sequence, by_token = (rows_of(*arrays, gspo, form=form, **options) for form in ("sequence", "token"))
    np.testing.assert_allclose(by_sequence[0], [[-6, 0, 2, 0]], rtol=1e-6)
    np.testing.assert_array_equal(by_sequence[0], by_token[0])
    np.testing.assert_allclose(by_sequence[1], [[-4 / 3] * 3 + [0]], rtol=1e-6)
    np.testing.assert_allclose(by_token[1], [[-6, 0, 2, 0]], rtol=1e-6)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_gspo_forms_agree_on_advantages_of_sequences(mode):
    rng = np.random.default_rng(0)
    logp, old_logp = -rng.uniform(0, 1, (2, 5, 6)).astype(np.float32)
    a, mask = rng.normal(size=(5, 1)), rng.random((5, 6)) > 0.4

    def total(x, form):
        loss, _ = gspo(x, old_logp, a, mask, epsilon=0.1, epsilon_high=0.1, form=form)
        return aggregate(loss, mask, mode, norm=6.0).sum

    by_sequence, by_token = (jax.value_and_grad(total)(logp, form) for form in ("sequence", "token"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), by_sequence, by_token)


def test_gspo_of_one_token_is_ppo():
    ratios, advantages = [0.5, 1.5, 0.5, 1.5], [2, 2, -2, -2]
    ppo_loss, ppo_gradient, _ = value_and_grad(ratios, advantages, ppo_clip)
    column = np.array(ratios)[:, None], np.array(advantages)[:, None]
    loss, gradient, _ = rows_of(*column, gspo, epsilon=0.2, epsilon_high=0.2)
    np.testing.assert_allclose(loss[:, 0], ppo_loss, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, 0], ppo_gradient, rtol=1e-6)


@pytest.mark.parametrize("form", ["sequence", "token"])
def test_gspo_beyond_the_clamp(form):
    """Mean log-ratio (60 + 20)/2 = 40: loss −A·e^20 and no gradient."""
    loss, gradient, metrics = rows_of([[np.exp(60), np.exp(20)]], [[-1.0]], gspo, form=form)
    np.testing.assert_allclose(loss, [[np.exp(20)] * 2], rtol=1e-5)
    assert gradient.tolist() == [[0, 0]] and metrics["clamped_ratio"] == 1


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
    "surrogate, options, message",
    [
        (ppo_clip, {"epsilon": -0.1}, "epsilon=-0.1"),
        (ppo_clip, {"epsilon_high": -1.0}, "epsilon_high=-1.0"),
        (ppo_clip, {"delta": 1.0}, "delta=1.0"),
        (gspo, {"epsilon": -0.1}, "epsilon=-0.1"),
        (gspo, {"form": "row"}, "form 'row'; one of sequence, token"),
        (cispo, {"epsilon_high": -1.0}, "epsilon_high=-1.0"),
        (dgpo, {"epsilon": -0.1}, "epsilon=-0.1"),
        (dgpo, {"left_decay": -0.5}, "left_decay=-0.5"),
        (dgpo, {"right_decay": 0.5}, "right_decay=0.5"),
    ],
)
def test_bad_options_are_named(surrogate, options, message):
    x = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match=message):
        surrogate(x, x, x, jnp.ones((1, 1), bool), **options)
