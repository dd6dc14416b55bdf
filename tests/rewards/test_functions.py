"""Built-in rewards: closed forms, and the scorers at work in the pool."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.data.sources import open_source
from jaxrl_llm.rewards.functions import (
    exact_match,
    format_regex,
    math_equivalence,
    overlong_penalty,
    reasoning_gym,
)
from jaxrl_llm.rewards.pool import RewardPool, combine


@pytest.mark.parametrize(
    "length, penalty",
    [
        (0, 0.0),
        (15, 0.0),
        (16, 0.0),
        (17, -0.25),
        (18, -0.5),
        (19, -0.75),
        (20, -1.0),
        (21, -1.0),
        (99, -1.0),
    ],
)
def test_overlong_penalty(length, penalty):
    """L = 20, c = 4: 0 up to 16, a straight line to −1 at 20, −1 beyond."""
    assert overlong_penalty([[0] * length], max_completion_length=20, buffer=4) == [penalty]


@pytest.mark.parametrize("buffer", [0, -1, 21])
def test_overlong_penalty_refuses_a_buffer_outside_the_length(buffer):
    with pytest.raises(ValueError, match="buffer"):
        overlong_penalty([[1]], max_completion_length=20, buffer=buffer)


@pytest.mark.parametrize(
    "completion, truth, equal",
    [
        ("0.5", "1/2", 1.0),
        ("1/2", "0.5", 1.0),
        (r"The answer is $\frac{1}{2}$.", "1/2", 1.0),
        (r"so \boxed{\frac12}", "0.5", 1.0),
        (r"\frac{2}{4}", r"\frac{1}{2}", 1.0),
        ("1/3", "1/2", 0.0),
        (r"\boxed{(0, 1]}", "(0,1]", 1.0),
        ("(0,1]", "$(0, 1]$", 1.0),
        (r"\boxed{[0, 1]}", "(0,1]", 0.0),
        (r"$[0, \infty)$", r"[0,\infty)", 1.0),
        (r"$\{2, 1\}$", r"\{1,2\}", 1.0),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1.0),
        ("1,000", "1000", 1.0),
        ("first 3, then 4, so the answer is 7", 7, 1.0),
        ("no number at all", "7", 0.0),
        ("", "7", 0.0),
    ],
)
def test_math_equivalence(completion, truth, equal):
    assert math_equivalence(completion, truth) == equal


def test_math_equivalence_without_a_usable_truth():
    assert math_equivalence("7", None) is None
    with pytest.raises(ValueError, match="ground truth"):
        math_equivalence("7", "")


def test_exact_match():
    assert exact_match(" 42\n", 42) == 1.0
    assert exact_match("42.0", "42") == 0.0
    assert exact_match("<answer>1</answer> no, <answer> 2 </answer>", "2", tag="answer") == 1.0
    assert exact_match("2", "2", tag="answer") == 0.0
    assert exact_match("None", None) is None


def test_format_regex():
    message = [{"role": "assistant", "content": "<a>1</a>"}]
    assert format_regex(["<a>1</a>", "x<a>1</a>", message, "<a>\n</a>"], "<a>.*</a>") == [1.0, 0.0, 1.0, 0.0]
    assert format_regex(["<a>\n</a>"], "(?s)<a>.*</a>") == [1.0]
    assert format_regex(["a", "b", "c"], ["a", "a", None]) == [1.0, 0.0, None]


def test_reasoning_gym_uses_the_scorer_of_the_task():
    """countdown accepts any expression with the right value, which only its own scorer can tell."""
    source = open_source("reasoning_gym", name="countdown", size=3, seed=5)
    row = source[0]
    columns = {name: row[name] for name in ("source_dataset", "task_config", "entry")}
    solution = row["entry"]["metadata"]["expression"]
    assert reasoning_gym(solution, **columns) == 1.0
    assert reasoning_gym(f"so <answer> ({solution}) </answer>", tag="answer", **columns) == 1.0
    assert reasoning_gym("1", **columns) < 1.0
    assert reasoning_gym("1", "countdown", None) is None


def test_scorers_work_when_called_from_threads():
    """math-verify's own alarms fail outside the main thread; ours is a deadline on the process."""
    source = open_source("reasoning_gym", name="chain_sum", size=8, seed=1)
    rows = [source[index] for index in range(8)]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    prompts = [row["prompt"] for row in rows]
    right = columns["answer"]
    wrong = [f"{int(answer) + 1}" for answer in right]
    options = {"max_completion_length": 8, "buffer": 4}
    functions = [
        "reasoning_gym",
        "math_equivalence",
        "exact_match",
        {"path": "overlong_penalty", "options": options},
    ]
    results = {}

    def work(pool, name, completions):
        results[name] = pool.score(prompts, completions, [[0] * 6] * 8, columns)

    with RewardPool(functions, timeout=60) as pool:
        threads = [
            threading.Thread(target=work, args=(pool, *item)) for item in (("right", right), ("wrong", wrong))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for name in functions[:3]:
        assert results["right"].values[name].tolist() == [1.0] * 8
        assert (results["wrong"].values[name] < 1.0).all()
        assert results["wrong"].failures[name] == {}
    assert results["right"].values["overlong_penalty"].tolist() == [-0.5] * 8


@given(st.data())
def test_combine(data):
    """Against a loop in plain Python: the weighted sum over what applies, NaN where nothing does."""
    functions, rows = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 6))
    number = st.one_of(st.just(float("nan")), st.floats(-100, 100, width=32))
    column = st.lists(number, min_size=rows, max_size=rows)
    values = {f"f{i}": np.array(data.draw(column), np.float32) for i in range(functions)}
    weights = {name: data.draw(st.floats(-10, 10, width=32)) for name in reversed(list(values))}
    reward = combine(values, weights)
    assert reward.dtype == np.float32 and reward.shape == (rows,)
    for row in range(rows):
        terms = [
            weights[name] * float(values[name][row])
            for name in values
            if values[name][row] == values[name][row]
        ]
        expected = np.float32(sum(terms)) if terms else np.nan
        np.testing.assert_allclose(reward[row], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", [{}, {"a": 1.0}, {"a": 1.0, "c": 1.0}, {"a": 1, "b": 1, "c": 1}])
def test_combine_wants_one_weight_per_function(weights):
    with pytest.raises(ValueError, match="one weight each"):
        combine({"a": np.zeros(2), "b": np.zeros(2)}, weights)


def test_import_is_light():
    """Workers import these modules under a memory limit."""
    code = (
        "import sys, jaxrl_llm.rewards.functions, jaxrl_llm.rewards.pool; "
        "print({'jax', 'reasoning_gym', 'math_verify', 'sympy', 'transformers', 'pebble'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
