"""Dual-Track GRPO: whose tokens hear of which reward."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import group_advantage
from jaxrl_llm.losses import (
    aggregate,
    dual_track,
    finalize,
    gspo,
    ppo_clip,
    prefix_mask,
    segmented_whitening,
    summed_advantages,
)

N, T = 4, 6
MASK = np.random.default_rng(0).random((N, T)) > 0.25  # holes as of tool tokens
LOGP, OLD_LOGP = -np.random.default_rng(1).uniform(0, 1, (2, N, T)).astype(np.float32)
END = jnp.array([3, 0, 6, 2])
ANSWER, PREFIX = np.random.default_rng(2).normal(size=(2, N, 1)).astype(np.float32)
MODE, NAN = "seq_mean_token_mean", float("nan")


def z(rewards):
    """Advantages [N, 1] of one group: population standard deviation, as in the released code."""
    return group_advantage(jnp.asarray(rewards, jnp.float32), jnp.zeros(len(rewards), int), ddof=0)[0][
        :, None
    ]


def tracks(answer, prefix, end=END, **options):
    """Token losses and the gradient of their seq_mean_token_mean sum by logp."""

    def total(logp):
        loss, _ = dual_track(
            logp, OLD_LOGP, answer, MASK, prefix_advantages=prefix, prefix_end=end, **options
        )
        return aggregate(loss, MASK, MODE).sum, loss

    (_, loss), gradient = jax.value_and_grad(total, has_aux=True)(LOGP)
    return np.asarray(loss), np.asarray(gradient)


@pytest.mark.parametrize("surrogate", [ppo_clip, partial(gspo, epsilon=0.2)])
def test_it_is_the_sum_of_two_losses_each_over_its_own_mask(surrogate):
    """The definition: every row's token mean over all its tokens, plus λ times that over its prefix."""
    assert np.any(MASK & ~prefix_mask(MASK, END)) and MASK.any(1).all()

    def apart(logp):
        answer, _ = surrogate(logp, OLD_LOGP, ANSWER, MASK)
        prefix, _ = surrogate(logp, OLD_LOGP, PREFIX, prefix_mask(MASK, END))
        answer = aggregate(answer, MASK, MODE)
        return answer.sum + 0.7 * aggregate(prefix, prefix_mask(MASK, END), MODE).sum, answer.weight

    (total, rows), gradient = jax.value_and_grad(apart, has_aux=True)(LOGP)
    loss, together = tracks(ANSWER, PREFIX, coefficient=0.7, surrogate=surrogate)
    both = aggregate(jnp.asarray(loss), MASK, MODE)
    np.testing.assert_allclose(both.sum, total, rtol=1e-5)
    assert both.weight == rows == N
    np.testing.assert_allclose(together, gradient, rtol=1e-5, atol=1e-7)


def test_by_hand():
    """Ratios 1, four tokens, of which two are the prefix's: −1 everywhere, +0.25·(4/2)·2 there."""
    logp = jnp.zeros((1, 5))
    mask, a = jnp.array([[True, False, True, True, True]]), jnp.array([[1.0]])
    loss, metrics = dual_track(logp, logp, a, mask, prefix_advantages=-2 * a, prefix_end=jnp.array([3]))
    np.testing.assert_allclose(loss, [[0, 0, 0, -1, -1]], atol=1e-7)
    assert finalize(metrics).keys() >= {"clip_ratio/high_mean", "prefix/clip_ratio/high_mean"}


def test_the_prefix_track_ends_where_the_prefix_does():
    """Its gradient is exactly 0 at t ≥ end and at masked tokens; where end = 0 only the answer's is left."""
    _, both = tracks(ANSWER, PREFIX, coefficient=2.0)
    _, answer = tracks(ANSWER, PREFIX, coefficient=0.0)
    later = ~np.asarray(prefix_mask(MASK, END))
    np.testing.assert_array_equal(both[later], answer[later])
    assert not np.any(both[~MASK])
    np.testing.assert_array_equal(both[1], answer[1])
    assert np.any(both[~later] != answer[~later])


def test_without_the_second_track_it_is_the_surrogate_bit_for_bit():
    """λ = 0, no prefixes, or a group whose prefixes have equal rewards (advantages of exactly 0)."""
    plain = np.asarray(ppo_clip(LOGP, OLD_LOGP, ANSWER, MASK)[0])
    np.testing.assert_array_equal(tracks(ANSWER, PREFIX, coefficient=0.0)[0], plain)
    np.testing.assert_array_equal(tracks(ANSWER, PREFIX, end=0 * END)[0], plain)
    np.testing.assert_array_equal(tracks(ANSWER, z([0.7, 0.7, 0.7, 0.7]))[0], plain)


