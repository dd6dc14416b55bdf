"""Exact round trips, kills, full disks, damaged files: nothing lost, nothing wrong read (reliability L)."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_child import assert_same, state_at
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_llm.training.checkpoints import CheckpointError, Checkpoints, ConfigMismatch, check_config
from jaxrl_llm.training.sealing import CHECKSUMS, damaged

CHILD = Path(__file__).with_name("checkpoint_child.py")


def child(*args: object, prefix: tuple[str, ...] = (), **kwargs: Any) -> subprocess.Popen[str]:
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*prefix, sys.executable, str(CHILD), *map(str, args)]
    return subprocess.Popen(command, env=env, text=True, **kwargs)


def full_state() -> dict[str, Any]:
    params = {"layers": [{"w": jnp.arange(6.0).reshape(2, 3)}, {"w": jnp.ones((2, 3), jnp.bfloat16) / 3}]}
    params["empty"] = jnp.zeros((0, 4))
    return {
        "params": params,
        "opt_state": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), 5),
        "flag": jnp.array(True),
        "version": 12_345_678_901,
        "temperature": 0.1,
        "done": False,
        "none": None,
        "tracker": np.array([0.1, np.nan, np.inf, -0.0], np.float64),
        "cursor": np.int64(2**40),
    }


def test_every_kind_of_leaf_comes_back_bit_by_bit(tmp_path: Path) -> None:
    state, host = full_state(), {"cursor": [1, 2, 3], "nested": {"x": 0.1, "y": None, "z": "é\n"}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, host)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, state
    )
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 0
        back, host_back = checkpoints.restore(abstract)
    assert host_back == host
    assert jax.tree.structure(back) == jax.tree.structure(state)  # optax's named tuples too
    for name in ("version", "temperature", "done"):
        assert type(back[name]) is type(state[name]) and back[name] == state[name]
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(back)):
        if isinstance(x, jax.Array):
            assert isinstance(y, jax.Array) and x.shape == y.shape and x.dtype == y.dtype
            if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
                x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    np.testing.assert_array_equal(
        jax.random.normal(back["keys"][2], (3,)), jax.random.normal(state["keys"][2], (3,))
    )


@pytest.mark.parametrize("state", [{}, {"empty": jnp.zeros((0, 2))}, jnp.arange(3)])
def test_small_states(tmp_path: Path, state: Any) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, {"a": 1})
        back, host = checkpoints.restore(state)
    assert_same(back, state)
    assert host == {"a": 1}


def test_saved_is_the_moment_of_the_call(tmp_path: Path) -> None:
    """The step donates its state and trackers change in place while the save goes on."""
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
    state = {f"w{i}": jax.random.normal(jax.random.key(i), (512, 512)) for i in range(16)}
    expected = {name: np.array(x) for name, x in state.items()}
    tracker = np.arange(1000.0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"model": state, "tracker": tracker}, {})
        tracker[:] = -1
        for _ in range(20):
            state = double(state)
        back, _ = checkpoints.restore({"model": state, "tracker": tracker})
    np.testing.assert_array_equal(back["tracker"], np.arange(1000.0))
    assert_same(back["model"], expected)


def test_another_sharding(tmp_path: Path) -> None:
    devices = np.array(jax.devices())
    one = NamedSharding(Mesh(devices[5:6], "x"), PartitionSpec())
    rows = NamedSharding(Mesh(devices[:4].reshape(2, 2), ("x", "y")), PartitionSpec("x", "y"))
    columns = NamedSharding(Mesh(devices[2:6], "x"), PartitionSpec(None, "x"))
    values = {"w": np.arange(64.0, dtype=np.float32).reshape(8, 8)}
    keys = jax.random.split(jax.random.key(0), 8)
    with Checkpoints(tmp_path) as checkpoints:
        for step, (before, after) in enumerate([(one, rows), (rows, one), (rows, columns)]):
            per_key = NamedSharding(after.mesh, PartitionSpec(*after.spec[:1]))
            checkpoints.save(step, {"keys": keys} | jax.device_put(values, before), {})
            abstract = {
                "w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=after),
                "keys": jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=per_key),
            }
            back, _ = checkpoints.restore(abstract)
            assert back["w"].sharding == after and back["keys"].sharding == per_key
            assert_same(back, values | {"keys": keys})


def test_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    metric = [0.1, 0.9, 0.2, 0.9, float("nan"), None, 0.3, 0.3]
    left, best = [], []
    for half in (range(4), range(4, 8)):
        with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:  # reopened half way
            for step in half:
                metrics = {} if metric[step] is None else {"eval/accuracy": metric[step], "loss": -1.0}
                checkpoints.save(step, {"step": step}, {}, metrics)
                left.append(checkpoints.steps())
                best.append(checkpoints.best())
    assert left == [[0], [0, 1], [1, 2], [2, 3], [3, 4], [3, 4, 5], [3, 5, 6], [3, 6, 7]]
    assert best == [0, 1, 1, 3, 3, 3, 3, 3]
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.best() == 3
        assert checkpoints.restore({"step": 0}, 3)[0] == {"step": 3}


def test_no_metric_no_best(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep_last=2, keep_best=0) as checkpoints:
        for step in range(4):
            checkpoints.save(step, {"x": step}, {}, {"eval/accuracy": 1.0 - step} if step > 9 else None)
        assert checkpoints.steps() == [2, 3] and checkpoints.best() is None
    with pytest.raises(ValueError, match="keep_last=0"):
        Checkpoints(tmp_path, keep_last=0)


def test_going_on_from_an_earlier_step(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep_last=5) as checkpoints:
        for step in (10, 20, 30):
            assert checkpoints.save(step, {"x": step}, {})
        assert not checkpoints.save(30, {"x": -1}, {})  # there already: SIGTERM just after a save
        assert checkpoints.restore({"x": 0})[0] == {"x": 30}
        with pytest.raises(CheckpointError, match=r"cannot save step 15.*later step 30.*discard_after"):
            checkpoints.save(15, {"x": 15}, {})
        assert checkpoints.discard_after(10) == [20, 30]
        assert checkpoints.save(15, {"x": 15}, {})
        assert checkpoints.steps() == [10, 15]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "15"]


def test_a_reader_beside_the_writer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no checkpoint folder {tmp_path / 'absent'}"):
        Checkpoints(tmp_path / "absent", read_only=True)
    with Checkpoints(tmp_path) as writer, Checkpoints(tmp_path, read_only=True) as reader:
        with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}"):
            reader.restore({"x": 0})
        unfinished = tmp_path / "7.orbax-checkpoint-tmp"
        unfinished.mkdir()
        assert reader.latest() is None
        writer.save(8, {"x": 8}, {}, wait=True)
        assert reader.latest() == 8 and unfinished.exists()
        for change in (lambda: reader.save(9, {"x": 9}, {}), lambda: reader.discard_after(0)):
            with pytest.raises(CheckpointError, match="read_only=True"):
                change()
    with Checkpoints(tmp_path) as writer:
        assert not unfinished.exists()
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 3 .* there are \[8\]"):
            writer.restore({"x": 0}, 3)


def test_another_state_is_refused_leaf_by_leaf(tmp_path: Path) -> None:
    state = {"a": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "key": jax.random.key(0), "n": 3}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"x": 1})

        def refused(abstract: Any, *lines: str) -> None:
            with pytest.raises(CheckpointError) as caught:
                checkpoints.restore(abstract)
            assert str(caught.value).splitlines() == [
                f"checkpoint {tmp_path / '1'} holds another state:",
                *(f"  {line}" for line in lines),
                "Give the config that it was saved with, or another folder.",
            ]

        a, w = state["a"], state["a"]["w"]
        refused(state | {"a": a | {"w": w.T}}, "a/w: saved float32[2,3], expected float32[3,2]")
        refused(
            state | {"a": a | {"b": jnp.ones(3, jnp.bfloat16)}}, "a/b: saved float32[3], expected bfloat16[3]"
        )
        refused(state | {"key": jax.random.key(0, impl="rbg")}, "key: saved key<fry>[], expected key<rbg>[]")
        refused(state | {"n": 3.0}, "n: saved int64[], expected float64[]")
        refused(state | {"new": w}, "new: expected float32[2,3], not in the checkpoint")
        refused(
            {"a": {"w": w}, "key": state["key"], "n": 0},
            "a/b: saved float32[3], not expected",
        )
        part, host = checkpoints.restore({"a": {"b": state["a"]["b"]}}, partial=True)
        assert_same(part, {"a": {"b": np.ones(3)}})
        assert host == {"x": 1}
        with pytest.raises(TypeError, match="name in the state is a str"):
            checkpoints.save(2, {"name": "x"}, {})
        with pytest.raises(TypeError, match=r"cannot be saved as JSON.*float32"):
            checkpoints.save(2, state, {"mean": np.float32(1)})
        assert checkpoints.steps() == [1]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    """Every file, truncated, flipped in one bit, emptied or gone; the step before is offered and works."""
    state = {"w": jax.random.normal(jax.random.key(0), (300, 300)), "n": 1}
    with Checkpoints(tmp_path, keep_last=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state | {"n": step}, {}, {"eval/accuracy": 0.5})
        checkpoints.wait()
        shutil.rmtree(tmp_path / "2" / "host")  # not good either, so 1 is the one to offer
        folder = tmp_path / "3"
        files = [path for path in folder.glob("*/**/*") if path.is_file()] + [folder / CHECKSUMS]
        assert sum(path.stat().st_size for path in files) > 300 * 300 * 3
        for path in files:
            content = path.read_bytes()
            flipped = bytearray(content)
            flipped[len(content) // 2] ^= 4
            for damage in (content[:-1], bytes(flipped), b"", None):
                path.unlink()
                if damage is not None:
                    path.write_bytes(damage)
                if path.name == CHECKSUMS and damage == bytes(flipped):
                    assert damaged(folder)  # names another file, or itself
                    continue
                with pytest.raises(CheckpointError) as caught:
                    checkpoints.restore(state)
                message = str(caught.value)
                assert f"checkpoint {folder} is damaged: {path.relative_to(folder)} " in message, message
                assert f"step 1 is good: ask for it, or remove {folder}" in message, message
            path.write_bytes(content)
        assert checkpoints.restore(state)[0]["n"] == 3
        assert checkpoints.restore(state, 1)[0]["n"] == 1

    data = max(files, key=lambda path: path.stat().st_size)
    data.write_bytes(content := data.read_bytes()[:1000])
    with (
        Checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match="state/: "),
    ):
        checkpoints.restore(state, verify=False)  # not even then in silence
    assert len(content) == 1000
    (folder / "metrics" / "metrics").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*3/metrics/metrics has 1 bytes"):
        Checkpoints(tmp_path)


def test_ctrl_c_while_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax forgets the step it was waiting for; the folder is asked again."""
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(1, {"x": 1}, {})
        finalizing = checkpoints._manager._finalize_thread.get_not_none()
        join = finalizing.join

        def interrupted() -> None:
            monkeypatch.setattr(finalizing, "join", join)
            raise KeyboardInterrupt

        monkeypatch.setattr(finalizing, "join", interrupted)
        monkeypatch.setattr(finalizing, "is_alive", lambda: True)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.wait()
        assert checkpoints.steps() == [1]
        checkpoints.save(2, {"x": 2}, {})
        assert checkpoints.steps() == [2]


