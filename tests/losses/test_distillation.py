"""Distillation on sampled tokens: gradients by enumeration, and how reward and teacher share them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import (
    aopd,
    aopd_from_logits,
    aopd_top_k_kl,
    finalize,
    forward_kl,
    kdrl,
    kdrl_beta,
    kl_k2,
    opd,
    ppo_clip,
    reverse_kl,
    rlad,
)

VOCAB, K = 6, 2
MASK = np.ones((1, VOCAB), bool)
TOKENS = np.arange(VOCAB)[None]
"""Every token of the vocabulary, sampled at one position each, all after the same prefix."""


def logits_of(seed=0):
    """Student, teacher and old student, [V]."""
    return np.random.default_rng(seed).normal(size=(3, VOCAB)) * 1.5


def everywhere(logits):
    return jnp.broadcast_to(logits, (1, VOCAB, VOCAB))


def by_token(loss, logits):
    """Of a loss of logits [1, V, V]: its values [V], and gradients [V, V] by the logits where y is drawn."""

    def total(x):
        value, _ = loss(x)
        return jnp.sum(value), value

    gradient, value = jax.grad(total, has_aux=True)(everywhere(logits))
    return np.asarray(value)[0], np.asarray(gradient)[0]


def opd_of(teacher, old=None, **options):
    """OPD of every token, as a function of the student's logits [1, V, V]."""

    def loss(x):
        logp = jnp.diagonal(jax.nn.log_softmax(x)[0])[None]
        old_logp = logp if old is None else jax.nn.log_softmax(old)[None]
        return opd(logp, old_logp, jax.nn.log_softmax(teacher)[None], MASK, **options)

    return loss


@pytest.mark.parametrize("is_on_policy", [True, False])
def test_opd_is_the_reverse_kl_in_expectation(is_on_policy):
    """Value and gradient, over tokens of the student itself and, by the ratio, of an older one."""
    with jax.enable_x64(True):
        student, teacher, old = logits_of()
        value, gradient = by_token(opd_of(teacher, None if is_on_policy else old), student)
        drawn = np.asarray(jax.nn.softmax(student if is_on_policy else old))
        arrays = jnp.asarray(student)[None, None], teacher[None, None], jnp.ones((1, 1), bool)
        wanted, slope = jax.value_and_grad(lambda x: jnp.sum(reverse_kl(x, *arrays[1:])[0]))(arrays[0])
    np.testing.assert_allclose(drawn @ value, wanted, rtol=1e-13)
    np.testing.assert_allclose(drawn @ gradient, slope[0, 0], atol=1e-14)


def test_opd_gradient_of_one_token():
    """−A·(e_y − p), A = log q(y) − log p(y): without bound as q(y) → 0, and 0 where the teacher agrees."""
    with jax.enable_x64(True):
        student, teacher, _ = logits_of(1)
        teacher[0] = -200
        log_p, log_q = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
        _, gradient = by_token(opd_of(teacher), student)
        np.testing.assert_allclose(
            gradient, -(log_q - log_p)[:, None] * (np.eye(VOCAB) - np.exp(log_p)), atol=1e-12
        )
        assert np.abs(gradient[0]).sum() > 100
        value, gradient = by_token(opd_of(student), student)
    assert np.all(value == 0) and np.all(gradient == 0)


def aopd_of(teacher, **options):
    return lambda x: aopd_from_logits(x, everywhere(teacher), TOKENS, MASK, **{"k": K} | options)


def test_aopd_gradient_of_one_token():
    """(m·p − q·1_S)/K where the teacher gives the token less than the student does, else −A·(e_y − p)."""
    with jax.enable_x64(True):
        student, teacher, _ = logits_of(2)
        log_p, log_q = np.asarray(jax.nn.log_softmax(student)), np.asarray(jax.nn.log_softmax(teacher))
        loss = aopd_of(teacher)
        value, gradient = by_token(loss, student)
        _, metrics = loss(everywhere(student))
    p, q = np.exp(log_p), np.exp(log_q)
    listed_q = np.where(q >= np.sort(q)[-K], q, 0)
    is_worse = log_q <= log_p
    assert 0 < is_worse.sum() < VOCAB
    pulled = (listed_q.sum() * p - listed_q) / K
    pushed = -(log_q - log_p)[:, None] * (np.eye(VOCAB) - p)
    np.testing.assert_allclose(gradient, np.where(is_worse[:, None], pulled, pushed), atol=1e-14)
    np.testing.assert_allclose(value, np.where(is_worse, listed_q @ (log_q - log_p) / K, log_p - log_q))
    numbers = finalize(metrics)
    assert numbers["distillation/forward_kl_share"] == pytest.approx(is_worse.mean())
    assert numbers["distillation/reverse_kl"] == pytest.approx(np.mean(log_p - log_q))


