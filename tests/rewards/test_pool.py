"""Reliability J: whatever a reward function does, the step goes on and only the culprits lose their score."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from jaxrl_llm.rewards.pool import RewardPool

USER = str(Path(__file__).with_name("user_rewards.py"))
TIMEOUT = 4.0  # seconds, where a call hangs
PATIENCE = 60.0  # seconds, where none does: nothing but a hanging call may be late on a loaded machine
MARGIN = 2.0  # seconds that a loaded machine may take to hand over the result
FORMS = ("by_batch", "by_row")


@pytest.fixture(scope="module")
def pool():
    functions = [f"{USER}:{form}" for form in FORMS]
    with RewardPool(functions, workers=2, timeout=PATIENCE, memory_gib=0.5) as pool:
        yield pool


@pytest.fixture(scope="module")
def hasty_pool():
    with RewardPool([f"{USER}:{form}" for form in FORMS], workers=2, timeout=TIMEOUT) as pool:
        yield pool


def score(pool, completions, timeout=PATIENCE, **columns):
    """Scores of the completions, and that they came inside the deadline."""
    size = len(completions)
    pool.warm_up()
    start = time.monotonic()
    scores = pool.score(["p"] * size, completions, [[1]] * size, {"ground_truth": ["g"] * size, **columns})
    assert time.monotonic() - start < timeout + MARGIN
    return scores


def wait_until_gone(pids, seconds=5.0):
    """Whether none of the processes runs any more (a zombie does not)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        running = []
        for pid in pids:
            try:
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    running.append(pid)
            except psutil.NoSuchProcess:
                pass
        if not running:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    "order, reason",
    [
        ("exit", "crashed"),
        ("allocate", "out_of_memory"),
        ("raise", "raised_ValueError"),
        ("unpicklable", "raised_Strange"),
        ("sysexit", "raised_SystemExit"),
        ("none", "not_applicable"),
        ("nan", "nonfinite"),
        ("inf", "nonfinite"),
        ("huge", "nonfinite"),
        ("string", "bad_value"),
        ("list", "bad_value"),
    ],
)
def test_only_the_culprit_loses_its_score(pool, order, reason):
    scores = score(pool, ["score:1", "score:0.25", order, "score:-3"])
    for form in FORMS:
        np.testing.assert_array_equal(scores.values[form], np.float32([1, 0.25, np.nan, -3]))
        assert scores.values[form].dtype == np.float32
        assert scores.failures[form] == {reason: 1}
    assert scores.failed.tolist() == [False, False, reason != "not_applicable", False]


@pytest.mark.parametrize("order, value", [("float32", 2.5), ("int64", 3), ("array0d", 4), ("bool", 1)])
def test_numpy_scalars_are_numbers(pool, order, value):
    scores = score(pool, [order, "score:0.5"])
    for form in FORMS:
        assert scores.values[form].tolist() == [value, 0.5]
        assert scores.failures[form] == {}


def test_wrong_count(pool):
    """A list of three for four rows: which of them is missing is found out by single calls."""
    scores = score(pool, ["score:1", "count", "score:2", "score:3"])
    np.testing.assert_array_equal(scores.values["by_batch"], np.float32([1, np.nan, 2, 3]))
    assert scores.failures["by_batch"] == {"wrong_count": 1}


def test_several_culprits_at_once(pool):
    completions = ["exit", "score:1", "allocate", "score:2", "raise", "score:3", "none", "nan", "score:4"]
    expected = np.float32([np.nan, 1, np.nan, 2, np.nan, 3, np.nan, np.nan, 4])
    scores = score(pool, completions)
    for form in FORMS:
        np.testing.assert_array_equal(scores.values[form], expected)
        assert sum(scores.failures[form].values()) == 5


def test_a_row_that_hangs_leaves_time_for_the_last_one():
    """The last three rows come to one worker together; the other has nothing left to do by the second."""
    with RewardPool([f"{USER}:bare_row"], workers=2, timeout=TIMEOUT) as pool:
        scores = score(pool, ["score:1"] * 21 + ["slow:0.3", "sleep", "score:2"], TIMEOUT)
        np.testing.assert_array_equal(scores.values["bare_row"], np.float32([1] * 22 + [np.nan, 2]))


def test_a_row_that_hangs_loses_its_score_and_no_other(hasty_pool):
    scores = score(hasty_pool, ["score:1", "score:0.25", "sleep", "score:-3"], TIMEOUT)
    for form in FORMS:
        np.testing.assert_array_equal(scores.values[form], np.float32([1, 0.25, np.nan, -3]))
        assert scores.failures[form] == {"timeout": 1}


def test_all_rows_hang_and_the_next_step_is_sound(hasty_pool):
    scores = score(hasty_pool, ["sleep"] * 12, TIMEOUT)
    for form in FORMS:
        assert scores.failures[form] == {"timeout": 12}
        assert np.isnan(scores.values[form]).all()
    scores = score(hasty_pool, [f"score:{i}" for i in range(12)], TIMEOUT)
    for form in FORMS:
        assert scores.values[form].tolist() == list(range(12))


