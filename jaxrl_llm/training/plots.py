"""Pictures of a run: one PNG per figure, several runs in each, and an overview of them all."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from jaxrl_llm.training.writers import read_metrics

Metrics: TypeAlias = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Steps i64[n] and values f64[n] by metric, as `read_metrics` returns them."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes:
      name: of the file.
      metric: what is drawn against the step.
      title: above it.
      unit: label of the y axis.
      band: metrics of the lower and upper end of an interval around it; empty = none.
      percent: whether values are fractions to be shown in percent.
    """

    name: str
    metric: str
    title: str
    unit: str
    band: tuple[str, ...] = ()
    percent: bool = False


PICTURES = (
    Picture("reward", "reward", "Reward", "mean reward of a completion"),
    Picture(
        "accuracy",
        "eval/accuracy",
        "Accuracy on held-out problems, 95% interval",
        "problems solved",
        ("eval/accuracy_low", "eval/accuracy_high"),
        percent=True,
    ),
    Picture("length", "completions/mean_length", "Completion length", "mean length (tokens)"),
    Picture("entropy", "entropy", "Entropy of the policy", "entropy (nats per token)"),
    Picture(
        "clip_ratio", "clip_ratio/region_mean", "Clipped tokens", "share of tokens clipped", percent=True
    ),
    Picture("kl", "kl", "KL divergence to the reference model", "KL (nats per token)"),
    Picture("loss", "loss", "Loss", "loss"),
)

# Okabe and Ito's colours, told apart by every kind of colour vision; from the seventh run on, also the style.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", ":", "-.")
INK, GRID = "#333333", "#E4E4E4"


def plot(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> list[Path]:
    """Draws the runs of these workdirs together.

    Args:
      folders: of the runs, each with a metrics.jsonl; the shortest distinct end of its path names each.
      out: folder for the pictures; made if missing.

    Returns:
      The paths of the pictures: one per figure of which a run has anything, and `overview.png`.

    Raises:
      FileNotFoundError: a folder without metrics.jsonl.
      ValueError: a run has nothing to draw.
    """
    runs = dict(zip(_labels(list(map(Path, folders))), map(read_metrics, folders)))
    for folder, metrics in zip(folders, runs.values()):
        if not any(picture.metric in metrics for picture in PICTURES):
            raise ValueError(
                f"nothing to draw in {folder}: its metrics.jsonl has none of "
                f"{', '.join(picture.metric for picture in PICTURES)}"
            )
    return plot_runs(runs, out)


def plot_runs(runs: Mapping[str, Metrics], out: str | os.PathLike[str]) -> list[Path]:
    """The same from metrics already read, by the name of the run."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [p for p in PICTURES if any(p.metric in metrics for metrics in runs.values())]
    paths = [folder / f"{picture.name}.png" for picture in pictures] + [folder / "overview.png"]
    for picture, path in zip(pictures, paths):
        _sheet([picture], runs).savefig(path)
    _sheet(pictures, runs).savefig(paths[-1])
    return paths


def _sheet(pictures: Sequence[Picture], runs: Mapping[str, Metrics]) -> Figure:
    """One or two columns of axes. Fixed margins: a layout by what is drawn takes as long as drawing it."""
    columns = min(2, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    width, height = 6.0 * columns, 3.5 * rows  # inches
    figure = Figure(figsize=(width, height), dpi=140, facecolor="white")
    figure.subplots_adjust(
        left=0.8 / width,
        right=1 - 0.15 / width,
        bottom=0.55 / height,
        top=1 - 0.4 / height,
        wspace=0.95 / 5.05,  # in units of an axes' width
        hspace=0.95 / 2.55,
    )
    for i, picture in enumerate(pictures):
        draw(figure.add_subplot(rows, columns, i + 1), picture, runs)
    return figure


def draw(ax: Axes, picture: Picture, runs: Mapping[str, Metrics]) -> None:
    """Draws one figure. Runs that lack its metric keep their colour for the others and are left out."""
    for i, (name, metrics) in enumerate(runs.items()):
        if picture.metric not in metrics:
            continue
        steps, values = metrics[picture.metric]
        colour, style = COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]
        if all(end in metrics for end in picture.band) and picture.band:
            low, high = (metrics[end] for end in picture.band)
            ax.fill_between(low[0], low[1], high[1], color=colour, alpha=0.15, linewidth=0)
        smooth = smoothed(values)
        if smooth is None:  # few points: show them as they are
            ax.plot(steps, values, style, color=colour, linewidth=1.8, marker="o", markersize=4, label=name)
        else:
            ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            ax.plot(steps, smooth, style, color=colour, linewidth=1.8, label=name)
    ax.set_title(picture.title, loc="left", fontsize=11, fontweight="bold", color=INK)
    ax.set_xlabel("step (updates of the policy)", fontsize=9, color=INK)
    ax.set_ylabel(picture.unit, fontsize=9, color=INK)
    ax.tick_params(labelsize=8, color=GRID, labelcolor=INK)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 2.5, 5, 10], integer=True))
    if picture.percent:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GRID)
    if len(runs) > 1:
        ax.legend(fontsize=8, labelcolor=INK, facecolor="white", edgecolor="none", framealpha=0.8)


def smoothed(values: np.ndarray) -> np.ndarray | None:
    """The trend in a series: at each point the Gaussian mean of what is around it, NaN left out.

    Args:
      values: f[n]. The kernel's standard deviation is n/50 points, so the line does not depend on how often
        a run logged.

    Returns:
      f[n]; NaN where there is nothing around. None for series under 20 points.
    """
    n = len(values)
    if n < 20:
        return None
    sigma = max(1.0, n / 50)
    reach = min(n - 1, math.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    known = np.isfinite(values)

    def spread(x: np.ndarray) -> np.ndarray:
        return np.convolve(x, kernel)[reach : reach + n]

    with np.errstate(invalid="ignore"):
        return spread(np.where(known, values, 0.0)) / spread(known.astype(float))


def _labels(folders: Sequence[Path]) -> list[str]:
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        labels = ["/".join(p[-length:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise ValueError(f"the same run twice in {', '.join(map(str, folders))}")
