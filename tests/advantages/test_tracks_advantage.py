"""Dual-track advantages: who gets credit for what, and GRPO where there is one track."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import losses
from jaxrl_llm.advantages import clipped_grpo, dual_track, grpo
from jaxrl_llm.losses import finalize

# Outcomes 1, 1, 0, 0: mean ½, population std ½, so z = ±1. Prefixes 1, 0, 0, 0: mean ¼, squares
# (9 + 1 + 1 + 1)/16 = ¾, std √(3/16) = √3/4, so z = √3 and three times −1/√3.
OUTCOME, PREFIX = jnp.array([1.0, 1, 0, 0]), jnp.array([1.0, 0, 0, 0])
GROUP = jnp.zeros(4, int)
MASK = jnp.array([[True, True, False, True, True]] * 4)  # a tool token in the middle
END = jnp.array([4, 4, 2, 0])


def test_closed_form():
    (outcome, prefix), metrics = dual_track(OUTCOME, PREFIX, GROUP, MASK, END, epsilon=0.0)
    np.testing.assert_allclose(outcome, MASK * np.array([[1], [1], [-1], [-1]]), rtol=1e-6)
    low = -(3**-0.5)
    wanted = [[3**0.5, 3**0.5, 0, 3**0.5, 0], [low, low, 0, low, 0], [low, low, 0, 0, 0], [0] * 5]
    np.testing.assert_allclose(prefix, wanted, rtol=1e-6)
    assert finalize(metrics)["outcome/reward"] == 0.5 and finalize(metrics)["prefix/reward"] == 0.25


def test_credit_where_it_is_due():
    """Rows 0 and 1 have one outcome: equal advantages of the outcome, opposite ones in the prefix."""
    (outcome, prefix), _ = dual_track(OUTCOME, PREFIX, GROUP, MASK, END)
    np.testing.assert_array_equal(outcome[0], outcome[1])
    tokens = np.asarray(MASK[0]) & (np.arange(5) < 4)
    assert np.all(np.asarray(prefix)[0, tokens] > 0) and np.all(np.asarray(prefix)[1, tokens] < 0)
    assert np.all(np.asarray(prefix)[:2, ~tokens] == 0)


def test_a_constant_prefix_reward_says_nothing_and_scale_has_no_effect():
    (outcome, prefix), _ = dual_track(OUTCOME, jnp.full(4, 0.7), GROUP, MASK, END)
    assert np.all(prefix == 0) and np.any(outcome != 0)
    _, by_one = dual_track(OUTCOME, PREFIX, GROUP, MASK, END, epsilon=0.0)[0]
    _, by_nine = dual_track(OUTCOME, 9 * PREFIX, GROUP, MASK, END, epsilon=0.0)[0]
    np.testing.assert_allclose(by_one, by_nine, rtol=1e-6)


def test_aborted_rows():
    """Rows 0 and 3 left: outcomes 1 and 0, so z = ±1 still; prefixes 1 and 0 too. One row alone gets 0."""
    valid = jnp.array([True, False, False, True])
    (outcome, prefix), _ = dual_track(OUTCOME, PREFIX, GROUP, MASK, jnp.full(4, 5), valid, epsilon=0.0)
    for track in (outcome, prefix):
        np.testing.assert_allclose(track, MASK * np.array([[1], [0], [0], [-1]]), rtol=1e-6)
    for track in dual_track(OUTCOME, PREFIX, GROUP, MASK, END, jnp.arange(4) == 0)[0]:
        assert np.all(track == 0)


def gradient(weight, logits, taken, end):
    """Of the two tracks' loss with λ = weight by the logits [N, T, V]."""
    (outcome, prefix), _ = dual_track(OUTCOME, PREFIX, GROUP, MASK, end)
    in_prefix = MASK & (jnp.arange(5) < end[:, None])

    def loss(z):
        logp = jnp.take_along_axis(jax.nn.log_softmax(z), taken[..., None], axis=-1)[..., 0]
        total = 0.0
        for a, mask, factor in ((outcome, MASK, 1.0), (prefix, in_prefix, weight)):
            per_token, _ = losses.ppo_clip(logp, jax.lax.stop_gradient(logp), a, mask)
            total += factor * losses.aggregate(per_token, mask, "seq_mean_token_mean").sum
        return total

    return jax.grad(loss)(logits)


def test_gradients_of_the_tracks():
    """λ moves the logits of the prefix alone; tool tokens get nothing; λ = 0 is GRPO on the outcome."""
    rng = np.random.default_rng(0)
    logits, taken = (
        jnp.array(rng.normal(size=(4, 5, 3)), jnp.float32),
        jnp.array(rng.integers(3, size=(4, 5))),
    )
    plain, both = (np.asarray(gradient(weight, logits, taken, END)) for weight in (0.0, 1.0))
    moved = np.any(both != plain, axis=-1)
    np.testing.assert_array_equal(moved, np.asarray(MASK) & (np.arange(5) < np.asarray(END)[:, None]))
    assert np.all(both[:, 2] == 0)
    none = np.asarray(gradient(1.0, logits, taken, jnp.zeros(4, int)))
    np.testing.assert_array_equal(none, plain)
    a, _ = grpo(OUTCOME, GROUP, ddof=0)

    def reference(z):
        logp = jnp.take_along_axis(jax.nn.log_softmax(z), taken[..., None], axis=-1)[..., 0]
        per_token, _ = losses.ppo_clip(logp, jax.lax.stop_gradient(logp), a[:, None], MASK)
        return losses.aggregate(per_token, MASK, "seq_mean_token_mean").sum

    np.testing.assert_allclose(plain, jax.grad(reference)(logits), rtol=1e-6, atol=1e-9)


def test_clip():
    """One success among n has z = √(n−1): 10 at n = 101, inside; beyond it is cut to 10 and counted."""
    rewards, group, place = jnp.zeros(201).at[7].set(1), jnp.zeros(201, int), jnp.arange(201)
    for n, share in ((101, 0), (201, 1 / 201)):
        got, metrics = clipped_grpo(rewards, group, place < n)
        assert float(got[7]) == pytest.approx(10, rel=2e-5) and float(got[7]) <= 10
        assert finalize(metrics)["clipped_advantages"] == pytest.approx(share)
    rewards, group = jnp.array([0.0, 1, 4, 2]), jnp.array([0, 0, 1, 1])
    np.testing.assert_array_equal(clipped_grpo(rewards, group)[0], grpo(rewards, group, ddof=0)[0])


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"prefix_rewards \(3,\)"):
        dual_track(OUTCOME, PREFIX[:3], GROUP, MASK, END)
    with pytest.raises(ValueError, match=r"prefix_end \(1,\)"):
        dual_track(OUTCOME, PREFIX, GROUP, MASK, END[:1])
