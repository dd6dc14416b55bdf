"""Difference rewards: placement, telescoping, and the state baseline by exact enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.advantages import (
    coding_role_rewards,
    discounted_returns,
    praise_rewards,
    search_role_rewards,
    shared_role_rewards,
    turn_differences,
    turn_ends,
    with_format_penalty,
)
from jaxrl_llm.losses import finalize

K, T = 3, 7
praise = jax.jit(praise_rewards)


@st.composite
def trajectories(draw):
    """Two rows: token masks and turns 0..K+1 in order, scores, numbers of turns, outcomes."""
    masks = draw(st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=2, max_size=2))
    turns = [
        sorted(draw(st.lists(st.integers(0, K + 1), min_size=T, max_size=T))) for _ in range(2)
    ]  # of the tokens
    scores = draw(
        st.lists(st.lists(st.floats(0, 1, width=16), min_size=K + 1, max_size=K + 1), min_size=2, max_size=2)
    )
    numbers = draw(st.lists(st.integers(0, K), min_size=2, max_size=2))
    outcome = draw(st.lists(st.floats(0, 1, width=16), min_size=2, max_size=2))
    arrays = scores, outcome, numbers, turns, masks
    return tuple(
        np.array(x, dtype) for x, dtype in zip(arrays, (np.float32,) * 2 + (np.int32,) * 2 + (bool,))
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(batch=trajectories())
def test_praise_against_a_loop(batch):
    """Garbage behind a row's last score; tool tokens in between; turns without a token of the policy."""
    scores, outcome, numbers, turn, mask = batch
    dirty = np.where(np.arange(K + 1) <= numbers[:, None], scores, np.nan)
    got, metrics = praise(dirty, outcome, numbers, np.where(mask, turn, 99), mask)
    wanted = np.zeros((2, T))
    for i in range(2):
        for t in range(1, numbers[i] + 1):
            tokens = np.flatnonzero(mask[i] & (turn[i] == t))
            if len(tokens):
                wanted[i, tokens[-1]] += 0.5 * (scores[i, t] - scores[i, t - 1])
        if mask[i].any():
            wanted[i, np.flatnonzero(mask[i])[-1]] += outcome[i]
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)
    assert np.all(np.asarray(got)[~mask] == 0)
    rows = [i for i in range(2) if mask[i].any()]
    process = [0.5 * (scores[i, t] - scores[i, t - 1]) for i in rows for t in range(1, numbers[i] + 1)]
    expected = {"nonfinite_rewards": 0} if rows else {}
    expected |= {"praise/process": np.mean(process)} if process else {}
    assert finalize(metrics) == pytest.approx(expected, rel=1e-5, abs=1e-6)


FULL = jnp.array([[1, 1, 2, 3, 4]] * 2), jnp.array([[True, True, True, True, True]] * 2)
SCORES, OUTCOME = jnp.array([[0.25, 0.5, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]]), jnp.array([1.0, 0.75])


def test_praise_telescopes():
    """Row 0: 1 + ½(1 − ¼) = 1.375; row 1 has equal scores: its outcome alone."""
    got, _ = praise_rewards(SCORES, OUTCOME, jnp.array([3, 3]), *FULL)
    np.testing.assert_allclose(got, [[0, 0.125, -0.25, 0.5, 1], [0, 0, 0, 0, 0.75]])
    np.testing.assert_allclose(jnp.sum(got, axis=1), [1.375, 0.75])
    assert float(jnp.abs(got[:, :-1]).max()) <= 0.5


@pytest.mark.parametrize("options, turns", [({"alpha": 0.0}, [3, 3]), ({}, [0, 0])])
def test_praise_without_process_rewards_is_the_outcome(options, turns):
    got, _ = praise_rewards(SCORES, OUTCOME, jnp.array(turns), *FULL, **options)
    np.testing.assert_array_equal(got, np.outer(OUTCOME, [0, 0, 0, 0, 1]))


def test_an_answer_in_the_last_turn_gets_both():
    turn, mask = FULL[0][:1, :4], FULL[1][:1, :4]  # turns 1, 1, 2, 3
    got, _ = praise_rewards(SCORES[:1], OUTCOME[:1], jnp.array([3]), turn, mask)
    np.testing.assert_allclose(got, [[0, 0.125, -0.25, 1.5]])


def test_rows_that_were_not_scored():
    """A NaN among a row's scores, or as its outcome, takes its rewards away and is counted."""
    clean, _ = praise_rewards(SCORES, OUTCOME, jnp.array([3, 3]), *FULL)
    for scores, outcome in ((SCORES.at[1, 2].set(jnp.nan), OUTCOME), (SCORES, OUTCOME.at[1].set(jnp.inf))):
        got, metrics = praise_rewards(scores, outcome, jnp.array([3, 3]), *FULL)
        np.testing.assert_array_equal(got, clean.at[1].set(0))
        assert finalize(metrics)["nonfinite_rewards"] == 0.5