def can_mount() -> bool:
    command = ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "none", "/tmp"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.parametrize("limit", ["file size", *(["disk"] if can_mount() else [])])
def test_full_disk(tmp_path: Path, limit: str) -> None:
    """A limit on the size of a file everywhere, and a real full disk where one may be mounted."""
    if limit == "file size":
        process = child("fill", tmp_path / "c", 5_000_000, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    else:
        shell = f'mount -t tmpfs -o size=16m none {tmp_path} && exec "$@"'
        prefix = ("unshare", "--mount", "--map-root-user", "sh", "-c", shell, "sh")
        process = child(
            "fill", tmp_path / "c", 0, prefix=prefix, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and output == "ALL GOOD\n", output  # orbax's tracebacks are not on show


def test_killed_while_saving(tmp_path: Path) -> None:
    """kill -9 at several moments of a save; each new process checks what it finds and goes on from there."""
    latest, interrupted = -1, 0
    for delay in (0.0, 0.01, 0.03, 0.1):
        process = child("run", tmp_path)
        deadline = time.monotonic() + 60
        while not any(
            int(p.name.split(".")[0]) > latest + 1 for p in tmp_path.glob("*.orbax-checkpoint-tmp")
        ):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(delay)
        process.kill()
        process.wait()
        interrupted += any(tmp_path.glob("*.orbax-checkpoint-tmp"))
        with Checkpoints(tmp_path, read_only=True) as checkpoints:
            found = checkpoints.latest()
            assert found is not None and found > latest
            assert len(checkpoints.steps()) >= 2 or found < 1
            for step in checkpoints.steps()[-2:]:
                state, host = checkpoints.restore(state_at(0), step)
                assert_same(state, state_at(step))
                assert host == {"step": step}
        latest = found
    assert interrupted >= 2  # the kills did hit saves


def test_config_differences_are_shown() -> None:
    saved = {"num_steps": 10, "optimizer": {"learning_rate": 1e-6, "b1": 0.9}, "reward": [1.0], "old": 1}
    current = {"num_steps": 20, "optimizer": {"learning_rate": 1e-5, "b1": 0.9}, "reward": (1.0,), "new": {}}
    with pytest.raises(ConfigMismatch) as caught:
        check_config(saved, current, ignore=("num_steps",))
    lines = str(caught.value).splitlines()
    assert lines[1:-1] == [
        "  new: (absent) -> {}",
        "  old: 1 -> (absent)",
        "  optimizer.learning_rate: 1e-06 -> 1e-05",
    ]
    check_config(saved, current, ignore=("num_steps", "new", "old", "optimizer"))
    with pytest.raises(ConfigMismatch, match="num_steps: 10 -> 20"):
        check_config(saved, current, ignore=("num", "new", "old", "optimizer"))  # no part of a word
    check_config(saved, saved)