def test_equal_answers_with_different_prefixes_are_told_apart_in_the_prefix_alone():
    """Answers 1 1 0 0, schemas 1 0 1 0: rows 0 and 1 differ by the sign of the schema's part, only there."""
    end, ones = jnp.full(N, 3), np.ones((N, T), bool)
    answer, schema = z([1.0, 1, 0, 0]), z([1.0, 0, 1, 0])

    def gradient(coefficient):
        def total(logp):
            loss, _ = dual_track(
                logp, logp, answer, ones, prefix_advantages=schema, prefix_end=end, coefficient=coefficient
            )
            return aggregate(loss, ones, MODE).sum

        return np.asarray(jax.grad(total)(LOGP))

    alone = gradient(0.0)
    schema_part = gradient(0.5) - alone
    np.testing.assert_array_equal(alone[0], alone[1])
    np.testing.assert_allclose(schema_part[0, :3], -schema_part[1, :3], rtol=1e-5)
    np.testing.assert_allclose(schema_part[0, :3], -0.5 / 3, rtol=1e-5)  # λ·A over three prefix tokens
    assert not np.any(schema_part[:, 3:])


def test_the_scale_of_the_prefix_reward_does_not_matter_but_its_coefficient_does():
    schema = np.array([1.0, 0, 1, 0])
    loss, _ = tracks(ANSWER, z(schema))
    np.testing.assert_allclose(tracks(ANSWER, z(1000 * schema))[0], loss, rtol=1e-5)
    assert np.max(np.abs(tracks(ANSWER, z(schema), coefficient=0.5)[0] - loss)) > 0.1


def test_summed_advantages():
    """A + 0.5·A_prefix before the end, A from there on, 0 where masked."""
    mask = jnp.array([[True, True, False, True]])
    a, prefix = jnp.array([[1.0]]), jnp.array([[3.0, -4.0, NAN, NAN]])
    options = {"prefix_advantages": prefix, "prefix_end": jnp.array([2]), "coefficient": 0.5}
    assert summed_advantages(a, mask, **options).tolist() == [[2.5, -1, 0, 1]]


def test_the_sum_of_advantages_is_another_loss_unless_all_is_prefix():
    """One clip judges the sum, and a prefix weighs by its share of the tokens."""
    unclipped = partial(ppo_clip, epsilon=float("inf"))
    for end, is_equal in ((jnp.full(N, T), True), (END, False)):
        a = summed_advantages(ANSWER, MASK, prefix_advantages=PREFIX, prefix_end=end)
        single = np.asarray(unclipped(LOGP, OLD_LOGP, a, MASK)[0])
        double, _ = tracks(ANSWER, PREFIX, end=end, surrogate=unclipped)
        assert np.allclose(single, double, rtol=1e-5) == is_equal
    opposed = {"prefix_advantages": -4 * ANSWER, "prefix_end": jnp.full(N, T)}
    single = ppo_clip(LOGP, OLD_LOGP, summed_advantages(ANSWER, MASK, **opposed), MASK)[0]  # A − A = 0
    assert not np.any(single) and np.any(tracks(ANSWER, -4 * ANSWER, end=jnp.full(N, T))[0])


def test_segmented_whitening():
    """Each of the two spans has mean 0 and standard deviation 1 over the batch, whatever the other holds."""
    a = np.random.default_rng(4).normal(3, 5, (N, T)).astype(np.float32)
    prefix = np.asarray(prefix_mask(MASK, END))
    rest = MASK & ~prefix
    white = np.asarray(segmented_whitening(np.where(MASK, a, NAN), MASK, prefix_end=END))
    for span in (prefix, rest):
        assert abs(white[span].mean()) < 1e-6 and white[span].std(ddof=1) == pytest.approx(1, rel=1e-5)
        np.testing.assert_allclose(white[span], (a[span] - a[span].mean()) / a[span].std(ddof=1), rtol=1e-4)
    assert not np.any(white[~MASK])
    other = np.asarray(segmented_whitening(np.where(rest, a, 1e6), MASK, prefix_end=END))
    np.testing.assert_array_equal(other[rest], white[rest])
    assert not np.any(other[prefix])  # equal values


@pytest.mark.parametrize("ends", [0, T])
def test_segmented_whitening_with_one_span_empty(ends):
    white = np.asarray(segmented_whitening(ANSWER, MASK, prefix_end=jnp.full(N, ends)))
    assert white[MASK].std(ddof=1) == pytest.approx(1, rel=1e-5)
    assert not np.any(segmented_whitening(ANSWER, MASK & False, prefix_end=END))


def test_shapes_are_named():
    with pytest.raises(ValueError, match=r"prefix_end \(4, 1\), rows \(4,\)"):
        tracks(ANSWER, PREFIX, end=END[:, None])
    with pytest.raises(ValueError, match=r"advantages\[:, None\]"):
        tracks(ANSWER, PREFIX[:, 0])
