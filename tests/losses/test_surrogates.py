"""Closed forms of the surrogates, and what they reduce to."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import NAN, rows_of, value_and_grad

from jaxrl_llm.losses import (
    AGGREGATIONS,
    SURROGATES,
    aggregate,
    aspo,
    ce_gppo,
    cispo,
    clip_cov,
    dgpo,
    dppo,
    finalize,
    gppo,
    gspo,
    kl_cov,
    log_ratio,
    ppo_clip,
    reinforce,
    sapo,
    sequence_log_ratio,
)
from jaxrl_llm.losses.surrogates import binary_kl


def test_clip_in_all_four_corners():
    """ε = 0.2. Loss −A·r inside; the gradient by logp of −A·r is −A·r.

    r = 0.5, A = +2: a bad move, not clipped      loss −1.0   gradient −1.0
    r = 1.5, A = +2: beyond 1.2, clipped          loss −2.4   gradient 0
    r = 0.5, A = −2: below 0.8, clipped           loss  1.6   gradient 0
    r = 1.5, A = −2: a bad move, not clipped      loss  3.0   gradient 3.0
    """
    loss, gradient, metrics = value_and_grad([0.5, 1.5, 0.5, 1.5], [2, 2, -2, -2], ppo_clip)
    np.testing.assert_allclose(loss, [-1.0, -2.4, 1.6, 3.0], rtol=1e-6)
    np.testing.assert_allclose(gradient, [-1.0, 0, 0, 3.0], rtol=1e-6)
    assert metrics == {
        "clip_ratio/low_mean": 1 / 4,
        "clip_ratio/high_mean": 1 / 4,
        "clip_ratio/region_mean": 2 / 4,
        "clamped_ratio": 0,
    }


def test_no_clip_inside():
    loss, gradient, metrics = value_and_grad([1.1, 0.9, 1.1, 0.9], [2, 2, -2, -2], ppo_clip)
    np.testing.assert_allclose(loss, [-2.2, -1.8, 2.2, 1.8], rtol=1e-6)
    np.testing.assert_allclose(gradient, loss, rtol=1e-6)
    assert not any(metrics.values())


def test_upper_bound_of_its_own():
    """ε = 0.2, ε_high = 0.5: r = 1.4 is inside, r = 0.7 still outside."""
    loss, gradient, _ = value_and_grad([1.4, 1.6, 0.7], [1, 1, -1], ppo_clip, epsilon_high=0.5)
    np.testing.assert_allclose(loss, [-1.4, -1.5, 0.8], rtol=1e-6)
    np.testing.assert_allclose(gradient, [-1.4, 0, 0], rtol=1e-6)


def test_dual_clip_acts_on_negative_advantages_alone():
    """δ = 3, ε off: A = −1 at r = 2 has loss 2, at r = 5 no more than 3; A = +1 at r = 5 is untouched."""
    options = {"epsilon": float("inf"), "delta": 3.0}
    loss, gradient, metrics = value_and_grad([2.0, 5.0, 5.0], [-1, -1, 1], ppo_clip, **options)
    np.testing.assert_allclose(loss, [2.0, 3.0, -5.0], rtol=1e-6)
    np.testing.assert_allclose(gradient, [2.0, 0, -5.0], rtol=1e-6)
    assert metrics["clip_ratio/dual_mean"] == pytest.approx(1 / 3)


def as_rounded(ratios, dtype):
    """Ratios as the surrogates see them, after log and exp."""
    return jnp.exp(jnp.asarray(np.log(ratios), dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_bounds_themselves_are_inside(dtype):
    """At r = 1+ε, 1−ε and δ exactly the gradient is the full −A·r, not 0 and not the half of a tie."""
    with jax.enable_x64(dtype == np.float64):
        wished = [1.25, 0.75, 3.0, 1.0]
        high, low, dual, _ = as_rounded(wished, dtype).tolist()
        advantages = np.array([2.0, -2.0, -2.0, 1.0])
        _, gradient, metrics = value_and_grad(
            wished, advantages, ppo_clip, epsilon=1 - low, epsilon_high=high - 1, delta=dual
        )
        np.testing.assert_allclose(gradient, -advantages * wished, rtol=1e-6)
        assert not any(metrics.values())
        options = {"epsilon": 1 - low - 1e-6, "epsilon_high": high - 1 - 1e-6, "delta": dual - 1e-6}
        _, gradient, metrics = value_and_grad(wished, advantages, ppo_clip, **options)
        assert gradient.tolist() == [0, 0, 0, -1]
        assert metrics["clip_ratio/region_mean"] == 0.5 and metrics["clip_ratio/dual_mean"] == 0.25


def test_beyond_the_clamp_there_is_no_gradient():
    """At log-ratio +100 and A < 0 the loss is −A·e^20."""
    loss, gradient, metrics = value_and_grad([np.exp(80), 2.0], [-1.0, -1.0], ppo_clip)
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
    _, gradient, _ = value_and_grad(ratio, advantages, ppo_clip, epsilon=float("inf"))
    np.testing.assert_allclose(gradient, -np.array(advantages) * np.array(ratio), rtol=1e-6)


def test_on_policy_every_surrogate_is_reinforce():
    """At r = 1 nothing is clipped: gradient −A·∇log π. Under gspo that is so for one advantage a row."""
    logp, mask = jnp.array([[-0.1, -1.0, -2.0, -9.0]]), jnp.array([[True, True, True, False]])
    for name, surrogate in SURROGATES.items():
        gradient = jax.grad(lambda x, f=surrogate: jnp.sum(f(x, x, jnp.array([[1.5]]), mask)[0]))(logp)
        np.testing.assert_allclose(gradient, [[-1.5, -1.5, -1.5, 0]], rtol=1e-6, err_msg=name)


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


LOW, HIGH, DUAL = 0.75, 1.25, 3.0
RATIOS = [1e-6, 0.1, 0.3, 0.5, 0.74, LOW, 0.9, 1.0, 1.1, HIGH, 1.26, 2.0, DUAL, 3.5, 50.0, 1e6]


def inside_or(r, a, low_weight, high_weight, inside):
    """w of the surrogates with bounds on r: one below LOW where A < 0, one above HIGH where A > 0."""
    return np.where((r < LOW) & (a < 0), low_weight, np.where((r > HIGH) & (a > 0), high_weight, inside))


def gate(r, tau):
    sigmoid = 1 / (1 + np.exp(-np.clip(tau * (r - 1), None, 500)))
    return 4 * sigmoid * (1 - sigmoid)


CLOSED_FORMS = {  # w(r, A) of the gradient −A·w·∇log π, as in the tables of `losses`
    "reinforce": (reinforce, lambda r, a: np.ones_like(r)),
    "ppo_clip": (ppo_clip, lambda r, a: inside_or(r, a, 0, 0, r)),
    "ppo_clip dual": (
        partial(ppo_clip, delta=DUAL),
        lambda r, a: inside_or(r, a, 0, 0, np.where((r > DUAL) & (a < 0), 0, r)),
    ),
    "cispo": (cispo, lambda r, a: np.clip(r, LOW, HIGH)),
    "dgpo": (
        partial(dgpo, left_decay=1.5, right_decay=3.0),
        lambda r, a: inside_or(r, a, r**2.5 / LOW**1.5, r ** (2 / 3) * HIGH ** (1 / 3), r),
    ),
    "gppo": (gppo, lambda r, a: inside_or(r, a, LOW, HIGH, r)),
    "ce_gppo": (
        partial(ce_gppo, beta1=0.5, beta2=0.9, delta=DUAL),
        lambda r, a: inside_or(r, a, 0.5 * LOW, 0.9 * HIGH, np.where((r > DUAL) & (a < 0), 0, r)),
    ),
    "aspo": (
        partial(aspo, cap=DUAL),
        lambda r, a: inside_or(r, a, 0, 0, np.minimum(np.where(a > 0, 1 / r, r), DUAL)),
    ),
    "sapo": (
        partial(sapo, temperature_pos=0.8, temperature_neg=1.3),
        lambda r, a: gate(r, np.where(a > 0, 0.8, 1.3)) * r,
    ),
    "clip_cov": (lambda *x, **k: clip_cov(*x, x[3] & False, **k), lambda r, a: inside_or(r, a, 0, 0, r)),
    "kl_cov": (lambda *x: kl_cov(*x, x[3], coefficient=0.3), lambda r, a: r - 0.3 * np.sign(np.log(r)) / a),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_form_weights(name):
    """On a grid of ratios, the bounds themselves included, and for both signs of A."""
    surrogate, weight = CLOSED_FORMS[name]
    with jax.enable_x64(True):
        r = np.tile(as_rounded(RATIOS, np.float64), 2)
        a = np.repeat([1.5, -0.5], len(RATIOS))
        edges = {x: float(as_rounded([x], np.float64)[0]) for x in (LOW, HIGH)}
        options = {"epsilon": 1 - edges[LOW], "epsilon_high": edges[HIGH] - 1}
        parameters = inspect.signature(surrogate).parameters
        is_bounded = "epsilon" in parameters or name == "clip_cov"
        _, gradient, _ = value_and_grad(RATIOS * 2, a, surrogate, **(options if is_bounded else {}))
        r = np.where(r == edges[LOW], LOW, np.where(r == edges[HIGH], HIGH, r))
        np.testing.assert_allclose(gradient, -a * weight(r, a), rtol=1e-9, atol=1e-12)


def test_every_surrogate_has_a_closed_form():
    """Of those with a weight for each token's ratio; DPPO's, of two probabilities, is below."""
    modules = {f.__module__ for f in (ppo_clip, dgpo)}
    names = {name for name, function in SURROGATES.items() if function.__module__ in modules}
    assert {name.split()[0] for name in CLOSED_FORMS} >= names - {"dppo"}


WITH_RATIO = {
    **{k: f for k, f in SURROGATES.items() if "ratio" in inspect.signature(f).parameters},
    "clip_cov": lambda *x, **options: clip_cov(*x, x[2] > 0.5, **options),
    "kl_cov": lambda *x, **options: kl_cov(*x, x[2] > 0.5, **options),
    "dppo kl": partial(dppo, form="kl"),
}


@pytest.mark.parametrize("name", WITH_RATIO)
def test_a_ratio_per_sequence_is_that_ratio_at_every_token(name):
    """A ratio f[N, 1] gives what its copy f[N, T] gives: loss, gradient and metrics."""
    rng = np.random.default_rng(2)
    logp, old_logp = -rng.uniform(0, 2, (2, 5, 6)).astype(np.float32)
    a = rng.normal(size=(5, 6)).astype(np.float32)
    mask = rng.random((5, 6)) > 0.4
    mask[2] = False

    def copied(*arrays):
        d, metrics = sequence_log_ratio(*arrays)
        return jnp.broadcast_to(d, (5, 6)), metrics

    def evaluate(ratio):
        def total(x):
            loss, metrics = WITH_RATIO[name](x, old_logp, a, mask, ratio=ratio)
            return jnp.sum(loss), (loss, metrics)

        return jax.grad(total, has_aux=True)(logp)

    gradient, (loss, metrics) = evaluate(sequence_log_ratio)
    same_gradient, (same_loss, same_metrics) = evaluate(copied)
    assert loss.shape == (5, 6) and np.all(loss[~mask] == 0)
    np.testing.assert_allclose(loss, same_loss, rtol=1e-6)
    np.testing.assert_allclose(gradient, same_gradient, rtol=1e-5, atol=1e-6)
    assert finalize(metrics) == pytest.approx(finalize(same_metrics))
    by_token, _ = WITH_RATIO[name](logp, old_logp, a, mask, ratio=log_ratio)
    assert not np.allclose(by_token, loss)


def dppo_gradient(mu, pi, a, **options):
    """Gradient by log π of single tokens [T]."""
    logp, old_logp = (jnp.log(jnp.asarray(x, jnp.result_type(float)))[None] for x in (pi, mu))
    a, mask = jnp.broadcast_to(jnp.asarray(a, logp.dtype), logp.shape), jnp.ones(logp.shape, bool)

    def total(x):
        loss, metrics = dppo(x, old_logp, a, mask, **options)
        return jnp.sum(loss), metrics

    gradient, metrics = jax.grad(total, has_aux=True)(logp)
    return np.asarray(gradient)[0], finalize(metrics)


@pytest.mark.parametrize("a", [2.0, -2.0])
@pytest.mark.parametrize("form, low, high", [("tv", 0.1, 0.3), ("kl", 0.02, 0.2)])
def test_dppo_closed_form(form, low, high, a):
    """−A·r, and 0 where π has gone beyond the bound in the direction of A."""
    mu, pi = (x.ravel() for x in np.meshgrid([0.01, 0.2, 0.5, 0.9, 0.99], [0.001, 0.15, 0.5, 0.85, 0.999]))
    if form == "tv":
        divergence = np.abs(pi - mu)
    else:
        divergence = mu * np.log(mu / pi) + (1 - mu) * np.log((1 - mu) / (1 - pi))
    is_away = (pi > mu) & (divergence > high) if a > 0 else (pi < mu) & (divergence > low)
    assert 0 < is_away.sum() < ((pi > mu) if a > 0 else (pi < mu)).sum()
    options = {"form": form, "epsilon": low, "epsilon_high": high, "cap": float("inf")}
    gradient, metrics = dppo_gradient(mu, pi, a, **options)
    np.testing.assert_allclose(gradient, -a * np.where(is_away, 0, pi / mu), rtol=1e-5)
    side = "high" if a > 0 else "low"
    assert metrics[f"clip_ratio/{side}_mean"] == pytest.approx(is_away.mean())
    assert metrics["clip_ratio/region_mean"] == pytest.approx(is_away.mean())


@pytest.mark.parametrize("form", ["tv", "kl"])
def test_dppo_at_the_edges_of_probability(form):
    """π = 1 is infinitely far from μ = 1/2 in KL, but not from a μ that differs from 1 by rounding."""
    gradient, _ = dppo_gradient([0.5, 1 - 6e-8, 1.0], [1.0, 1.0, 1.0], 1.0, form=form)
    np.testing.assert_allclose(gradient, [0, -1, -1], rtol=1e-6)
    gradient, _ = dppo_gradient([1.0, 1.0, 1.0], [0.5, 1 - 6e-8, 1.0], -1.0, form=form)
    np.testing.assert_allclose(gradient, [0, 1, 1], rtol=1e-6)


def test_binary_kl_is_no_smaller_than_zero_and_zero_at_equality():
    p = np.array([1e-30, 1e-6, 0.3, 0.5, 1 - 1e-6, 1])
    logp, other_logp = np.log(np.meshgrid(p, p)).astype(np.float32)
    kl = np.asarray(binary_kl(jnp.asarray(logp), jnp.asarray(other_logp)))
    assert np.all(np.isfinite(kl)) and np.all(kl >= -1e-12) and np.all(np.diag(kl) == 0)


def test_the_bound_of_dppo_itself_is_inside():
    mu, pi = [0.25, 0.5], [0.5, 0.25]
    distance = float(jnp.abs(jnp.exp(jnp.log(0.5)) - jnp.exp(jnp.log(0.25))))
    a = [1.0, -1.0]
    np.testing.assert_allclose(dppo_gradient(mu, pi, a, epsilon=distance)[0], [-2, 0.5], rtol=1e-6)
    assert np.all(dppo_gradient(mu, pi, a, epsilon=distance - 1e-6)[0] == 0)


def test_dppo_caps_the_weight():
    """r = 8 and 2 under a cap of 4, with tokens too rare for the bound to matter."""
    gradient, metrics = dppo_gradient([1e-4, 1e-4], [8e-4, 2e-4], [1.0, -1.0], cap=4.0)
    np.testing.assert_allclose(gradient, [-4, 2], rtol=1e-5)
    assert metrics["truncated_ratio"] == 0.5 and metrics["clip_ratio/region_mean"] == 0


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
        (gppo, {"epsilon": -0.1}, "epsilon=-0.1"),
        (ce_gppo, {"beta1": -0.5}, "beta1=-0.5"),
        (ce_gppo, {"beta2": -0.5}, "beta2=-0.5"),
        (ce_gppo, {"delta": 0.9}, "delta=0.9"),
        (aspo, {"epsilon_high": -1.0}, "epsilon_high=-1.0"),
        (aspo, {"cap": 0.5}, "cap=0.5"),
        (sapo, {"temperature_pos": 0.0}, "temperature_pos=0.0"),
        (sapo, {"temperature_neg": -1.0}, "temperature_neg=-1.0"),
        (dppo, {"form": "js"}, "form 'js'; one of tv, kl"),
        (dppo, {"epsilon": -0.1}, "epsilon=-0.1"),
        (dppo, {"epsilon_high": -0.1}, "epsilon_high=-0.1"),
        (dppo, {"cap": 0.5}, "cap=0.5"),
    ],
)
def test_bad_options_are_named(surrogate, options, message):
    x = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match=message):
        surrogate(x, x, x, jnp.ones((1, 1), bool), **options)
