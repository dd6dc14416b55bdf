"""Pictures that show what was logged, and nothing else."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from jaxrl_llm.training.plots import COLOURS, PICTURES, draw, plot, smoothed

TOOL = Path(__file__).parents[2] / "tools" / "plot_run.py"
BY_NAME = {picture.name: picture for picture in PICTURES}


def write_run(folder: Path, steps: int = 40, **extra: Any) -> Path:
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {
            "step": s,
            "time": 0.0,
            "reward": s / 40,
            "entropy": 1 - s / 50,
            "completions/mean_length": 9.0,
            **extra,
        }
        for s in range(steps)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_smoothing_closed_forms() -> None:
    assert smoothed(np.ones(19)) is None
    line = np.linspace(0, 1, 200)
    smooth = smoothed(line)
    assert smooth is not None
    np.testing.assert_allclose(smooth[12:-12], line[12:-12], atol=1e-12)  # a symmetric kernel keeps a line
    constant = np.full(100, 0.3)
    constant[[0, 17, 50, 51, 99]] = np.nan
    np.testing.assert_allclose(smoothed(constant), 0.3, rtol=1e-12)
    noise = np.random.default_rng(0).normal(size=5000)
    smooth = smoothed(noise)
    assert (
        smooth is not None
    )  # variance of a Gaussian mean of white noise: 1 / (2 sqrt(pi) sigma), sigma = 100
    assert np.var(smooth) == pytest.approx(1 / (2 * np.sqrt(np.pi) * 100), rel=0.4)
    hole = np.ones(1000)
    hole[300:700] = np.nan
    smooth = smoothed(hole)
    assert smooth is not None and np.isnan(smooth[500]) and smooth[310] == pytest.approx(1)


def test_lines_are_the_data() -> None:
    rng = np.random.default_rng(0)
    steps, raw = np.arange(1, 51), rng.normal(size=50)
    evals, accuracy = np.array([0, 25, 50]), np.array([0.2, 0.5, 0.9])
    runs = {
        "a": {"eval/accuracy": (evals, accuracy)},
        "b": {
            "reward": (steps, raw),
            "eval/accuracy": (evals, accuracy / 2),
            "eval/accuracy_low": (evals, accuracy / 2 - 0.1),
            "eval/accuracy_high": (evals, accuracy / 2 + 0.1),
        },
    }
    ax = Figure().add_subplot()
    draw(ax, BY_NAME["reward"], runs)
    faint, trend = ax.lines
    for line in (faint, trend):
        np.testing.assert_array_equal(line.get_xdata(), steps)
        assert line.get_color() == COLOURS[1]  # run b's colour, though a has no reward
    np.testing.assert_array_equal(faint.get_ydata(), raw)
    np.testing.assert_array_equal(trend.get_ydata(), smoothed(raw))
    assert faint.get_alpha() is not None and trend.get_alpha() is None
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["b"]

    ax = Figure().add_subplot()
    draw(ax, BY_NAME["accuracy"], runs)
    assert [line.get_color() for line in ax.lines] == list(COLOURS[:2])
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), accuracy)
    (band,) = ax.collections  # only b has an interval
    corners = {tuple(np.round(corner, 9)) for corner in band.get_paths()[0].vertices}
    assert {(50, 0.35), (50, 0.55), (0, 0.0), (0, 0.2)} <= corners
    assert "tokens" in BY_NAME["length"].unit and "nats" in BY_NAME["entropy"].unit
    assert ax.get_ylabel() == "problems solved" and ax.yaxis.get_major_formatter()(0.5, 0) == "50%"


def test_pictures_of_what_there_is(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    a = write_run(tmp_path / "x" / "run")
    b = write_run(tmp_path / "y" / "run", steps=5, kl=0.1, loss=None)
    one = plot([a], tmp_path / "one")
    assert [path.name for path in one] == ["reward.png", "length.png", "entropy.png", "overview.png"]
    two = plot([a, b], tmp_path / "two")
    assert [path.name for path in two] == [
        *("reward.png", "length.png", "entropy.png", "kl.png", "loss.png", "overview.png")
    ]
    for path, colours in [(one[0], 1), (two[0], 2), (two[-1], 2)]:
        pixels = imread(path)[..., :3]
        assert np.mean(np.all(pixels == 1, axis=-1)) > 0.8  # light
        for i, colour in enumerate(COLOURS[:3]):
            near = np.all(np.abs(pixels - to_rgb(colour)) < 0.02, axis=-1)
            assert (near.sum() > 50) == (i < colours)
    assert dict(mpl.rcParams) == before


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good")
    (tmp_path / "absent").mkdir()
    with pytest.raises(FileNotFoundError, match=r"absent/metrics.jsonl: not the folder of a run"):
        plot([good, tmp_path / "absent"], tmp_path / "out")
    (tmp_path / "absent" / "metrics.jsonl").write_text('{"step": 1, "time": 0.0, "other": 1}\n')
    with pytest.raises(ValueError, match=r"nothing to draw in .*absent: .* none of reward, eval/accuracy"):
        plot([tmp_path / "absent"], tmp_path / "out")
    with pytest.raises(ValueError, match="the same run twice"):
        plot([good, good], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*args: object) -> None:
        monkeypatch.setattr(sys, "argv", ["plot_run.py", *map(str, args)])
        runpy.run_path(str(TOOL), run_name="__main__")

    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{"step": 1, "time": 0.0, "reward": 1}\n')
    run(a)
    assert (a / "plots" / "reward.png").exists()
    assert str(a / "plots" / "overview.png") in capsys.readouterr().out
    run(a, b, f"--out={tmp_path / 'both'}")
    assert (tmp_path / "both" / "reward.png").exists()
    with pytest.raises(SystemExit, match=r"plot_run.py: no .*metrics.jsonl: not the folder of a run"):
        run(tmp_path)
    with pytest.raises(SystemExit):
        run(a, b)
    assert "--out=FOLDER" in capsys.readouterr().err
    code = "import sys, jaxrl_llm.training.plots; assert not {'matplotlib.pyplot', 'jax'} & set(sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
    )
