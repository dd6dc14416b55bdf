"""Shaped rewards: every property of the waypoint reward, SCMA's penalty, PGPO's gate and length filter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.advantages import (
    LengthBounds,
    grpo,
    helper_probe_reward,
    importance_length_penalty,
    length_filter,
    length_penalised_reward,
    length_quantiles,
    process_gated_reward,
    waypoint_coverage,
    waypoint_reward,
)
from jaxrl_llm.losses import finalize

ONE = jnp.zeros(1, int)


# waypoints


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    covered=st.lists(st.booleans(), min_size=4, max_size=4),
    more=st.lists(st.booleans(), min_size=4, max_size=4),
    waypoints=st.lists(st.booleans(), min_size=4, max_size=4),
    weight=st.floats(0, 0.999),
)
def test_waypoint_reward(covered, more, waypoints, weight):
    """More covered, no less reward; a wrong answer below any right one; a right one is 1 anyway."""
    rows = np.array([covered, np.logical_or(covered, more), covered])
    coverage = np.asarray(waypoint_coverage(rows, np.array([waypoints] * 3)))
    share = np.sum(np.logical_and(covered, waypoints)) / max(np.sum(waypoints), 1)
    assert coverage[0] == pytest.approx(share) and coverage[1] >= coverage[0]
    right, wrong, fuller = (
        float(waypoint_reward(jnp.array([correct]), coverage[i : i + 1], weight=weight)[0])
        for correct, i in ((True, 2), (False, 0), (False, 1))
    )
    assert right == 1 and 0 <= wrong <= fuller < 1
    assert wrong == pytest.approx(weight * share, abs=1e-6)


def test_waypoints_make_advantages_among_wrong_answers_alone():
    """Groups: all wrong with coverages 0, ½, 1; all wrong with the same; all right; λ = 0 is the outcome."""
    correct = jnp.array([False] * 6 + [True] * 3)
    coverage, group = jnp.array([0, 0.5, 1, 0.7, 0.7, 0.7, 0, 0.5, 1]), jnp.arange(9) // 3
    got, _ = grpo(waypoint_reward(correct, coverage), group, epsilon=0.0)
    np.testing.assert_allclose(got, [-1, 0, 1, 0, 0, 0, 0, 0, 0], atol=1e-6)
    assert waypoint_reward(correct, coverage, weight=0.0).tolist() == [0.0] * 6 + [1.0] * 3
    # a success rate by R > 0 would count the covered wrong answers
    assert float(jnp.mean(waypoint_reward(correct, coverage)[:6] > 0)) > 0


# SCMA


def penalty(scores, chunks, reference=10.0, **options):
    """Of one answer."""
    scores, chunks = jnp.array([scores], jnp.float32), jnp.array([chunks], jnp.float32)
    length = jnp.sum(chunks, axis=1)
    return float(importance_length_penalty(scores, chunks, length, ONE, reference=reference, **options)[0])


def test_penalty_by_hand():
    """(1 − 0)·2 + (1 − ½)·4 + (1 − 1)·4 = 4 tokens: of a budget of 8, or of the answer's own 10."""
    scores, chunks = [1, 3, 5], [2, 4, 4]
    assert penalty(scores, chunks, 8.0) == 0.5 and penalty(scores, chunks, "relative") == pytest.approx(0.4)
    group, both = jnp.array([4, 4]), jnp.array([[2.0, 4, 4], [6, 8, 0]])  # lengths 10 and 14, mean 12
    got = importance_length_penalty(jnp.array([[1.0, 3, 5]] * 2), both, jnp.array([10.0, 14]), group)
    np.testing.assert_allclose(got, [4 / 12, 10 / 12], rtol=1e-6)
    alone = importance_length_penalty(
        jnp.array([[1.0, 3, 5]] * 2), both, jnp.array([10.0, 14]), group, jnp.array([True, False])
    )
    np.testing.assert_allclose(alone, [4 / 10, 0], rtol=1e-6)