def test_where_the_teacher_agrees_opd_has_no_gradient_and_the_forward_kl_has_one():
    """A_t = 0 at token 0 alone: the other tokens' probabilities differ."""
    with jax.enable_x64(True):
        student = np.log([0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
        teacher = np.log([0.4, 0.05, 0.05, 0.1, 0.1, 0.3])
        _, of_opd = by_token(opd_of(teacher), student)
        _, of_aopd = by_token(aopd_of(teacher), student)
    np.testing.assert_allclose(of_opd[0], 0, atol=1e-14)
    assert np.abs(of_aopd[0]).sum() > 0.1


def test_the_forward_kl_must_be_a_loss_and_no_advantage():
    """It is the same for every token drawn, so as a detached advantage its expected policy gradient is 0."""
    with jax.enable_x64(True):
        student, teacher, _ = logits_of(3)
        p = np.asarray(jax.nn.softmax(student))

        def as_advantage(x):
            kl, _ = forward_kl(x, everywhere(teacher), MASK)
            logp = jnp.diagonal(jax.nn.log_softmax(x)[0])[None]
            return -jax.lax.stop_gradient(-kl) * logp, {}

        _, gradient = by_token(as_advantage, student)
        assert np.abs(gradient).max() > 0.1
        np.testing.assert_allclose(p @ gradient, 0, atol=1e-15)
        _, gradient = by_token(aopd_of(teacher, threshold=1.0), student)
    assert np.abs(p @ gradient).max() > 0.01


def test_aopd_forward_kl_may_be_negative_and_does_not_vanish_at_k_1():
    """q = (½, ½) and p = (¾, ¼), K = 1: ½·ln(½ / ¾) = −0.2027, gradient ½·p − (½, 0) = (−⅛, ⅛).

    Renormalised over S both would be 1, and the loss 0 whatever the student.
    """
    z, teacher = jnp.log(jnp.array([[[0.75, 0.25]]])), jnp.zeros((1, 1, 2))
    args = jnp.zeros((1, 1), int), jnp.ones((1, 1), bool)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(aopd_from_logits(x, teacher, *args, k=1)[0]))(z)
    np.testing.assert_allclose(value, -0.202733, rtol=1e-5)
    np.testing.assert_allclose(gradient, [[[-0.125, 0.125]]], rtol=1e-5)


def test_the_gate_compares_probabilities():
    """π_T − π = 0.2, 0.25 and 0: the first and the last are under τ = 0.22, though their log-ratios are
    1.1, 0.33 and 0."""
    logp, teacher_logp = jnp.log(jnp.array([[0.1, 0.65, 0.5]])), jnp.log(jnp.array([[0.3, 0.9, 0.5]]))
    kl, mask = jnp.full((1, 3), 7.0), jnp.ones((1, 3), bool)
    loss, metrics = aopd(logp, logp, teacher_logp, kl, mask, threshold=0.22)
    np.testing.assert_allclose(loss, [[7, np.log(0.65 / 0.9), 7]], rtol=1e-5)
    assert finalize(metrics)["distillation/forward_kl_share"] == pytest.approx(2 / 3)
    assert aopd(logp, logp, teacher_logp, kl, mask)[0].tolist()[0][2] == 7  # equal is not better


def test_aopd_from_logits_is_aopd_of_its_parts():
    """With a temperature on both sides, another scale, and tokens of an older student."""
    student, teacher, old = (everywhere(x) for x in logits_of(4).astype(np.float32))
    log_p, log_q = (jax.nn.log_softmax(x / 0.7) for x in (student, teacher))
    old_logp = jnp.diagonal(jax.nn.log_softmax(old)[0])[None]
    top_q, ids = jax.lax.top_k(log_q, 3)
    kl, _ = aopd_top_k_kl(jnp.take_along_axis(log_p, ids, axis=-1), top_q, MASK, scale=0.5)
    logp, teacher_logp = (jnp.diagonal(x[0])[None] for x in (log_p, log_q))
    wanted, _ = aopd(logp, old_logp, teacher_logp, kl, MASK, threshold=0.1)
    loss, metrics = aopd_from_logits(
        student, teacher, TOKENS, MASK, old_logp=old_logp, k=3, scale=0.5, threshold=0.1, temperature=0.7
    )
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert finalize(metrics)["distillation/top_k_kl"] == pytest.approx(float(jnp.mean(kl)), rel=1e-5)
    with pytest.raises(ValueError, match="k=7 must be from 1 to V=6"):
        aopd_from_logits(student, teacher, TOKENS, MASK, k=7)


def row(*values):
    return jnp.log(jnp.array([values], jnp.float32))


def gradient_of(loss, logp, *arrays, **options):
    mask = jnp.ones(logp.shape, bool)
    return np.asarray(jax.grad(lambda x: jnp.sum(loss(x, *arrays, mask, **options)[0]))(logp))


def test_the_teacher_pulls_under_kdrl_whatever_the_advantage():
    """Gradient −A·r + β·x: at r = 1, A = 0 and 2, x = ln(0.8 / 0.2) = 1.3863 and 0, β = ½."""
    logp, teacher_logp = row(0.8, 0.8), row(0.2, 0.8)
    advantages = jnp.array([[0.0, 2.0]])
    options = {"teacher_logp": teacher_logp, "beta": 0.5}
    np.testing.assert_allclose(
        gradient_of(kdrl, logp, logp, advantages, **options), [[0.693147, -2]], rtol=1e-5
    )
    assert np.all(gradient_of(rlad, logp, logp, jnp.zeros((1, 2)), teacher_logp=teacher_logp) == 0)


def test_kdrl_takes_another_surrogate_and_a_traced_coefficient():
    logp, old_logp, teacher_logp = row(0.5, 0.2), row(0.25, 0.25), row(0.1, 0.3)
    a, mask = jnp.array([[1.0]]), jnp.ones((1, 2), bool)
    high = partial(ppo_clip, epsilon_high=0.5)

    @jax.jit
    def loss(step):
        beta = kdrl_beta(step, steps=10)
        return kdrl(logp, old_logp, a, mask, teacher_logp=teacher_logp, beta=beta, surrogate=high)[0]

    wanted = high(logp, old_logp, a, mask)[0] + 0.003 * kl_k2(logp, teacher_logp, mask)[0]
    np.testing.assert_allclose(loss(5), wanted, rtol=1e-6)
    with pytest.raises(ValueError, match="steps=0"):
        kdrl_beta(0, steps=0)


def test_rlad_imitates_what_the_reward_allows():
    """First update, α = ½: r = (π/π_T)^½ between e^−½ = 0.607 and e^½ = 1.649; bounds 0.8 and 1.28.

    π far above the teacher: r = 1.649, clipped for A > 0, free to fall for A < 0;
    far below: r = 0.607, clipped for A < 0, never for A > 0. The gradient is −A·r·∂d, ∂d = α beyond the clamp
    of ±1, where the teacher's part is constant, and 1 inside. π = 1.44·π_T is inside: r = 1.2.
    """
    logp = row(0.8, 0.8, 0.001, 0.001, 0.72, 0.72)
    teacher_logp = row(0.1, 0.1, 0.8, 0.8, 0.5, 0.5)
    advantages = jnp.array([[1.0, -1.0] * 3])
    gradient = gradient_of(rlad, logp, logp, advantages, teacher_logp=teacher_logp)
    wanted = [0, np.exp(0.5) / 2, -np.exp(-0.5) / 2, 0, -1.2, 1.2]
    np.testing.assert_allclose(gradient, [wanted], rtol=1e-5)


def test_rlad_at_alpha_1_is_grpo_bit_by_bit():
    rng = np.random.default_rng(0)
    logp, old_logp, teacher_logp = -rng.uniform(0, 1.5, (3, 4, 5)).astype(np.float32)
    advantages, mask = rng.normal(size=(4, 1)), rng.random((4, 5)) > 0.3

    def both(loss, **options):
        out = jax.value_and_grad(lambda x: jnp.sum(loss(x, old_logp, advantages, mask, **options)[0]))(logp)
        return jax.tree.map(np.asarray, out)

    ours = both(rlad, teacher_logp=teacher_logp, alpha=1.0)
    jax.tree.map(np.testing.assert_array_equal, ours, both(ppo_clip, epsilon=0.2, epsilon_high=0.28))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_rlad_ratio_falls_with_the_teacher_and_is_bounded(alpha):
    """Without PPO's clip, A = 1, −ℓ is r: at most (π/π_old)^α·e^(±(1−α)), falling in π_T, flat beyond ±1."""
    teacher_logp = jnp.linspace(-5, 0, 41)[None]
    logp, old_logp = jnp.full((1, 41), -2.0), jnp.full((1, 41), -1.7)
    options = {"alpha": alpha, "epsilon": float("inf"), "epsilon_high": None}
    mask = jnp.ones((1, 41), bool)
    loss, _ = rlad(logp, old_logp, jnp.array([[1.0]]), mask, teacher_logp=teacher_logp, **options)
    r, own = -np.asarray(loss)[0], np.exp(-0.3 * alpha)
    assert np.all(np.diff(r) <= 0)
    np.testing.assert_allclose(r[[0, 16, 32, 40]] / own, np.exp([1 - alpha] * 2 + [alpha - 1] * 2), rtol=1e-5)
    at_student = rlad(logp, old_logp, jnp.array([[1.0]]), mask, teacher_logp=logp, **options)[0]
    np.testing.assert_allclose(-at_student, own, rtol=1e-6)  # (π/π_old)^α
