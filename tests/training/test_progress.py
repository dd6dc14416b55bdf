"""A bar on a terminal, lines in a log, and no obstacle to Ctrl-C."""

import io
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jaxrl_llm.training.progress import clock, progress, show, summary


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-1.0, "-1.00"),
        (0.5124, "0.512"),
        (-0.01234, "-0.0123"),
        (0.09996, "0.100"),
        (99.96, "100"),
        (999.6, "1.00k"),
        (12345.0, "12.3k"),
        (999_600.0, "1.00M"),
        (1e-6, "1e-6"),
        (9.9996e-5, "0.000100"),
        (-1.234e13, "-1.23e13"),
        (float("nan"), "nan"),
    ],
)
def test_three_digits(value: float, text: str) -> None:
    assert show(value) == text


@given(st.floats(-1e300, 1e300))
def test_shown_is_near(value: float) -> None:
    text = show(value)
    number = float(text.replace("k", "e3").replace("M", "e6").replace("G", "e9"))
    assert number == pytest.approx(value, rel=0.00501, abs=0)
    assert len(re.sub(r"e.*|[-.kMG]", "", text).lstrip("0")) <= 3
    assert len(text) <= 8 or abs(value) > 1e99 or abs(value) < 1e-9


def test_clock() -> None:
    assert clock(0) == "0:00:00" and clock(59.6) == "0:01:00" and clock(36_061) == "10:01:01"
    assert clock(float("inf")) == "-:--:--"


def test_lines_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 2 s after 60 s of compilation: time left counts from the pace of the later ones."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    file = io.StringIO()
    with progress(100, "GRPO", every=30.0, console=Console(file=file)) as tick:
        now += 60
        tick(1, {"reward": 0.25, "loss": -1e-6})
        for step in range(2, 101):
            now += 2
            tick(step, {"reward": 0.25 + step / 200})
    lines = file.getvalue().splitlines()
    assert lines[:3] == [
        "GRPO    1/100   1%  0:01:00 gone  -:--:-- left   reward    0.250  loss    -1e-6",
        "GRPO   16/100  16%  0:01:30 gone  0:02:48 left   reward    0.330  loss    -1e-6",
        "GRPO   31/100  31%  0:02:00 gone  0:02:18 left   reward    0.405  loss    -1e-6",
    ]
    assert lines[-1] == "GRPO  100/100 100%  0:04:18 gone  0:00:00 left   reward    0.750  loss    -1e-6"
    assert len(lines) == 8 and len(set(map(len, lines))) == 1  # aligned


def test_an_interrupted_stage_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    with pytest.raises(KeyboardInterrupt), progress(100, "SFT", start=40, console=Console(file=file)) as tick:
        tick(41, {})
        tick(42, {"loss": 1.5})
        raise KeyboardInterrupt
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["41/100", "42/100"]


def test_the_bar_on_a_terminal() -> None:
    file = io.StringIO()
    with progress(
        10, "GRPO", console=Console(file=file, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    ) as tick:
        for step in range(1, 11):
            tick(step, {"reward": step / 10, "tok/s": 12_345.0})
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue()).replace("\r", "").rstrip().splitlines()[-2:]
    assert re.fullmatch(r" *GRPO  ━{32}  10/10  0:00:0\d gone  0:00:00 left *", last[0])
    assert last[1].split() == ["reward", "1.00", "tok/s", "12.3k"]


FOREVER = """
import time
from jaxrl_llm.training.progress import progress
with progress(1000, "GRPO") as tick:
    for step in range(1, 1000):
        tick(step, {"reward": 0.5})
        print("step", step)
        time.sleep(0.02)
"""


def test_ctrl_c_on_a_real_terminal() -> None:
    """The process ends by KeyboardInterrupt at once, with the cursor back, and prints stand above the bar."""
    parent, terminal = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "100", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", FOREVER],
        stdout=terminal,
        stderr=subprocess.PIPE,
        env=env,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
    )
    os.close(terminal)
    output = b""
    while b"step 5" not in output:
        output += os.read(parent, 1 << 16)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    try:
        while data := os.read(parent, 1 << 16):
            output += data
    except OSError:  # Linux reports the closed terminal so
        pass
    _, errors = process.communicate(timeout=30)
    os.close(parent)
    assert time.monotonic() - begin < 5
    assert process.returncode == -signal.SIGINT and errors.rstrip().endswith(b"KeyboardInterrupt")
    assert output.count(b"\x1b[?25l") == output.count(b"\x1b[?25h") == 1  # cursor hidden, shown again
    assert output.rindex(b"GRPO") > output.rindex(b"step ")


def test_summary_is_aligned() -> None:
    file = io.StringIO()
    rows = [["accuracy", "41.2% [37.0, 45.5]", "83.4%"], ["length", 12.345, 14345.2]]
    summary(rows, ["", "before", "after"], title="held out", console=Console(file=file))
    assert file.getvalue().splitlines() == [
        "",
        "held out",
        "                        before  after",
        "  accuracy  41.2% [37.0, 45.5]  83.4%",
        "  length                  12.3  14.3k",
    ]