chunk_lists = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(chunks=chunk_lists, more=st.integers(1, 9))
def test_penalty_properties(chunks, more):
    """Scores of 1: the length; of 5: nothing. Falls with each score, rises with each length, ignores cuts."""
    scores, lengths = ([c[i] for c in chunks] + [0] * (5 - len(chunks)) for i in (0, 1))
    base = penalty(scores, lengths)
    assert penalty([1] * 5, lengths) == pytest.approx(sum(lengths) / 10)
    assert penalty([5] * 5, lengths) == 0
    for c in range(len(chunks)):
        higher, longer = list(scores), list(lengths)
        higher[c] = min(5, higher[c] + 1)
        longer[c] += more
        fall = (higher[c] - scores[c]) / 4 * lengths[c] / 10
        assert penalty(higher, lengths) == pytest.approx(base - fall, abs=1e-6)
        assert penalty(scores, longer) >= base
    cut = [1, lengths[0] - 1, *lengths[1:4]]  # the first chunk in two of the same score
    assert penalty([scores[0], *scores[:4]], cut) == pytest.approx(base)


def test_deleting_chunks():
    """Fixed budget: a chunk of score 1 costs, one of 5 does not. Relative: deleting the latter costs."""

    def reward(scores, chunks, reference):
        return float(length_penalised_reward(jnp.ones(1), jnp.array([penalty(scores, chunks, reference)]))[0])

    whole = [1, 5, 3], [4, 8, 2]
    assert reward([0, 5, 3], [0, 8, 2], 20.0) > reward(*whole, 20.0)
    assert reward([1, 0, 3], [4, 0, 2], 20.0) == reward(*whole, 20.0)
    assert reward([1, 0, 3], [4, 0, 2], "relative") < reward(*whole, "relative")


def test_malformed_helpers():
    """The whole length counts, whatever stands where the scores should: 10 of a budget of 20."""
    nan = jnp.full((1, 3), jnp.nan)
    got = importance_length_penalty(
        nan, nan, jnp.array([10.0]), ONE, reference=20.0, well_formed=jnp.zeros(1, bool)
    )
    assert got.tolist() == [0.5]


def test_gate():
    """α = 0.5, Pen = 0.4: a right answer has 0.8; a wrong one 0, or −0.2 ungated; α = 0 is the accuracy."""
    accuracy, pen = jnp.array([1.0, 0.0]), jnp.full(2, 0.4)
    np.testing.assert_allclose(length_penalised_reward(accuracy, pen, weight=0.5), [0.8, 0], rtol=1e-6)
    plain = length_penalised_reward(accuracy, pen, weight=0.5, gated=False)
    np.testing.assert_allclose(plain, [0.8, -0.2], rtol=1e-6)
    for gated in (True, False):
        assert length_penalised_reward(accuracy, pen, weight=0.0, gated=gated).tolist() == [1, 0]


def test_scores_of_five_pay_in_the_team_and_not_when_probed():
    """Filler of 6 of 10 tokens, told by honest scores; the answer is found from what is kept either way."""
    honest, all_five = jnp.array([[5.0, 1.0]]), jnp.array([[5.0, 5.0]])
    chunks, length, right = jnp.array([[4.0, 6.0]]), jnp.array([10.0]), jnp.ones(1)
    team, probe = (
        [float(f(scores)[0]) for scores in (honest, all_five)]
        for f in (
            lambda s: length_penalised_reward(right, importance_length_penalty(s, chunks, length, ONE)),
            lambda s: helper_probe_reward(right, s, chunks, length, weight=0.5),
        )
    )
    assert team[1] == 1 > team[0]
    np.testing.assert_allclose(probe, [1 - 0.5 * 0.4, 1 - 0.5], rtol=1e-6)