def test_the_score_before_a_turn_is_a_baseline_of_the_state():
    """Two turns of two actions: all four trajectories, weighed by a tabular policy.

    The return from turn t is outcome + α(v_2 − v_(t−1)). The mean gradient is the same as with
    outcome + α·v_2 at both turns, its second moment smaller.
    """
    paths = np.array(list(itertools.product(range(2), repeat=2)))
    first, second = np.array([0.3, 0.7]), np.array([[0.6, 0.4], [0.2, 0.8]])
    after_one, outcome = np.array([0.2, 0.9]), np.array([0.1, 0.5, 0.7, 1.0])
    scores = np.stack([np.full(4, 0.6), after_one[paths[:, 0]], outcome], axis=1).astype(np.float32)
    turn, mask = np.tile([1, 2], (4, 1)), np.ones((4, 2), bool)
    rewards, _ = praise_rewards(scores, outcome.astype(np.float32), np.full(4, 2), turn, mask, alpha=0.5)
    returns = np.asarray(discounted_returns(rewards, mask))

    chance = first[paths[:, 0]] * second[paths[:, 0], paths[:, 1]]
    score = np.zeros((4, 2, 6))  # ∇log π of each turn by the six logits
    score[:, 0, :2] = np.eye(2)[paths[:, 0]] - first
    for path, (a, b) in enumerate(paths):
        score[path, 1, 2 + 2 * a : 4 + 2 * a] = np.eye(2)[b] - second[a]
    plain = np.repeat((outcome + 0.5 * outcome)[:, None], 2, axis=1)  # v_2 is the outcome
    by_return, by_total = (np.einsum("pt,ptz->pz", w, score) for w in (returns, plain))
    np.testing.assert_allclose(chance @ by_return, chance @ by_total, atol=1e-7)
    second_moment = [float(chance @ np.sum(g**2, axis=1)) for g in (by_return, by_total)]
    assert second_moment[0] < second_moment[1]


def test_no_gradient_through_rewards():
    gradient = jax.grad(lambda s: jnp.sum(praise_rewards(s, OUTCOME, jnp.array([3, 3]), *FULL)[0]))(SCORES)
    assert np.all(gradient == 0)


scores_of = st.lists(st.floats(0, 1, width=16), min_size=K + 1, max_size=K + 1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.lists(scores_of, min_size=2, max_size=2),
    turns=st.lists(st.integers(0, K), min_size=2, max_size=2),
)
def test_roles_telescope(rows, turns):
    """Σ_t(F_t − F_(t−1)) = F_last − F_0; a coder's add up to R_last, a reflector's to R_last − R_0."""
    f, last = np.array(rows, np.float32), np.array(turns)
    dirty = np.where(np.arange(K + 1) <= last[:, None], f, np.inf)
    added, metrics = turn_differences(dirty, last)
    end, start = f[np.arange(2), last], f[:, 0]
    np.testing.assert_allclose(jnp.sum(added, axis=1), end - start, atol=1e-6)
    assert finalize(metrics)["nonfinite_rewards"] == 0

    search, _ = search_role_rewards(dirty, last)
    code, _ = coding_role_rewards(dirty, last)
    is_turn = np.arange(K + 1) <= last[:, None]
    np.testing.assert_array_equal(search["answer"], np.where(is_turn, f, 0))
    for role in ("search", "summary", "update"):
        np.testing.assert_array_equal(search[role][:, 1:], added)
        assert np.all(
            search[role][:, 0] == 0
        )  # and 0 where a search says that it ends: behind the last answer
    np.testing.assert_allclose(jnp.sum(code["coder"], axis=1), end, atol=1e-6)
    np.testing.assert_array_equal(code["planner"], code["coder"])
    np.testing.assert_array_equal(code["reflector"][:, :-1], code["coder"][:, 1:])
    assert np.all(np.asarray(code["reflector"])[np.arange(2), last] == 0)  # no next turn


def test_roles_of_rows_that_do_not_count():
    scores, turns = jnp.array([[0.5, jnp.nan], [0.25, 0.5], [0.25, 0.5]]), jnp.array([1, 1, 1])
    for function in (search_role_rewards, coding_role_rewards):
        rewards, metrics = function(scores, turns, jnp.array([True, True, False]))
        assert finalize(metrics)["nonfinite_rewards"] == 0.5
        for values in rewards.values():
            assert np.all(np.asarray(values)[[0, 2]] == 0) and np.any(np.asarray(values)[1] != 0)


def test_shared_rewards_and_format():
    nodes = jnp.array([[True, False], [True, True], [False, False]])
    rewards, metrics = shared_role_rewards(jnp.array([0.5, jnp.nan, 9.0]), nodes)
    assert rewards.tolist() == [[0.5, 0], [0, 0], [0, 0]]
    assert finalize(metrics)["nonfinite_rewards"] == 0.5  # the third trajectory has no node
    total = with_format_penalty(
        rewards, jnp.array([[True, False], [False, True], [False, False]]), weight=0.25
    )
    assert total.tolist() == [[0.25, 0], [0, -0.25], [0, 0]]


def test_turn_ends():
    """The last own token of each run of turns, whatever the turn of tool tokens says."""
    turn = jnp.array([[0, 0, 1, 7, 1, 2], [4, 4, 4, 4, 4, 4], [1, 2, 3, 3, 3, 3]])
    mask = jnp.array([[1, 1, 1, 0, 1, 1], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
    wanted = np.array([[0, 1, 0, 0, 1, 1], [0, 0, 1, 0, 0, 0], [0] * 6], bool)
    np.testing.assert_array_equal(turn_ends(turn, mask), wanted)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"scores \(2,\) and turns \(2,\)"):
        turn_differences(jnp.zeros(2), jnp.zeros(2, int))
    with pytest.raises(ValueError, match=r"outcome \(1,\)"):
        praise_rewards(SCORES, OUTCOME[:1], jnp.array([3, 3]), *FULL)
    with pytest.raises(ValueError, match=r"turn \(2, 5\), mask \(2, 4\)"):
        praise_rewards(SCORES, OUTCOME, jnp.array([3, 3]), FULL[0], FULL[1][:, :4])
    with pytest.raises(ValueError, match=r"nodes \(2,\)"):
        shared_role_rewards(jnp.zeros(2), jnp.zeros(2, bool))
