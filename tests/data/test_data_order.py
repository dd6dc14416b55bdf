"""The order of rows: properties of `take`."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.data.order import Cursor, permutation, take

sizes = st.integers(1, 40)
counts = st.integers(0, 130)
seeds = st.integers(0, 2**63)


@given(seeds, sizes, counts, counts, counts)
def test_taking_twice_is_taking_the_sum(seed, size, before, a, b):
    _, cursor = take(Cursor(seed), before, size)
    first, middle = take(cursor, a, size)
    second, end = take(middle, b, size)
    both, direct = take(cursor, a + b, size)
    np.testing.assert_array_equal(np.concatenate([first, second]), both)
    assert end == direct
    assert both.dtype == np.int64 and all(type(field) is int for field in end)


@given(seeds, sizes, st.integers(0, 3))
def test_every_epoch_visits_every_row_once(seed, size, epochs):
    indices, cursor = take(Cursor(seed), epochs * size, size)
    assert cursor == Cursor(seed, epochs, 0)
    for row in indices.reshape(epochs, size):
        assert sorted(row) == list(range(size))


@given(seeds, sizes, counts)
def test_resuming_at_a_boundary_begins_the_next_epoch(seed, size, count):
    _, boundary = take(Cursor(seed), 2 * size, size)
    resumed = Cursor(*map(int, np.asarray(boundary, np.uint64)))  # as a checkpoint gives it back
    np.testing.assert_array_equal(
        take(resumed, count, size)[0], take(Cursor(seed), 2 * size + count, size)[0][2 * size :]
    )


def test_seeds_and_epochs_differ_and_position_is_the_row():
    order = take(Cursor(3), 200, 100)[0]
    assert (order[:100] != order[100:]).sum() > 90
    assert (order[:100] != take(Cursor(4), 100, 100)[0]).sum() > 90
    # Not seed + epoch: neighbouring seeds do not share orders shifted by an epoch.
    assert (order[100:] != take(Cursor(4), 100, 100)[0]).sum() > 90
    np.testing.assert_array_equal(take(Cursor(3, 1, 30), 5, 100)[0], order[130:135])


def test_every_position_is_equally_likely():
    where = np.array([np.argmax(permutation(0, epoch, 8)) for epoch in range(8000)])
    counted = np.bincount(where, minlength=8)
    assert np.abs(counted - 1000).max() < 5 * np.sqrt(1000 * 7 / 8)


def test_the_order_is_the_same_on_every_machine_and_in_every_process():
    expected = [7, 4, 3, 2, 0, 1, 5, 8, 6, 9]
    assert take(Cursor(17), 10, 10)[0].tolist() == expected
    code = "from jaxrl_llm.data.order import *; print(take(Cursor(17), 10, 10)[0].tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert out.stdout.strip() == str(expected)


@pytest.mark.parametrize(
    ("cursor", "count", "size", "message"),
    [
        (Cursor(0), 1, 0, "source of 0 rows"),
        (Cursor(0), -1, 5, "must not be negative"),
        (Cursor(-1), 1, 5, "must not be negative"),
        (Cursor(0, 0, 9), 1, 5, "position=9.* stands outside a source of 5 rows: the data have changed"),
    ],
)
def test_wrong_arguments(cursor, count, size, message):
    with pytest.raises(ValueError, match=message):
        take(cursor, count, size)


def test_the_cached_order_cannot_be_spoilt():
    taken = take(Cursor(0), 5, 5)[0]
    taken[:] = 0  # the caller's own
    assert sorted(take(Cursor(0), 5, 5)[0]) == list(range(5))
    with pytest.raises(ValueError, match="read-only"):
        permutation(0, 0, 5)[0] = 0
