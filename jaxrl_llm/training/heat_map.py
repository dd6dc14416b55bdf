"""A picture of how responses of a masked diffusion model came to be: which round committed which token."""

import functools
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.cells import cell_len

if TYPE_CHECKING:  # slow, and most who sample want no picture
    from matplotlib.figure import Figure

MOST = 8
"""Responses in one picture; the first ones are drawn."""

ACROSS = 16
"""Positions in a line; a longer response is folded, and read like text."""

CELL, LINE = 0.62, 0.34
"""Inches of a position, across and down."""

LONGEST = 9
"""Characters of the label that fits."""

FONT, INK, GRID = "DejaVu Sans Mono", "#333333", "#E4E4E4"


class Trace(NamedTuple):
    """A response.

    Attributes:
      labels: text of each of G tokens.
      commit_step: i[G] the round that committed it, from 0; -1 = none did.
      nfe: forward passes that it took.
      name: above it; empty = its number, where there are several.
    """

    labels: Sequence[str]
    commit_step: np.ndarray
    nfe: int
    name: str = ""


def save(traces: Sequence[Trace], path: str | os.PathLike[str]) -> None:
    """Writes the picture of `draw` as a PNG."""
    draw(traces).savefig(path, format="png")


def draw(traces: Sequence[Trace]) -> "Figure":
    """A panel for each of the first `MOST` responses, in the same colours.

    A label is written where it fits into its cell. What was never committed is grey.

    Raises:
      ValueError: no response.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    traces = traces[:MOST]
    if not traces:
        raise ValueError("a heat map needs a response to draw")
    across = min(ACROSS, max(len(trace.commit_step) for trace in traces))
    lines = [math.ceil(len(trace.commit_step) / across) for trace in traces]
    left, right, above, below = 0.5, 0.9, 0.36, 0.5  # inches
    width, height = left + across * CELL + right, below + sum(above + LINE * n for n in lines)
    figure = Figure(figsize=(width, height), dpi=140, facecolor="white")
    latest = max(1, *(int(trace.commit_step.max()) for trace in traces))
    colours = colormaps["viridis"].with_extremes(under=GRID)
    bottom = height
    for number, (trace, n) in enumerate(zip(traces, lines), 1):
        bottom -= above + LINE * n
        ax = figure.add_axes((left / width, bottom / height, across * CELL / width, LINE * n / height))
        steps = np.full(n * across, np.nan)
        steps[: len(trace.commit_step)] = trace.commit_step
        image = ax.imshow(steps.reshape(n, across), cmap=colours, vmin=0, vmax=latest, aspect="auto")
        committed = trace.commit_step[trace.commit_step >= 0]
        name = trace.name or (f"response {number}" if len(traces) > 1 else "")
        heading = f"{name}: " if name else ""
        heading += f"{len(committed)} tokens in {len(set(committed))} rounds, {trace.nfe} forward passes"
        ax.set_title(heading, loc="left", fontsize=9, color=INK)
        ax.set_xticks([])
        ax.set_yticks(range(n), [str(i * across) for i in range(n)])
        ax.tick_params(labelsize=7, color=GRID, labelcolor=INK)
        ax.spines[:].set_visible(False)
        for i, (label, step) in enumerate(zip(trace.labels, trace.commit_step)):
            if step >= 0 and (text := _fitting(label)):
                ax.text(
                    i % across,
                    i // across,
                    text,
                    color=INK if step > 0.6 * latest else "white",
                    family=FONT,
                    fontsize=7,
                    ha="center",
                    va="center_baseline",
                    parse_math=False,
                )
    ax.set_xticks(range(0, across, 2))
    ax.set_xlabel("position, counted from the first of its line", fontsize=8, color=INK)
    scale = figure.add_axes((1 - 0.7 / width, below / height, 0.15 / width, 1 - (above + below) / height))
    figure.colorbar(image, cax=scale, ticks=MaxNLocator(integer=True))
    scale.set_title("round", fontsize=8, color=INK)
    scale.tick_params(labelsize=7, labelcolor=INK)
    return figure


def _fitting(label: str) -> str:
    """What to write for a token: its text without the space in front; nothing if it is too long or has
    characters that the font lacks.
    """
    text = label.replace("\n", "⏎")
    text = text.strip() or "␣" * bool(text)
    return text if cell_len(text) <= LONGEST and all(ord(c) in _glyphs() for c in text) else ""


@functools.cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties(family=FONT))).get_charmap())
