"""Run by test_checkpoints.py as a process that may be killed, or whose disk runs full."""

import resource
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl_llm.training.checkpoints import CheckpointError, Checkpoints

SHAPE = (500, 1000)  # 2 MB, incompressible


def state_at(step: int) -> dict[str, Any]:
    """What a run has computed after `step` updates."""
    arrays = np.random.default_rng(step).standard_normal((4, *SHAPE), np.float32)
    return {"params": [jax.numpy.asarray(w) for w in arrays], "key": jax.random.key(step)}


def assert_same(left: Any, right: Any) -> None:
    """Bit by bit, keys included."""

    def same(x: Any, y: Any) -> None:
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)

    jax.tree.map(same, left, right)


def run_until_killed(folder: Path) -> None:
    """Resumes from the latest checkpoint and saves every step, without a pause."""
    with Checkpoints(folder, keep_last=2) as checkpoints:
        found = checkpoints.latest()
        if found is not None:
            state, host = checkpoints.restore(state_at(0))
            assert_same(state, state_at(found))
            assert host == {"step": found}
        for step in range(0 if found is None else found + 1, 10_000):
            checkpoints.save(step, state_at(step), {"step": step})


def fill_the_disk(folder: Path, limit: int) -> None:
    """Steps 1 to 3 do not fit, and are noticed in three places; steps 0 and 4 do."""

    def set_limit(size: int) -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    small, large = {"w": state_at(0)["params"][0]}, {"w": np.random.default_rng(0).random(2_500_000)}

    def check(error: CheckpointError, step: int) -> None:
        message = str(error)
        assert f"saving step {step} (20.0 MB" in message, message
        assert str(folder) in message and " are free there now, step 0 still stands" in message, message
        assert ("File too large" if limit else "No space left") in message, message
        assert sorted(path.name for path in folder.iterdir()) == ["0"]  # no temporary folder is left
        with Checkpoints(folder, read_only=True) as others:
            assert_same(others.restore(small)[0], small)

    checkpoints = Checkpoints(folder, keep_last=1)
    checkpoints.save(0, small, {}, wait=True)
    set_limit(limit)
    checkpoints.save(1, large, {})  # fails behind our back, and the next call says so
    try:
        checkpoints.save(2, large, {})
        raise AssertionError("the failure of step 1 was lost")
    except CheckpointError as error:
        check(error, 1)
    try:
        checkpoints.save(2, large, {}, wait=True)
        raise AssertionError("the failure of step 2 was lost")
    except CheckpointError as error:
        check(error, 2)
    checkpoints.save(3, large, {})
    try:
        checkpoints.close()
        raise AssertionError("the failure of step 3 was lost")
    except CheckpointError as error:
        check(error, 3)
    try:
        with Checkpoints(folder, keep_last=1) as checkpoints:
            checkpoints.save(3, large, {})
            raise ZeroDivisionError
    except ZeroDivisionError as error:  # what stopped the run comes first
        assert "saving step 3" in error.__notes__[0]
    set_limit(resource.RLIM_INFINITY)
    with Checkpoints(folder, keep_last=1) as checkpoints:
        checkpoints.save(4, small, {})
        assert checkpoints.steps() == [4]
        assert_same(checkpoints.restore(small)[0], small)
    print("ALL GOOD")


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run_until_killed(Path(sys.argv[2]))
    else:
        fill_the_disk(Path(sys.argv[2]), int(sys.argv[3]))