@pytest.mark.parametrize("order", ["family", "orphans"])
def test_descendants_of_a_lost_worker_die_with_it(tmp_path, order):
    """Also those that left its process group or session, and those whose parent is gone already."""
    with RewardPool([f"{USER}:bare_row"], workers=1, timeout=TIMEOUT) as pool:
        scores = score(pool, ["score:1", f"{order}:{tmp_path / 'pids'}", "score:2"], TIMEOUT)
        np.testing.assert_array_equal(scores.values["bare_row"], np.float32([1, np.nan, 2]))
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert len(pids) == 3
        assert wait_until_gone(pids)


def test_a_fork_that_returns_does_not_answer_twice(pool):
    for _ in range(3):
        scores = score(pool, ["fork_back", "score:1", "fork_back", "score:2"])
        for form in FORMS:
            assert scores.values[form].tolist() == [7, 1, 7, 2]


def test_death_of_an_idle_worker_harms_nobody(pool):
    score(pool, ["die_later"] * 4)
    time.sleep(0.5)
    scores = score(pool, ["score:1"] * 8)
    for form in FORMS:
        assert scores.values[form].tolist() == [1] * 8


def test_threads_share_a_pool(pool):
    results = {}

    def work(name):
        for step in range(5):
            completions = [f"score:{100 * name + step}", "raise", f"score:{name}"]
            results[name, step] = score(pool, completions)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    for (name, step), scores in results.items():
        for form in FORMS:
            np.testing.assert_array_equal(scores.values[form], np.float32([100 * name + step, np.nan, name]))


def test_no_rows(pool):
    scores = score(pool, [])
    assert scores.values["by_row"].shape == (0,) and scores.failures["by_row"] == {}


def test_workers_do_not_import_jax(pool):
    assert score(pool, ["jax"]).values["by_row"].tolist() == [0]


def test_wrong_lengths_and_data_that_cannot_travel(pool):
    with pytest.raises(ValueError, match="ground_truth"):
        pool.score(["p"], ["c"], [[1]], {"ground_truth": ["g", "g"]})
    with pytest.raises((TypeError, AttributeError), match="pickle"):
        pool.score(["p"], ["c"], [[1]], {"ground_truth": [threading.Lock()]})


def test_async_functions_arrays_and_options():
    functions = [
        f"{USER}:async_batch",
        f"{USER}:async_row",
        f"{USER}:as_array",
        {"path": f"{USER}:scaled", "options": {"factor": 2.0, "offset": 1}, "name": "twice"},
        {"path": f"{USER}:scaled", "options": {"factor": -1.0}},
    ]
    with RewardPool(functions, workers=1, timeout=20) as pool:
        scores = pool.score(["p", "p"], ["1", "5"], [[1, 2, 3], np.array([4])], {"answer": ["1", "4"]})
    values = {name: value.tolist() for name, value in scores.values.items()}
    assert values == {
        "async_batch": [3, 1],
        "async_row": [1, 0],
        "as_array": [0, 1],
        "twice": [3, 11],
        "scaled": [-1, -5],
    }


def test_close_ends_the_workers_and_calls_under_way():
    before = {child.pid for child in psutil.Process().children()}
    pool = RewardPool([f"{USER}:bare_row"], workers=2, timeout=60)
    pool.warm_up()
    pids = {child.pid for child in psutil.Process().children()} - before
    assert len(pids) == 2
    results = []
    thread = threading.Thread(target=lambda: results.append(pool.score(["p"], ["sleep"], [[]], {})))
    thread.start()
    time.sleep(0.2)
    start = time.monotonic()
    pool.close()
    thread.join(5)
    assert time.monotonic() - start < 5 and wait_until_gone(pids)
    assert np.isnan(results[0].values["bare_row"]).all()
    with pytest.raises(RuntimeError, match="closed"):
        pool.score(["p"], ["score:1"], [[]], {})
    pool.close()


def test_a_worker_that_cannot_start_is_a_clear_error():
    with (
        RewardPool([f"{USER}:bare_row"], workers=1, memory_gib=0.03) as pool,
        pytest.raises(RuntimeError, match="cannot be started"),
    ):
        pool.score(["p"], ["score:1"], [[]], {})


MAIN = """
import os, sys
with open("imported", "a") as file:
    file.write("x")
from jaxrl_llm.rewards.pool import RewardPool
with RewardPool([{function!r}], workers=2, timeout=60) as pool:
    assert pool.score(["p"], ["score:1"], [[]], {{}}).values["bare_row"].tolist() == [1]
    print("ready", flush=True)
    pool.score(["p"] * 2, ["sleep"] * 2, [[]] * 2, {{}})
"""


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_program(tmp_path, ending):
    """Run by `python -m` without a `__main__` guard, which the workers must not import again."""
    (tmp_path / "program.py").write_text(MAIN.format(function=f"{USER}:bare_row"))
    program = subprocess.Popen(
        [sys.executable, "-m", "program"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
    )
    assert program.stdout.readline() == b"ready\n"
    workers = [child.pid for child in psutil.Process(program.pid).children(recursive=True)]
    assert len(workers) == 2
    time.sleep(0.2)
    program.send_signal(ending)
    _, stderr = program.communicate(timeout=10)
    assert program.returncode != 0
    if ending == signal.SIGINT:
        assert stderr.rstrip().endswith(b"KeyboardInterrupt")
    assert wait_until_gone(workers)
    assert (tmp_path / "imported").read_text() == "x"
