"""Whole runs of the training binary: exact resume after SIGTERM and kill -9, metrics, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from test_user_case import Reply, Scripts

from jaxrl_llm.training.checkpoints import Checkpoints

ROOT = Path(__file__).parents[2]
LAST = 6  # two supervised and four RL steps
TIMED = ("time", "step_time")


def arguments(workdir: Path, *overrides: str, arg: str = "") -> list[str]:
    return [f"--config=tests/training/tiny_config.py:{arg}", f"--workdir={workdir}", *overrides]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One device, and one compilation cache for all runs."""
    cache = tmp_path_factory.mktemp("compiled")
    return os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1",  # the last counts
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }


@pytest.fixture(scope="module")
def ask(environment) -> Iterator[Scripts]:
    """ask(script, *arguments) -> its `Reply`."""
    scripts = Scripts(ROOT, environment)
    with scripts.process:
        yield scripts
    assert scripts.process.returncode == 0


def train(ask: Scripts, workdir: Path, *overrides: str, arg: str = "") -> Reply:
    return ask("train", *arguments(workdir, *overrides, arg=arg))


def rows(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def interrupt(environment, workdir: Path, number: int, at_step: int) -> tuple[int, str]:
    """Starts the run and sends a signal as soon as metrics.jsonl has the row of `at_step`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxrl_llm.train", *arguments(workdir)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if any(row["step"] >= at_step for row in rows(workdir)):
                break
        except ValueError:  # a line being written
            pass
        time.sleep(0.01)
    process.send_signal(number)
    out, _ = process.communicate(timeout=100)
    return process.returncode, out


def arrays(workdir: Path, last: int = LAST) -> dict[str, np.ndarray]:
    """Every array and number of the last checkpoint."""
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        step = checkpoints.latest()
    assert step == last
    record = json.loads((workdir / "checkpoints" / str(step) / "host" / "metadata").read_text())
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.restore(workdir / "checkpoints" / str(step) / "state")
    flat = {
        jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    return flat | {"host": json.dumps(record["host"], sort_keys=True)}


def comparable(workdir: Path) -> list[dict]:
    return [
        {k: v for k, v in row.items() if k not in TIMED and "timing/" not in k and "_per_second" not in k}
        for row in rows(workdir)
    ]


@pytest.fixture(scope="module")
def whole(ask, tmp_path_factory) -> Path:
    """A run from start to end."""
    workdir = tmp_path_factory.mktemp("whole")
    code, out, err = train(ask, workdir)
    assert code == 0, out + err
    assert f"accuracy at step {LAST}" in out and "gain" in out
    return workdir


def test_interrupted_run_equals_the_whole_one(environment, ask, whole, tmp_path):
    """SIGTERM, then kill -9, then to the end: params, optimizer, cursors, keys and metrics, exactly."""
    code, out = interrupt(environment, tmp_path, signal.SIGTERM, at_step=2)
    assert code == 0 and "the same command goes on from there" in out
    saved = rows(tmp_path)[-1]["step"]
    code, _ = interrupt(environment, tmp_path, signal.SIGKILL, at_step=saved + 2)
    assert code == -signal.SIGKILL
    code, out, err = train(ask, tmp_path)
    assert code == 0, out + err
    one, other = arrays(whole), arrays(tmp_path)
    assert one.keys() == other.keys()
    for name in one:
        assert np.array_equal(one[name], other[name]), name
    assert comparable(whole) == comparable(tmp_path)


def test_metrics_equal_what_the_dumped_completions_say(whole):
    by_step = {row["step"]: row for row in rows(whole)}
    assert sorted(by_step) == list(range(1, LAST + 1))
    for step in range(3, LAST + 1):
        table = pq.read_table(whole / f"completions_{step}.parquet").to_pydict()
        row = by_step[step]
        reward = np.array(table["reward"], np.float64)
        groups = reward.reshape(4, 4)
        assert row["reward"] == pytest.approx(reward.mean(), rel=1e-6)
        assert row["reward_std"] == pytest.approx(groups.std(axis=1, ddof=1).mean(), rel=1e-5)
        assert row["frac_reward_zero_std"] == pytest.approx(np.mean(np.ptp(groups, axis=1) == 0))
        assert row["rewards/score/mean"] == pytest.approx(reward.mean(), rel=1e-6)
        assert row["rewards/score/std"] == pytest.approx(reward.std(), rel=1e-5)
        assert row["completions/mean_length"] == pytest.approx(np.mean(table["length"]))
        assert row["completions/max_length"] == max(table["length"])
        deviation = groups - groups.mean(axis=1, keepdims=True)
        std = groups.std(axis=1, ddof=1, keepdims=True) + 1e-6
        np.testing.assert_allclose(np.array(table["advantage"]).reshape(4, 4), deviation / std, atol=1e-4)
        # on-policy identity, in the run itself
        assert row["clip_ratio/region_mean"] == 0 and row["mismatch_kl"] < 1e-9
        assert abs(row["ratio/max"] - 1) < 1e-5 and abs(row["ratio/min"] - 1) < 1e-5
        assert row["sampling/sampling_logp_difference/max"] < 1e-5
    accuracies = [row["step"] for row in rows(whole) if "eval/accuracy" in row]
    assert accuracies == [2, 4, 6]
    assert [p.name for p in whole.glob("events.out.tfevents.*")]


def test_export_and_the_other_binaries(ask, whole):
    """The exported folder is the trained policy: both give the same evaluation."""
    code, _, err = ask("evaluate", *arguments(whole, f"--out={whole}/a.json"))
    assert code == 0, err
    config, _ = arguments(whole)
    exported = f"--config.model.path={whole}/export", "--config.tokenizer.kind=folder"
    code, _, err = ask("evaluate", config, *exported, "--config.tokenizer.alphabet=", f"--out={whole}/b.json")
    assert code == 0, err
    a, b = (json.loads((whole / f"{name}.json").read_text()) for name in "ab")
    assert a.pop("step") == LAST and b.pop("step") is None
    assert a == b and a["eval/accuracy"] == rows(whole)[-1]["eval/accuracy"]
    code, out, err = ask("sample", *arguments(whole, "--prompt=Calculate 1 + 2.", "--count=3"))
    assert code == 0 and len(out.splitlines()) >= 3, err


def test_another_config_is_refused_with_the_difference(ask, whole):
    code, _, err = train(ask, whole, "--config.loss.epsilon=0.3", "--config.num_steps=5")
    assert code != 0
    assert "loss.epsilon: null -> 0.3" in err and "num_steps" not in err
    assert "Traceback" not in err


def test_nonfinite_updates_stop_the_run_with_the_last_good_state(ask, tmp_path):
    code, _, err = train(
        ask,
        tmp_path,
        "--config.optimizer.learning_rate=1e38",
        "--config.train.max_nonfinite_steps=2",
        "--config.eval.every=0",
        "--config.num_steps=8",
    )
    assert code != 0 and "2 updates in a row were not finite" in err, err
    last = rows(tmp_path)[-1]
    assert last["skipped_updates"] == 1  # the row of the step before the one that stopped the run
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest() == last["step"] + 1


def test_methods_combined_by_config_alone_resume_too(ask, tmp_path):
    """HA-DW (whose belief is in the checkpoint), DynaMO and DGPO: three steps are two and one."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for workdir, steps in ((whole, 3), (parts, 2), (parts, 3)):
        code, out, err = train(ask, workdir, f"--config.num_steps={steps}", arg="composed")
        assert code == 0, out + err
    expected, got = arrays(whole, 5), arrays(parts, 5)
    assert expected.keys() == got.keys() and "['tracker/belief']" in expected
    for name, x in expected.items():
        np.testing.assert_array_equal(x, got[name], err_msg=name)
    learned = [row for row in rows(whole) if "ha_dw/anchor" in row]
    assert len(learned) == 3
    assert all({"modulation/stability", "clip_ratio/low_mean"} <= row.keys() for row in learned)
    # the first batch is its own anchor, and from it the belief moves a hundredth towards the second
    anchors, means = ([row[name] for row in learned] for name in ("ha_dw/anchor", "reward"))
    second = means[0] + 0.01 * (means[1] - means[0])
    np.testing.assert_allclose(anchors, [means[0], means[0], second], rtol=1e-6)
