"""Tournaments: the closed form of expected points, counts of judgements, and judges that fail."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.advantages import dr_grpo, grpo
from jaxrl_llm.rewards.tournament import tournament_rewards


def best(table, k):
    """A perfect judge: the lower the place, the better the answer."""
    return sorted(table)[:k]


def answers(n):
    return [f"answer {i}" for i in range(n)]


EIGHT = np.array([3, 10 / 7, 1, 24 / 35, 16 / 35, 2 / 7, 1 / 7, 0])
"""Expected points of rank 1 to 8 by hand: for rank 2, 6/7 + C(6,3)/C(7,3) + 0 = 6/7 + 4/7."""


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_expected_points(depth):
    """Σ_j C(n−k, 2^j − 1)/C(n−1, 2^j − 1) for rank k of n = 2^D, by 2,000 tournaments within 5 std. errors.

    A point in round j needs the 2^j − 1 others of the answer's part of the draw to be worse. Points per
    tournament are at most D, so the standard error is at most D/2/√2000.
    """
    n, repeats = 2**depth, 2000
    wanted = [
        sum(math.comb(n - k, 2**j - 1) / math.comb(n - 1, 2**j - 1) for j in range(1, depth + 1))
        for k in range(1, n + 1)
    ]
    if n == 8:
        np.testing.assert_allclose(wanted, EIGHT, rtol=1e-12)
    assert np.all(np.diff(wanted) < 0)
    result = tournament_rewards(answers(n), best, seed=0, repeats=repeats)
    np.testing.assert_allclose(result.points / repeats, wanted, atol=5 * depth / 2 / repeats**0.5)
    assert result.points[0] == depth * repeats and result.points[-1] == 0


@pytest.mark.parametrize("n, repeats", [(2, 1), (4, 3), (8, 4), (16, 2)])
def test_counts(n, repeats):
    """n − 1 judgements and points per tournament; four of eight answers have 28, as many as pairs."""
    result = tournament_rewards(answers(n), best, seed=3, repeats=repeats)
    assert result.judgements == result.points.sum() == repeats * (n - 1)
    assert result.failures == 0
    assert tournament_rewards(answers(8), best, seed=0).judgements == 28 == math.comb(8, 2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 9),
    group_size=st.integers(2, 5),
    winners=st.integers(1, 3),
    finalists=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_sizes(n, group_size, winners, finalists, seed):
    """It ends; nobody is lost in the first round; the best reward is 1 and the worst 0, or all are ½."""
    tables = []

    def judge(table, k):
        tables.append(list(table))
        assert k == min(winners, len(table) - 1)
        return best(table, k)

    result = tournament_rewards(
        answers(n),
        judge,
        seed=seed,
        group_size=group_size,
        winners_per_group=winners,
        target_finalists=finalists,
        repeats=1,
    )
    if n <= finalists:
        assert not tables and result.rewards.tolist() == [0.5] * n
        return
    first = tables[: max(1, n // group_size)]
    assert sorted(i for table in first for i in table) == list(range(n))
    assert max(map(len, first)) - min(map(len, first)) <= 1 and min(map(len, tables)) >= 2
    assert result.judgements == len(tables)
    assert result.rewards.max() == 1 and result.rewards.min() == 0
    assert result.points[0] > 0 and result.rewards[0] == 1  # the best answer is never beaten


def test_odd_numbers():
    """Five answers: tables of two and three, then a final. Two to a table of three: five at one table."""
    sizes = []
    tournament_rewards(answers(5), lambda t, k: sizes.append(len(t)) or best(t, k), seed=0, repeats=1)
    assert sorted(sizes[:2]) == [2, 3] and sizes[2:] == [2]
    sizes.clear()
    tournament_rewards(
        answers(5), lambda t, k: sizes.append(len(t)) or best(t, k), seed=0, repeats=1, group_size=3
    )
    assert sizes == [5]


def test_advantages_do_not_depend_on_points():
    """GRPO's advantages of points, of points of another worth, and of rewards in [0, 1] are the same."""
    results = [tournament_rewards(answers(6), best, seed=1, increment=x) for x in (1.0, 2.5)]
    np.testing.assert_allclose(results[1].points, 2.5 * results[0].points)
    group = np.zeros(6, int)
    wanted, _ = grpo(results[0].points.astype(np.float32), group, epsilon=0.0)
    for values in (results[1].points, results[0].rewards, results[1].rewards):
        np.testing.assert_allclose(grpo(values.astype(np.float32), group, epsilon=0.0)[0], wanted, rtol=1e-5)
    assert np.any(np.abs(dr_grpo(results[1].points.astype(np.float32), group)[0]) > 0)


