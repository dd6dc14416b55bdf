"""pass@k, maj@k and intervals against enumeration."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.training.evaluation import majority_at_k, mean_interval, pass_at_k, summarize, wilson


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        right = [i < c for i in range(n)]
        subsets = list(itertools.combinations(right, k))
        assert pass_at_k(np.array([c]), n, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_majority_breaks_ties_evenly():
    answers = [["4", "4 ", "5"], ["1", "2", "3"], ["7", "7", "8"]]
    correct = np.array([[True, True, False], [False, True, False], [False, False, True]])
    # the majority is right; three answers of one vote each, one of them right; the majority is wrong
    assert majority_at_k(answers, correct) == pytest.approx((1 + 1 / 3 + 0) / 3)


@given(st.integers(1, 2000), st.floats(0, 1))
def test_wilson_solves_its_equation(n, share):
    """Both ends are the p at which (p̂ - p)² = z²·p(1-p)/n."""
    hits = round(share * n)
    for end in wilson(hits, n):
        assert (hits / n - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / n, abs=1e-12)


def test_interval_of_means_of_several_samples():
    values = np.array([0.0, 0.5, 1.0, 0.5])  # std √(1/6), half width 1.96·√(1/6)/2
    half = 1.959964 * math.sqrt(1 / 6) / 2
    assert mean_interval(values) == pytest.approx((0.5 - half, 0.5 + half))
    assert mean_interval(np.array([1.0, 1.0, 0.0])) == wilson(2, 3)


def test_summary_of_a_batch():
    scores = np.array([[1.0, 0.0], [np.nan, 0.25], [1.0, 1.0]], np.float32)
    out = summarize(scores, [["a", "b"], ["c", "c"], ["d", "d"]], correct_at=1.0)
    assert out["accuracy"] == out["mean@2"] == pytest.approx(0.5)
    assert out["mean_score"] == pytest.approx(3.25 / 6)
    assert out["pass@1"] == pytest.approx(0.5) and out["pass@2"] == pytest.approx(2 / 3)
    assert out["maj@2"] == pytest.approx((0.5 + 0 + 1) / 3)