# PGPO


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    process=st.lists(st.floats(0, 1, width=32, allow_subnormal=False), min_size=2, max_size=2),
    answer=st.floats(0, 1, width=32, allow_subnormal=False),
    well=st.sampled_from([0.0, 1.0]),
    hard=st.booleans(),
)
def test_the_gate_rises_with_the_process_score(process, answer, well, hard):
    options = {"threshold": 0.5, "process_weight": 0.1} if hard else {}
    arrays = jnp.sort(jnp.array(process)), jnp.full(2, answer), jnp.full(2, well)
    low, high = process_gated_reward(*arrays, format_weight=0.2, **options)
    assert low <= high
    full = process_gated_reward(jnp.ones(2), *arrays[1:], format_weight=0.2)
    np.testing.assert_allclose(full, answer + 0.2 * well, rtol=1e-6)  # T = 1: DAPO's reward


def test_a_shortcut_is_worse_than_the_group():
    """Right by guessing (T = 0.05) beside right by reading (T = 1): reward near 0, advantage below 0."""
    process, answer = jnp.array([1.0, 0.05, 0.9]), jnp.ones(3)
    rewards = process_gated_reward(process, answer, jnp.zeros(3), format_weight=0.1)
    advantages, _ = grpo(rewards, jnp.zeros(3, int))
    assert float(rewards[1]) == pytest.approx(0.05) and float(advantages[1]) < 0 < float(advantages[0])
    plain, _ = grpo(answer, jnp.zeros(3, int))
    assert np.all(plain == 0)


quantiles = jax.jit(length_quantiles)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 99), min_size=9, max_size=9),
    group=st.lists(st.sampled_from([-5, 0, 3, 7, 20]), min_size=9, max_size=9),
    valid=st.lists(st.sampled_from([True, True, False]), min_size=9, max_size=9),
    order=st.permutations(range(9)),
)
def test_length_filter(lengths, group, valid, order):
    """Against numpy's quantiles of the prompts' means; the middle is never kept; prompts in any order."""
    lengths, group, valid = np.array(lengths, np.float32), np.array(group), np.array(valid)
    bounds = quantiles(lengths, group, valid)
    means = {g: lengths[valid & (group == g)].mean() for g in set(group[valid].tolist())}
    wanted = np.quantile(list(means.values()), [0.3, 0.65, 0.95]) if means else np.zeros(3)
    np.testing.assert_allclose(bounds, wanted, rtol=1e-5)
    kept, metrics = length_filter(lengths, group, valid, bounds=bounds)
    low, high, top = (float(q) for q in bounds)
    by_mean = {g: m < low or high < m < top for g, m in means.items()}
    assert kept.tolist() == [bool(v and by_mean[g]) for v, g in zip(valid.tolist(), group.tolist())]
    if means:
        assert finalize(metrics)["length_filter/kept"] == pytest.approx(np.mean(list(by_mean.values())))
        middle = [g for g, m in means.items() if low <= m <= high]
        assert not np.any(np.asarray(kept) & np.isin(group, middle))
    order = list(order)
    moved = quantiles(lengths[order], group[order], valid[order])
    np.testing.assert_array_equal(bounds, moved)
    again, _ = length_filter(lengths[order], group[order], valid[order], bounds=moved)
    np.testing.assert_array_equal(again, np.asarray(kept)[order])


def test_errors_name_what_is_wrong():
    x = jnp.zeros(2)
    with pytest.raises(ValueError, match=r"weight=1\.0"):  # λ = 1 would pay a wrong answer like a right one
        waypoint_reward(x > 0, x, weight=1.0)
    with pytest.raises(ValueError, match=r"coverage \(1,\)"):
        waypoint_reward(x > 0, x[:1])
    for reference in ("mean", 0.0):
        with pytest.raises(ValueError, match=f"reference={reference!r}"):
            importance_length_penalty(x[:, None], x[:, None], x, ONE.repeat(2), reference=reference)
    with pytest.raises(ValueError, match=r"process_weight=0\.5"):
        process_gated_reward(x, x, x, format_weight=0.1, process_weight=0.5)
    with pytest.raises(ValueError, match=r"high=0\.2"):
        length_quantiles(x, ONE.repeat(2), high=0.2)
    with pytest.raises(ValueError, match=r"group \(1,\)"):
        length_filter(x, ONE, bounds=LengthBounds(x[0], x[0], x[0]))
