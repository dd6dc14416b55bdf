"""What a run says while it goes: a live bar on a terminal, a plain line now and then in a log."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Tick: TypeAlias = Callable[[int, Mapping[str, float]], None]
"""`tick(step, figures)`: `step` steps are done, and these figures have changed."""


@contextlib.contextmanager
def progress(
    total: int, title: str, *, start: int = 0, every: float = 5.0, console: Console | None = None
) -> Iterator[Tick]:
    """Shows how far a stage is, the time left and its main figures.

    On a terminal a bar is redrawn in place, and what is printed meanwhile appears above it. Elsewhere a line
    is printed at the first and the last step and every few seconds between. Figures stay until they change.

    Args:
      total: number of steps of the stage.
      title: its name.
      start: steps done before, when a run is resumed.
      every: seconds between plain lines.
      console: where to; None = standard output.

    Yields:
      tick: to be called with the number of steps done and a mapping from short names to numbers.
    """
    console = console or Console()
    bar = _Bar(total, title, start)
    if console.is_terminal and not console.is_dumb_terminal:
        with Live(bar, console=console, refresh_per_second=4, vertical_overflow="crop"):
            yield bar.tick
        return
    printed, last = -math.inf, -1

    def tick(step: int, figures: Mapping[str, float]) -> None:
        nonlocal printed, last
        bar.tick(step, figures)
        if time.monotonic() - printed >= every or step == total:
            printed, last = time.monotonic(), step
            print(bar.line(), file=console.file, flush=True)

    try:
        yield tick
    finally:
        if bar.step != last and bar.step > start:  # the line that an interrupted stage would have had next
            print(bar.line(), file=console.file, flush=True)


def summary(
    rows: Sequence[Sequence[object]],
    header: Sequence[str] = (),
    *,
    title: str = "",
    console: Console | None = None,
) -> None:
    """Prints a small table: names in the first column, everything else to the right of it, aligned.

    Args:
      rows: of equal length; floats are shown to 3 significant digits.
      header: name of each column; empty = none.
      title: above the table.
      console: where to; None = standard output.
    """
    cells = [[show(cell).strip() if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [list(header), *cells] if header else cells
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    console = console or Console()
    text = Text("\n")
    if title:
        text.append(f"{title}\n", style="bold")
    for i, line in enumerate(lines):
        style = "dim" if header and i == 0 else ""
        padded = [
            cell.rjust(w) if j and len(line) > 2 else cell.ljust(w)
            for j, (cell, w) in enumerate(zip(line, widths))
        ]
        text.append("  ".join(["", *padded]).rstrip() + "\n", style=style)
    console.print(text, soft_wrap=True, end="")


def show(value: float) -> str:
    """A number to 3 significant digits, in 8 characters as a rule: `0.512`, `-0.0123`, `12.3k`, `1e-6`."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 9.995e11 or 0 < size < 9.995e-5:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= 0.9995 * unit:
            return f"{_three(value / unit)}{name}"
    return _three(value)


def clock(seconds: float) -> str:
    """`0:00:07`; `-:--:--` while nothing is known."""
    if not math.isfinite(seconds):
        return "-:--:--"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class _Bar:
    """Where a stage stands; rendered by rich, or as a plain line."""

    def __init__(self, total: int, title: str, start: int) -> None:
        self._total, self._title = total, title
        self.step = start
        self._figures: dict[str, float] = {}
        self._begin = time.monotonic()
        self._first: tuple[int, float] | None = None  # step and time of the first tick, compilation behind it
        self._last = self._begin

    def tick(self, step: int, figures: Mapping[str, float]) -> None:
        self.step, self._last = step, time.monotonic()
        self._first = self._first or (step, self._last)
        self._figures |= {name: float(value) for name, value in figures.items()}

    def seconds_left(self) -> float:
        """From the pace since the first tick, counted down between ticks; inf before there is a second."""
        if self.step >= self._total:
            return 0.0
        if self._first is None or self.step <= self._first[0]:
            return math.inf
        pace = (self._last - self._first[1]) / (self.step - self._first[0])
        return max(0.0, pace * (self._total - self.step) - (time.monotonic() - self._last))

    def _times(self) -> str:
        return f"{clock(time.monotonic() - self._begin)} gone  {clock(self.seconds_left())} left"

    def _count(self) -> str:
        return f"{self.step:>{len(str(self._total))}}/{self._total}"

    def line(self) -> str:
        share = f"{100 * self.step // max(1, self._total):3d}%"
        figures = "".join(f"  {name} {show(value):>8}" for name, value in self._figures.items())
        return f"{self._title}  {self._count()} {share}  {self._times()} {figures}"

    def __rich__(self) -> RenderableType:
        top = Table.grid(padding=(0, 2))
        bar = ProgressBar(
            total=max(1, self._total),
            completed=self.step,
            width=32,
            complete_style="cyan",
            finished_style="green",
        )
        top.add_row(Text(self._title, style="bold"), bar, Text(self._count(), style="cyan"), self._times())
        below = Text()
        for name, value in self._figures.items():  # name and value stay on one line
            below.append(f"{name}\u00a0", style="dim").append(f"{show(value):<9} ")
        return Group(top, Padding(below, (0, 0, 0, 2)))


def _three(value: float) -> str:
    """0.0001 ≤ |value| < 1000, or 0, to 3 significant digits and no exponent."""
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(float(f"{abs(value):.2e}")))
    return f"{value:.{max(0, digits)}f}"