def test_a_judge_that_takes_the_first_slot_prefers_nobody():
    """Over 3,000 tournaments of four: ¾ points each, within 5 standard errors of at most 1/√3000."""
    result = tournament_rewards(answers(4), lambda table, k: table[:k], seed=0, repeats=3000)
    np.testing.assert_allclose(result.points / 3000, 0.75, atol=5 / 3000**0.5)


def test_the_order_of_answers_has_no_effect_on_average():
    """Ranks moved about: every rank's mean points stay those of the closed form."""
    rank = np.array([5, 0, 7, 2, 4, 1, 6, 3])
    result = tournament_rewards(
        answers(8), lambda table, k: sorted(table, key=lambda i: rank[i])[:k], seed=7, repeats=2000
    )
    np.testing.assert_allclose(result.points / 2000, EIGHT[rank], atol=5 * 1.5 / 2000**0.5)


def test_missing_answers_get_nothing():
    """Even where the judge likes them best."""
    given_answers = [None, "a", "  ", "b"]
    result = tournament_rewards(given_answers, best, seed=0)
    assert result.rewards[[0, 2]].tolist() == [0, 0] and result.points[0] > 0
    assert tournament_rewards([None], best, seed=0).rewards.tolist() == [0]
    assert tournament_rewards(["a"], best, seed=0).rewards.tolist() == [0.5]


def test_same_seed_same_rewards():
    runs = [tournament_rewards(answers(7), best, seed=s).points.tolist() for s in (4, 4, 5)]
    assert runs[0] == runs[1] != runs[2]


def raises(table, k):
    raise TimeoutError("no answer from the judge")


@pytest.mark.parametrize(
    "judge",
    [
        raises,
        lambda table, k: [],
        lambda table, k: None,
        lambda table, k: [99],
        lambda table, k: ["A"],
        lambda table, k: table,
        lambda table, k: [table[0]] * (k + 1),
    ],
)
def test_a_judge_that_fails_makes_random_winners(judge, caplog):
    """After three attempts; all points are given, equal ones for equal seeds, and failures are counted."""
    calls = []

    def counted(table, k):
        calls.append(tuple(table))
        return judge(table, k)

    result = tournament_rewards(answers(4), counted, seed=2, repeats=5)
    assert result.failures == result.judgements == 15 and len(calls) == 45
    assert result.points.sum() == 15
    assert result.points.tolist() == tournament_rewards(answers(4), raises, seed=2, repeats=5).points.tolist()
    assert "judge failed 3 times" in caplog.text


def test_one_winner_named_twice_is_no_answer():
    """A table of three with two winners fails; the final between the two has one, and stands."""
    options = {"group_size": 3, "winners_per_group": 2, "seed": 0, "repeats": 1}
    result = tournament_rewards(answers(3), lambda table, k: [table[0]] * k, **options)
    assert (result.judgements, result.failures) == (2, 1) and sorted(result.points) == [0, 1, 2]


def test_a_judge_that_recovers_is_believed():
    calls = []

    def shy(table, k):
        calls.append(table)
        if len(calls) % 3:
            raise ConnectionError
        return best(table, k)

    assert tournament_rewards(answers(4), shy, seed=2).failures == 0
    result = tournament_rewards(answers(4), shy, seed=2, attempts=2)
    assert result.failures > 0


def test_a_judge_cannot_change_the_table():
    def vandal(table, k):
        winners = best(table, k)
        table.clear()
        return winners

    assert tournament_rewards(answers(8), vandal, seed=0).points.tolist() == (
        tournament_rewards(answers(8), best, seed=0).points.tolist()
    )


@pytest.mark.parametrize(
    "name", ["group_size", "winners_per_group", "target_finalists", "repeats", "attempts"]
)
def test_errors_name_what_is_wrong(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least"):
        tournament_rewards(answers(4), best, seed=0, **{name: 0})
