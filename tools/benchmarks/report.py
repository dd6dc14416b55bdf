"""Timings, ratios, and how they are written down."""

import dataclasses
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

OURS = "jaxrl_llm"


@dataclasses.dataclass(frozen=True)
class Row:
    """Timings of one contender in one case.

    Attributes:
      case, contender: what was measured.
      seconds: of each timed round.
      tokens: new tokens per round.
      parts: stage -> seconds of each timed round.
    """

    case: str
    contender: str
    seconds: list[float]
    tokens: int
    parts: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


def speedups(rows: Sequence[Row]) -> dict[tuple[str, str], tuple[float, float, float]]:
    """(case, peer) -> how many times faster ours is: ratio of the medians, lowest and highest of a round."""
    ours = {row.case: row for row in rows if row.contender == OURS}
    ratios = {}
    for row in rows:
        if row.contender != OURS and row.case in ours:
            mine = ours[row.case]
            rounds = [theirs / own for theirs, own in zip(row.seconds, mine.seconds)]
            ratios[row.case, row.contender] = (row.median / mine.median, min(rounds), max(rounds))
    return ratios


def table(rows: Sequence[Row], goals: Mapping[tuple[str, str], float]) -> str:
    """An aligned Markdown table: medians, and the range of the rounds in brackets; no empty columns.

    Args:
      rows: what was measured, in the order of the table; without any there is none, ''.
      goals: (case, peer) -> how many times faster ours is meant to be.
    """
    if not rows:
        return ""
    ratios = speedups(rows)
    lines = [("case", "library", "seconds", "tokens/s", "of which", "ours is faster by", "goal")]
    for row in rows:
        key = (row.case, row.contender)
        ratio, goal = ratios.get(key), goals.get(key)
        lines.append(
            (
                row.case,
                row.contender,
                f"{row.median:.3f} ({min(row.seconds):.3f}–{max(row.seconds):.3f})",
                f"{row.tokens / row.median:,.0f}",
                ", ".join(f"{stage} {statistics.median(values):.3f}" for stage, values in row.parts.items()),
                "" if ratio is None else f"{ratio[0]:.2f}× ({ratio[1]:.2f}–{ratio[2]:.2f})",
                "" if ratio is None or goal is None else verdict(ratio[0], goal),
            )
        )
    columns = [column for column in zip(*lines) if any(column[1:])]
    return markdown(list(zip(*columns)))


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table; the first line is its head."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rendered = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines]
    rendered.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(rendered)


def verdict(ratio: float, goal: float) -> str:
    """Whether the goal is reached."""
    return f"{goal:g}×: {'reached' if ratio >= goal else 'missed'}"


def record(
    rows: Sequence[Row], versions: Mapping[str, Mapping[str, str]], task: Mapping[str, Any], load: float
) -> dict[str, Any]:
    """What the JSON holds: the machine, the versions, the task and every timing in seconds."""
    return {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "load_before": load},
        "versions": {name: dict(found) for name, found in versions.items()},
        "task": dict(task),
        "rows": [dataclasses.asdict(row) | {"median": row.median} for row in rows],
        "faster_by": [
            {"case": case, "peer": peer, "ratio": ratio, "lowest": lowest, "highest": highest}
            for (case, peer), (ratio, lowest, highest) in speedups(rows).items()
        ],
    }
