"""Files that say what was logged: after kills, after resumes, read back by someone else's reader."""

import json
import math
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxrl_llm.training import writers
from jaxrl_llm.training.writers import JsonlWriter, cut, open_writer, read_metrics, write_completions


def strict_rows(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


def events(folder: Path) -> list[Event]:
    """TensorFlow's record format, read from its description: length, crc, bytes, crc."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, offset = path.read_bytes(), 0
        while offset < len(data):
            (length,) = struct.unpack_from("<Q", data, offset)
            found.append(Event.FromString(data[offset + 12 : offset + 12 + length]))
            offset += 12 + length + 4
    return found


def visible_scalars(folder: Path) -> dict[tuple[str, int], float]:
    """As TensorBoard shows them: a session's start purges what is older from its step on."""
    seen: dict[tuple[str, int], float] = {}
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            seen = {key: value for key, value in seen.items() if key[1] < event.step}
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name in ("", "scalars"):
                seen[value.tag, event.step] = value.simple_value
    return seen


def test_one_strict_row_per_step(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    writer.write_scalars(1, {"loss": jnp.float32(0.5), "num_tokens": np.int64(2**40), "kl": float("nan")})
    rows = strict_rows(tmp_path / "metrics.jsonl")  # it is there before the writer is flushed or closed
    assert without_time(rows) == [{"step": 1, "loss": 0.5, "num_tokens": 2**40, "kl": None}]
    writer.write_scalars(1, {"eval/accuracy": 0.25, "loss": 7})
    writer.write_texts(1, {"sample": "two\nlines – é"})
    writer.write_scalars(3, {"loss": -np.inf, "solved": np.True_})
    writer.close()
    rows = strict_rows(tmp_path / "metrics.jsonl")
    assert without_time(rows) == [
        {
            "step": 1,
            "loss": 7,
            "num_tokens": 2**40,
            "kl": None,
            "eval/accuracy": 0.25,
            "sample": "two\nlines – é",
        },
        {"step": 3, "loss": None, "solved": 1},
    ]
    assert abs(rows[0]["time"] - time.time()) < 60
    metrics = read_metrics(tmp_path)
    assert sorted(metrics) == ["eval/accuracy", "kl", "loss", "num_tokens", "solved"]
    np.testing.assert_array_equal(metrics["loss"][0], [1, 3])
    np.testing.assert_array_equal(metrics["loss"][1], [7, math.nan])
    np.testing.assert_array_equal(metrics["eval/accuracy"][1], [0.25])
    seen = visible_scalars(tmp_path)
    assert seen["loss", 1] == 7 and seen["eval/accuracy", 1] == 0.25 and seen["loss", 3] == -math.inf


@given(st.lists(st.tuples(st.integers(0, 3), st.dictionaries(st.sampled_from("abcdef"), st.integers()))))
@settings(max_examples=50, deadline=None)
def test_rows_are_the_merged_calls(tmp_path_factory: pytest.TempPathFactory, calls: list[Any]) -> None:
    """Whatever grows or shrinks, and wherever the writer is reopened."""
    path = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    expected: list[dict[str, Any]] = []
    writer = JsonlWriter(path)
    for i, (step, values) in enumerate(calls):
        values = {name: value * 10**i for name, value in values.items()}
        if not expected or expected[-1]["step"] != step:
            expected.append({"step": step})
        expected[-1] |= values
        writer.write_scalars(step, values)
        if i % 3 == 2:
            writer.close()
            writer = JsonlWriter(path)
        assert without_time(strict_rows(path)) == expected
    writer.close()


def test_cut_takes_back_the_future(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    cut(path, 3)
    assert not path.exists()
    writer = JsonlWriter(path)
    for step in range(5):
        writer.write_scalars(step, {"x": step / 3})
    writer.close()
    whole = path.read_bytes()
    kept = b"".join(whole.splitlines(keepends=True)[:3])
    last = whole.splitlines()[-1]
    for torn in range(len(last) + 1):  # a kill in the middle of the last row, anywhere
        path.write_bytes(whole[: len(whole) - 1 - len(last) + torn])
        assert [row["step"] for row in writers._rows(path)] == list(range(4 + (torn == len(last))))
        cut(path, 2)
        assert path.read_bytes() == kept
    path.write_bytes(whole)
    cut(path, 4)
    assert path.read_bytes() == whole
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    path.write_bytes(kept.replace(b'{"step": 1', b'{"step" 1'))
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not a row of metrics"):
        cut(path, 2)
    with pytest.raises(FileNotFoundError, match="not the folder of a run"):
        read_metrics(tmp_path / "absent")


def test_resume_leaves_one_history(tmp_path: Path) -> None:
    def log(writer: writers.Writer, steps: range, sign: int) -> None:
        for step in steps:
            writer.write_scalars(step, {"x": sign * step})
            write_completions(
                tmp_path,
                step,
                prompts=["p"],
                completions=["c"],
                rewards={},
                reward=[sign * step],
                advantages=[0.0],
                lengths=[1],
            )

    log(open_writer(tmp_path), range(6), 1)  # not closed: killed
    writer = open_writer(tmp_path, restored_step=3)
    writer.write_scalars(3, {"eval/accuracy": 0.5})  # joins the row that is there
    log(writer, range(4, 8), -1)
    writer.close()
    steps, values = read_metrics(tmp_path)["x"]
    np.testing.assert_array_equal(steps, range(8))
    np.testing.assert_array_equal(values, [0, 1, 2, 3, -4, -5, -6, -7])
    assert len(strict_rows(tmp_path / "metrics.jsonl")) == 8
    assert {step: x for (name, step), x in visible_scalars(tmp_path).items() if name == "x"} == dict(
        enumerate(values)
    )
    open_writer(tmp_path, restored_step=4).close()
    assert sorted(p.name for p in tmp_path.glob("*.parquet")) == [
        f"completions_{s}.parquet" for s in range(5)
    ]
    open_writer(tmp_path).close()  # anew: nothing of the old run is left to be mixed up with it
    assert read_metrics(tmp_path) == {} and visible_scalars(tmp_path) == {}
    assert not list(tmp_path.glob("*.parquet"))


LOG_FOREVER = """
import sys
from pathlib import Path
from jaxrl_llm.training.writers import JsonlWriter
writer = JsonlWriter(Path(sys.argv[1]) / "metrics.jsonl")
for step in range(10**9):
    writer.write_scalars(step, {f"metric_{i}": step + i for i in range(100)})
    writer.write_scalars(step, {"last": step})
    print(step, flush=True)
"""


def test_killed_while_logging(tmp_path: Path) -> None:
    """Every row whose call had returned is there, whole, and what a kill tore is not read."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for delay in (0.0, 0.01, 0.03):
        command = [sys.executable, "-c", LOG_FOREVER, str(tmp_path)]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "0\n"
        time.sleep(delay)
        process.kill()
        logged = [line for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        process.wait()
        steps, values = read_metrics(tmp_path)["last"]
        np.testing.assert_array_equal(steps, values)
        np.testing.assert_array_equal(steps, range(len(steps)))
        assert steps[-1] >= len(logged)
        cut(tmp_path / "metrics.jsonl", 0)
        assert [row["step"] for row in strict_rows(tmp_path / "metrics.jsonl")] == [0]
        (tmp_path / "metrics.jsonl").unlink()


def test_completions_table(tmp_path: Path) -> None:
    path = write_completions(
        tmp_path,
        12,
        prompts=["1+1=", "2+2="],
        completions=["2", "half a character: \udce2"],
        rewards={"exact": np.array([1.0, 0.0], np.float32), "judge": jnp.array([jnp.nan, 0.5])},
        reward=jnp.array([1.0, 0.5]),
        advantages=np.array([0.5, -0.5]),
        lengths=np.array([1, 20], np.int32),
    )
    assert path == tmp_path / "completions_12.parquet" and os.listdir(tmp_path) == [path.name]
    assert pq.read_table(path).to_pydict() == {
        "step": [12, 12],
        "prompt": ["1+1=", "2+2="],
        "completion": ["2", "half a character: ?"],
        "rewards/exact": [1.0, 0.0],
        "rewards/judge": [None, 0.5],
        "reward": [1.0, 0.5],
        "advantage": [0.5, -0.5],
        "length": [1, 20],
    }
    with pytest.raises(ValueError, match=r"columns differ in length.*'reward': 1"):
        write_completions(
            tmp_path,
            12,
            prompts=["a", "b"],
            completions=["a", "b"],
            rewards={},
            reward=[1.0],
            advantages=[0, 0],
            lengths=[1, 1],
        )


def test_config_and_texts_reach_the_files(tmp_path: Path) -> None:
    config = {
        "seed": 1,
        "optimizer": {"learning_rate": 1e-6, "name": "adamw"},
        "stop": ("a", "b"),
        "beta": None,
    }
    writer = open_writer(tmp_path)
    writer.write_hparams(config)
    writer.write_texts(2, {"sample": "hello"})
    assert json.loads((tmp_path / "hparams.json").read_text()) == config | {"stop": ["a", "b"]}
    values = [value for event in events(tmp_path) for value in event.summary.value]
    assert [v.tensor.string_val for v in values if v.tag.startswith("sample")] == [[b"hello"]]
    content = b"".join(v.metadata.plugin_data.content for v in values)
    assert b"optimizer.learning_rate" in content and b"adamw" in content
    writer.close()
