"""Prefix states against a walk along each row, and choices that depend on a row alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.rollouts.prefixes import choose, contexts, prefix_lengths
from jaxrl_llm.trajectory import Trajectories

WIDTH, STATES = 14, 4
lengths_jit = jax.jit(prefix_lengths, static_argnames="most")
choose_jit = jax.jit(choose, static_argnames=("most", "k"))


def make(rows, with_turns=False) -> Trajectories:
    """Rows of parts: ('p' prompt, 'a' action or 'o' observation, size). Tokens count from 10·row + 1."""
    n = len(rows)
    tokens, action, turn = np.zeros((n, WIDTH), np.int32), np.zeros((n, WIDTH), bool), np.zeros((n, WIDTH))
    lengths = np.zeros(n, np.int32)
    for i, parts in enumerate(rows):
        at = turns = 0
        for kind, size in parts:
            turns += kind == "a"
            action[i, at : at + size], turn[i, at : at + size] = kind == "a", turns
            at += size
        tokens[i, :at], lengths[i] = 10 * i + 1 + np.arange(at), at
        action[i, at:], tokens[i, at:] = i % 2 == 0, 99  # what lies beyond a row must not count
    zeros = jnp.zeros((n, WIDTH))
    return Trajectories(
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray(lengths),
        action_mask=jnp.asarray(action),
        behaviour_logp=zeros,
        raw_logp=zeros,
        log_kept=zeros,
        temperature=jnp.ones(n),
        finished=jnp.ones(n, bool),
        group=jnp.arange(n),
        turn=jnp.asarray(turn, jnp.int32) if with_turns else None,
    )


SEARCHES = [
    [("p", 3), ("a", 2), ("o", 2), ("a", 1), ("o", 3), ("a", 2)],  # two searches and an answer
    [("p", 2), ("a", 3)],  # an answer at once
    [("p", 4), ("a", 2), ("o", 5)],  # cut off after a result
    [("p", 2), ("a", 1), ("a", 2), ("o", 1), ("a", 1)],  # a call whose result was empty
]


def test_states_of_known_rows():
    ends, count = lengths_jit(make(SEARCHES), STATES)
    assert ends.tolist() == [[3, 7, 11, 0], [2, 0, 0, 0], [4, 11, 0, 0], [2, 6, 0, 0]]
    assert count.tolist() == [3, 1, 2, 2]
    ends, count = lengths_jit(make(SEARCHES, with_turns=True), STATES)  # turns tell calls apart
    assert ends[3].tolist() == [2, 3, 6, 0] and count.tolist() == [3, 1, 2, 3]


def test_contexts_are_the_rows_own_tokens():
    t = make(SEARCHES)
    ends, count = lengths_jit(t, STATES)
    everything = choose(jax.random.key(0), jnp.arange(4), count, STATES, None)
    got = contexts(t, ends, everything, suffix=(7, 8))
    assert [(s.row, s.turn) for s in got] == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1)]
    assert got[1].tokens == [1, 2, 3, 4, 5, 6, 7, 7, 8] and got[3].tokens == [11, 12, 7, 8]
    other = contexts(t, ends, everything, prompts=[[70], [71, 71], [72], [73]])
    assert other[1].tokens == [70, 4, 5, 6, 7] and other[3].tokens == [71, 71]


parts = st.lists(st.tuples(st.integers(1, 2), st.integers(0, 2)), max_size=4)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 2), parts), min_size=3, max_size=3), st.booleans())
def test_states_are_what_stood_before_each_time_the_policy_wrote(rows, with_turns):
    built = [[("p", prompt), *(x for a, o in turns for x in (("a", a), ("o", o)))] for prompt, turns in rows]
    ends, count = lengths_jit(make(built, with_turns), STATES)
    for i, one in enumerate(built):
        at, expected, before = 0, [], "p"
        for kind, size in one:
            if size:
                if kind == "a" and (before != "a" or with_turns):
                    expected.append(at)
                at, before = at + size, kind
        if before != "a" and at:
            expected.append(at)
        expected = expected[:STATES]
        assert ends[i].tolist() == expected + [0] * (STATES - len(expected))
        assert int(count[i]) == len(expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, STATES), min_size=5, max_size=5), st.integers(0, 5), st.integers(0, 99))
def test_choices(counts, k, seed):
    """As many as there are up to k, none beyond, whatever the other rows and the number of columns."""
    key, uids = jax.random.key(seed), jnp.arange(5) + seed
    count = jnp.array(counts)
    chosen = np.asarray(choose_jit(key, uids, count, STATES, k))
    assert chosen.sum(axis=1).tolist() == [min(k, c) for c in counts]
    assert not chosen[np.arange(STATES) >= np.array(counts)[:, None]].any()
    order = np.array([3, 1, 4, 0, 2])
    assert np.array_equal(chosen[order], choose_jit(key, uids[order], count[order], STATES, k))
    wider = np.asarray(choose_jit(key, uids, count, STATES + 2, k))
    assert np.array_equal(wider[:, :STATES], chosen) and not wider[:, STATES:].any()
    everything = np.asarray(choose_jit(key, uids, count, STATES, None))
    assert everything.sum(axis=1).tolist() == counts


def test_every_pair_is_as_likely():
    rows = 6000
    chosen = np.asarray(choose(jax.random.key(0), jnp.arange(rows), jnp.full(rows, 4), 4, 2))
    pairs, counts = np.unique(chosen, axis=0, return_counts=True)
    assert len(pairs) == 6 and np.max(np.abs(counts / rows - 1 / 6)) < 5 * np.sqrt(5 / 36 / rows)


def test_bad_input():
    t = make(SEARCHES)
    ends, count = lengths_jit(t, STATES)
    with pytest.raises(ValueError, match="k=-1"):
        choose(jax.random.key(0), jnp.arange(4), count, STATES, -1)
    everything = choose(jax.random.key(0), jnp.arange(4), count, STATES, None)
    with pytest.raises(ValueError, match="2 prompts for 4 rows"):
        contexts(t, ends, everything, prompts=[[1], [2]])
    bare = dataclasses.replace(t, action_mask=t.action_mask.at[1, 0].set(True))
    ends, count = lengths_jit(bare, STATES)
    with pytest.raises(ValueError, match="state 0 of row 1 has no tokens"):
        contexts(bare, ends, everything)
