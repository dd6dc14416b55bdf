"""Prompt schedules: exact totals within bounds, prompts in their order, the same future after a resume."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.data.order import Cursor, take
from jaxrl_llm.rollouts.allocation import variance_allocation
from jaxrl_llm.rollouts.schedules import (
    ALLOCATIONS,
    Batch,
    from_json,
    next_batch,
    record,
    start,
    to_json,
)

many = settings(max_examples=80, deadline=None, derandomize=True)


@st.composite
def runs(draw):
    """A source, a batch that the bounds allow, a rule, and a seed for outcomes."""
    size, prompts = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    low = draw(st.integers(0, 4))
    high = low + draw(st.integers(1, 6))
    total = draw(st.integers(prompts * low, prompts * high))
    return (
        size,
        prompts,
        total,
        low,
        high,
        draw(st.sampled_from(sorted(ALLOCATIONS))),
        draw(st.integers(0, 99)),
    )


def play(schedule, steps, prompts, total, low, high, rule, seed, first=0):
    """Batches and the last schedule; outcomes are a function of seed and step."""
    out = []
    for step in range(first, first + steps):
        batch, schedule = next_batch(schedule, prompts, total, rule=rule, low=low, high=high)
        rng = np.random.default_rng([seed, step])
        schedule = record(schedule, batch.prompts, rng.integers(0, batch.counts + 1), batch.counts)
        out.append(batch)
    return out, schedule


def same(a: list[Batch], b: list[Batch]) -> bool:
    return all(np.array_equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two))


@many
@given(runs())
def test_totals_are_exact_and_prompts_come_in_their_order(run):
    size, prompts, total, low, high, rule, seed = run
    batches, schedule = play(start(seed, size), 4, prompts, total, low, high, rule, seed)
    for batch in batches:
        assert batch.counts.sum() == total and np.all((batch.counts >= low) & (batch.counts <= high))
    visited = np.concatenate([batch.prompts for batch in batches])
    expected, cursor = take(Cursor(seed), 4 * prompts, size)
    assert np.array_equal(visited, expected) and schedule.cursor == cursor
    whole = 4 * prompts // size
    assert np.all(np.bincount(visited[: whole * size], minlength=size) == whole)
    tried = np.zeros(size, int)
    for batch in batches:
        np.add.at(tried, batch.prompts, batch.counts)
    assert np.array_equal(schedule.trials, tried) and schedule.trials.sum() == 4 * total


@many
@given(runs(), st.integers(0, 3))
def test_a_resumed_schedule_has_the_same_future(run, stop):
    size, *rest, seed = run
    whole, last = play(start(seed, size), 4, *rest, seed)
    before, schedule = play(start(seed, size), stop, *rest, seed)
    schedule = from_json(json.loads(json.dumps(to_json(schedule))))
    after, end = play(schedule, 4 - stop, *rest, seed, first=stop)
    assert same(whole, before + after) and to_json(last) == to_json(end)


def test_nothing_given_is_changed():
    schedule = start(3, 5)
    batch, later = next_batch(schedule, 4, 32)
    again, _ = next_batch(schedule, 4, 32)
    record(later, batch.prompts, batch.counts, batch.counts)
    assert same([batch], [again]) and not schedule.trials.any() and not later.trials.any()


def test_what_is_uncertain_gets_more():
    """Success rates 0, 1/2 and 1 of 8 each; every rule in its closed form."""
    schedule = record(start(0, 3), [0, 1, 2], [0, 4, 8], [8, 8, 8])
    for rule, expected in (
        ("uniform", {0: 8, 1: 8, 2: 8}),
        ("neyman", {0: 4, 1: 16, 2: 4}),  # σ = 0 gets low
        ("dynamo", {0: 5, 1: 15, 2: 4}),  # of 12 more 12·0.01/0.306 = 0.39, 11.22, 0.39: the first has it
    ):
        batch, _ = next_batch(schedule, 3, 24, rule=rule, low=4, high=20)
        assert dict(zip(batch.prompts.tolist(), batch.counts.tolist())) == expected, rule


def test_new_prompts_are_explored():
    """Unknown ones count as 1/2 under Neyman, and have their quota first under DynaMO."""
    schedule = record(start(0, 2), [0], [1], [8])
    batch, _ = next_batch(schedule, 2, 16, rule="neyman", low=1, high=15)
    share = 16 * 0.5 / (0.5 + np.sqrt(0.125))
    assert batch.counts[batch.prompts == 1] == round(share)
    batch, _ = next_batch(schedule, 2, 8, rule="dynamo", low=1, high=8, initial_budget=5)
    assert dict(zip(batch.prompts.tolist(), batch.counts.tolist())) == {0: 3, 1: 5}
    known = record(schedule, [1], [3], [8])
    batch, _ = next_batch(known, 2, 16, rule="neyman", low=1, high=15, power=1)
    expected = variance_allocation([1, 3], [8, 8], 16, low=1, high=15, power=1)
    assert batch.counts.tolist() == expected[batch.prompts].tolist()


def test_one_prompt_twice_is_counted_twice():
    schedule = record(start(0, 2), [1, 1, 0], [1, 2, 0], [2, 4, 3])
    assert schedule.successes.tolist() == [0, 3] and schedule.trials.tolist() == [3, 6]


def test_a_rule_of_ones_own_must_keep_the_total():
    def all_low(successes, trials, total, *, low, high):
        return np.full(len(trials), low)

    batch, _ = next_batch(start(0, 4), 2, 8, rule=all_low, low=4, high=9)
    assert batch.counts.tolist() == [4, 4]
    with pytest.raises(ValueError, match="add up to 10"):
        next_batch(start(0, 4), 2, 10, rule=all_low, low=4, high=9)


def test_bad_input():
    schedule = start(0, 4)
    for arguments, message in (
        ({"total": 7}, "total=7 is not between 2·4"),
        ({"total": 49}, "total=49"),
        ({"total": 8, "num_prompts": 0}, "0·4"),
        ({"total": 8, "rule": "luck"}, "unknown rule 'luck'"),
        ({"total": 8, "rule": "neyman", "power": 0}, "power=0"),
    ):
        with pytest.raises(ValueError, match=message):
            next_batch(schedule, **{"num_prompts": 2} | arguments)
    with pytest.raises(ValueError, match="prompt 4 is none of the source's 4"):
        record(schedule, [4], [0], [1])
    with pytest.raises(ValueError, match="successes"):
        record(schedule, [0], [2], [1])
    with pytest.raises(ValueError, match="must be alike"):
        record(schedule, [0], [0, 1], [1])
    with pytest.raises(ValueError, match="0 prompts"):
        start(0, 0)
