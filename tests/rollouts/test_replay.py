"""The replay buffer against a list of dictionaries that does the same by its words."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.rollouts.replay import (
    EVICT,
    add,
    ages,
    empty,
    expire,
    items_at,
    random_scores,
    select,
)

N, K, M = 5, 3, 2
EXAMPLE = {"tokens": jnp.zeros(2, jnp.int32), "reward": jnp.zeros(())}

add_jit = jax.jit(add, static_argnames="evict")
select_jit = jax.jit(select, static_argnames="count")
expire_jit = jax.jit(expire, static_argnames=("max_age", "max_uses"))


def items(first: int, count: int = K):
    """Items by number: their reward is the number."""
    numbers = jnp.arange(first, first + count)
    return {"tokens": jnp.stack([numbers, -numbers], axis=1).astype(jnp.int32), "reward": numbers * 1.0}


class Plain:
    """Places with dictionaries or None."""

    def __init__(self):
        self.places = [None] * N

    def add(self, numbers, step, evict):
        """One by one: a free place, else that of the item to evict among those that were there before."""
        fresh = set()
        for number in numbers:

            def worth(i):
                item = self.places[i]
                age, uses = step - item["born"], item["uses"]
                return ((age, uses) if evict == "oldest" else (uses, age)), -i

            free = [i for i in range(N) if self.places[i] is None]
            old = [i for i in range(N) if self.places[i] is not None and i not in fresh]
            place = free[0] if free else max(old, key=worth)
            self.places[place] = {"number": number, "born": step, "uses": 0}
            fresh.add(place)

    def select(self, scores, count):
        order = [i for i in range(N) if self.places[i] is not None and scores[i] > -np.inf]
        order = sorted(order, key=lambda i: (-scores[i], i))[:count]
        for i in order:
            self.places[i]["uses"] += 1
        return [self.places[i]["number"] for i in order]

    def expire(self, step, max_age, max_uses):
        for i, item in enumerate(self.places):
            if item and (step - item["born"] > max_age or item["uses"] >= max_uses):
                self.places[i] = None


def contents(buffer, step):
    """(number, age, uses) by place, None where it is free."""
    rows = zip(*(np.asarray(x).tolist() for x in (buffer.items["reward"], ages(buffer, step), buffer.uses)))
    return [row if taken else None for row, taken in zip(rows, np.asarray(buffer.taken))]


actions = st.one_of(
    st.tuples(st.just("add"), st.lists(st.booleans(), min_size=K, max_size=K)),
    st.tuples(
        st.just("select"),
        st.lists(st.sampled_from([0.0, 1.0, 2.0, np.nan, -np.inf]), min_size=N, max_size=N),
    ),
    st.tuples(st.just("expire"), st.none()),
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(actions, min_size=1, max_size=12), st.sampled_from(EVICT))
def test_the_buffer_does_what_a_list_does(history, evict):
    buffer, plain, number = empty(EXAMPLE, N), Plain(), 0
    for step, (action, argument) in enumerate(history):
        if action == "add":
            buffer = add_jit(buffer, items(number), step, valid=jnp.array(argument), evict=evict)
            plain.add([number + i for i, valid in enumerate(argument) if valid], step, evict)
            number += K
        elif action == "select":
            places, is_real, buffer = select_jit(buffer, jnp.array(argument), M)
            places, is_real = np.asarray(places), np.asarray(is_real)
            got = np.asarray(items_at(buffer, places)["reward"])[is_real].tolist()
            assert got == plain.select(argument, M)
        else:
            buffer = expire_jit(buffer, step, max_age=3, max_uses=2)
            plain.expire(step, 3, 2)
        expected = [p and (p["number"], step - p["born"], p["uses"]) for p in plain.places]
        assert contents(buffer, step) == expected
    assert np.array_equal(buffer.items["tokens"][:, 0], -buffer.items["tokens"][:, 1])


def test_oldest_and_most_used_go_first():
    buffer = empty(EXAMPLE, 4)
    buffer = add(buffer, items(0, 2), 0)
    buffer = add(buffer, items(2, 2), 1)
    _, _, used = select(buffer, jnp.array([0.0, 0.0, 0.0, 1.0]), 1)  # item 3
    for evict, left in (("oldest", [1, 2, 3, 9]), ("most_used", [0, 1, 2, 9])):
        after = add(used, items(9, 1), 2, evict=evict)
        assert sorted(np.asarray(after.items["reward"]).astype(int).tolist()) == left
    assert np.asarray(ages(used, 5)).tolist() == [5, 5, 4, 4]


def test_a_full_turnover_and_a_buffer_of_one():
    buffer = add(add(empty(EXAMPLE, 3), items(0), 0), items(3), 1)
    assert sorted(np.asarray(buffer.items["reward"]).tolist()) == [3, 4, 5]
    one = add(add(empty(EXAMPLE, 1), items(0, 1), 0), items(7, 1), 0)
    assert np.asarray(one.items["reward"]).tolist() == [7]


def test_a_sample_is_without_replacement_and_follows_the_odds():
    """First places have the odds themselves, pairs those of drawing one after the other: enumerated."""
    odds = np.array([0.5, 0.3, 0.2, 0.0])
    logits = jnp.log(jnp.asarray(odds))
    buffer = add(empty(EXAMPLE, 4), items(0, 4), 0)
    draws = 20_000

    def draw(key):
        return select(buffer, random_scores(key, logits), 2)[0]

    pairs = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), draws)))
    counts = np.zeros((4, 4))
    np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1 / draws)
    expected = odds[:, None] * odds / (1 - odds)[:, None]
    np.fill_diagonal(expected, 0)
    assert np.max(np.abs(counts - expected)) < 5 * np.sqrt(0.25 / draws)
    assert not counts[3].any() and not counts[:, 3].any() and not np.diag(counts).any()
    assert np.array_equal(draw(jax.random.key(4)), draw(jax.random.key(4)))


def test_too_few_items_are_masked():
    buffer = add(empty(EXAMPLE, 4), items(5, 2), 3)
    places, is_real, after = select(buffer, jnp.zeros(4), 3)
    assert is_real.tolist() == [True, True, False]
    assert items_at(after, places)["reward"][:2].tolist() == [5, 6] and after.uses.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("cut", [2, 5])
def test_a_resumed_buffer_has_the_same_future(cut):
    def play(buffer, steps):
        out = []
        for step in steps:
            buffer = add_jit(buffer, items(3 * step), step, evict="most_used")
            scores = random_scores(jax.random.fold_in(jax.random.key(1), step), jnp.zeros(N))
            places, is_real, buffer = select_jit(buffer, scores, M)
            out.append((places.tolist(), is_real.tolist()))
        return out, buffer

    whole, last = play(empty(EXAMPLE, N), range(8))
    before, buffer = play(empty(EXAMPLE, N), range(cut))
    leaves, structure = jax.tree.flatten(buffer)
    file = io.BytesIO()
    np.savez(file, *leaves)
    file.seek(0)
    with np.load(file) as saved:
        buffer = jax.tree.unflatten(structure, [jnp.asarray(saved[name]) for name in saved.files])
    after, end = play(buffer, range(cut, 8))
    assert whole == before + after
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(end)))


def test_bad_input():
    buffer = empty(EXAMPLE, 2)
    with pytest.raises(ValueError, match="3 items do not fit into a buffer of 2"):
        add(buffer, items(0, 3), 0)
    with pytest.raises(ValueError, match="evict='newest'"):
        add(buffer, items(0, 1), 0, evict="newest")
    with pytest.raises(ValueError, match="unlike"):
        add(buffer, items(0, 1) | {"reward": jnp.zeros((1, 2))}, 0)
    with pytest.raises(ValueError, match="unlike"):
        add(buffer, items(0, 1) | {"reward": jnp.zeros(1, jnp.int32)}, 0)
    with pytest.raises(ValueError, match="count=3"):
        select(buffer, jnp.zeros(2), 3)
    with pytest.raises(ValueError, match="2 places"):
        select(buffer, jnp.zeros(3), 1)
    with pytest.raises(ValueError, match="capacity=0"):
        empty(EXAMPLE, 0)
