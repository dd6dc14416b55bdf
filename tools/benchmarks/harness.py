"""Contenders take turns on one machine, and a table comes out.

Every contender is a process of its own, run by its own interpreter, loaded and compiled before the clock
starts. They take turns, one repetition each and one at a time, so that whatever the machine is doing
meanwhile hits all of them alike; only the ratios within one run mean anything.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import peers
import report
import toy
from peers import PROJECT, Peer
from report import OURS, Row

HERE = pathlib.Path(__file__).resolve().parent
BUSY = 0.5
"""Load average above which the ratios are not to be trusted."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What is measured.

    Attributes:
      name: of the JSON and the logs.
      description: for --help.
      peers: other libraries to run beside ours.
      scripts: contender -> its file in `contenders/`.
      task: what every contender is told, see `contenders/worker.py`.
      requests: an endless supply of rounds, each case -> request.
      goals: (case, peer) -> how many times faster ours is meant to be.
      own: the contenders that are not peers, run by this interpreter.
      cases: that --cases chooses from; () = there is no such flag.
      repetitions, warmup: how many rounds unless told otherwise.
    """

    name: str
    description: str
    peers: Sequence[Peer]
    scripts: Mapping[str, str]
    task: Mapping[str, Any]
    requests: Iterator[Mapping[str, Mapping[str, Any]]]
    goals: Mapping[tuple[str, str], float]
    own: Sequence[str] = (OURS,)
    cases: Sequence[str] = ()
    repetitions: int = 7
    warmup: int = 2


def parse_args(argv: Sequence[str], benchmark: Benchmark) -> argparse.Namespace:
    """Which contenders, how often, where to; one flag per interpreter."""
    parser = argparse.ArgumentParser(
        description=benchmark.description, formatter_class=argparse.RawTextHelpFormatter
    )
    names = list(benchmark.scripts)
    output = PROJECT / "runs" / "benchmarks" / f"{benchmark.name}.json"
    parser.add_argument("--only", choices=names, nargs="+", default=names, help="contenders (default: all)")
    if benchmark.cases:
        cases = list(benchmark.cases)
        parser.add_argument("--cases", choices=cases, nargs="+", default=cases, help="cases (default: all)")
    for flag, count, which in (
        ("--repetitions", benchmark.repetitions, "timed rounds"),
        ("--warmup", benchmark.warmup, "rounds before those"),
    ):
        parser.add_argument(
            flag, type=int, metavar="N", default=count, help=f"{which} (default: %(default)s)"
        )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=output,
        help=f"every timing as JSON, the logs beside it (default: {output.relative_to(PROJECT)})",
    )
    for flag in dict.fromkeys(peer.flag for peer in benchmark.peers):
        wanted = ", ".join(peer.wanted() for peer in benchmark.peers if peer.flag == flag)
        parser.add_argument(f"--{flag}", metavar="PATH", help=f"python that has {wanted}")
    args = parser.parse_args(argv)
    if args.repetitions < 5:
        parser.error(f"--repetitions={args.repetitions}: a median needs at least 5")
    if args.warmup < 1:
        parser.error(f"--warmup={args.warmup}: the first round compiles, so at least 1")
    return args


class Contender:
    """The driver's end of a contender's process.

    Attributes:
      name: as in the table.
      about: what it sent first, {"versions": …} and possibly {"logits": …}.
    """

    def __init__(
        self, name: str, python: str, script: pathlib.Path, task: Mapping[str, Any], log: pathlib.Path
    ) -> None:
        self.name, self._log, self._log_file = name, log, log.open("w")
        paths = [str(PROJECT), str(PROJECT / "kernels")] if python == sys.executable else []
        self._process = subprocess.Popen(
            [python, str(script), json.dumps(dict(task))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log_file,
            text=True,
            env={"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            self.about = self._receive()
        except BaseException:
            self.close()
            raise

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One repetition: {"seconds": …, "tokens": …} and possibly {"parts": {stage: seconds}}."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a dead process is reported by `_receive`
            self._process.stdin.write(json.dumps(dict(request)) + "\n")
            self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{self.name} ended with exit code {code}; the end of {self._log}:\n{tail}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process, which sees the end of its input and so can end its own children."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log_file.close()


def check_same_model(contenders: Sequence[Contender], tolerance: float = 1e-3) -> None:
    """Every contender computes the same logits from the same weights.

    Raises:
      RuntimeError: two of them differ by more than `tolerance`.
    """
    first, *others = contenders
    for other in others:
        apart = np.max(np.abs(np.subtract(first.about["logits"], other.about["logits"])))
        if not apart <= tolerance:
            raise RuntimeError(
                f"{first.name} and {other.name} run different models: logits {apart:.3g} apart"
            )


def measure(
    contenders: Sequence[Contender],
    requests: Iterator[Mapping[str, Mapping[str, Any]]],
    warmup: int,
    repetitions: int,
) -> list[Row]:
    """Lets the contenders take turns, every other round in the opposite order.

    Args:
      contenders: loaded ones.
      requests: rounds, each case -> request.
      warmup: rounds that are not counted.  repetitions: rounds that are.

    Raises:
      RuntimeError: a contender died, or its rounds differ in the number of tokens.
    """
    replies: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for index in range(warmup + repetitions):
        timed = index >= warmup
        label = f"round {index - warmup + 1}/{repetitions}" if timed else f"warm-up {index + 1}/{warmup}"
        cases = next(requests)
        for case, request in cases.items():
            for contender in contenders if index % 2 else contenders[::-1]:
                reply = contender.ask(request)
                print(f"{label:<13} {case:<14} {contender.name:<13} {reply['seconds']:8.3f} s", flush=True)
                if timed:
                    replies.setdefault((case, contender.name), []).append(reply)
    rows = []
    for case, name in ((case, contender.name) for case in cases for contender in contenders):
        those = replies[case, name]
        tokens = {reply["tokens"] for reply in those}
        if len(tokens) != 1:
            raise RuntimeError(
                f"{name} wrote different numbers of tokens in different rounds: {sorted(tokens)}"
            )
        parts = {stage: [r["parts"][stage] for r in those] for stage in those[0].get("parts", {})}
        rows.append(Row(case, name, [reply["seconds"] for reply in those], tokens.pop(), parts))
    return rows


def find_pythons(args: argparse.Namespace, benchmark: Benchmark) -> dict[str, str]:
    """Contender -> interpreter, for those asked for. Peers that are not installed are skipped, and said so.

    Raises:
      SystemExit: none is left.
    """
    pythons = {name: sys.executable for name in benchmark.own if name in args.only}
    for peer in benchmark.peers:
        if peer.name in args.only:
            try:
                pythons[peer.name] = peers.find_python(peer, getattr(args, peer.flag))
            except peers.Missing as missing:
                print(missing)
    if not pythons:
        raise SystemExit("nothing to measure: no contender that was asked for is installed")
    return pythons


def start(
    stack: contextlib.ExitStack,
    pythons: Mapping[str, str],
    benchmark: Benchmark,
    task: Mapping[str, Any],
    output: pathlib.Path,
) -> list[Contender]:
    """The contenders' processes, which end with the stack; their logs lie beside `output`."""
    contenders = []
    for name, python in pythons.items():
        script = HERE / "contenders" / benchmark.scripts[name]
        contender = Contender(name, python, script, task, output.with_suffix(f".{name}.log"))
        stack.callback(contender.close)
        contenders.append(contender)
        print(f"{name}: {contender.about['versions']}", flush=True)
    return contenders


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a benchmark: what `begin` found, and what `finish` writes.

    Attributes:
      benchmark: what is measured.
      args: the command line.
      pythons: contender -> interpreter, for those that are there.
      load: average of the minute before.
    """

    benchmark: Benchmark
    args: argparse.Namespace
    pythons: Mapping[str, str]
    load: float

    def finish(
        self,
        rows: Sequence[Row],
        versions: Mapping[str, Mapping[str, str]],
        lines: Sequence[str],
        **more: Any,
    ) -> None:
        """Prints `lines`, which are the tables, and how versions differ from those meant; writes the JSON.

        Args:
          more: for the JSON.
        """
        print("\n" + "\n".join(lines))
        for peer in self.benchmark.peers:
            for note in peer.differences(versions.get(peer.name, peer.requirements)):
                print(note)
        record = report.record(rows, versions, self.benchmark.task, self.load) | more
        self.args.output.write_text(json.dumps(record, indent=2))
        print(f"every timing: {self.args.output}")


def begin(argv: Sequence[str], benchmark: Benchmark, *, threads: int | None = None) -> Run:
    """Reads the command line, finds the contenders, and makes the folder for the output.

    A note is printed where the machine is too busy to trust the ratios.

    Args:
      threads: cores that this process and its contenders may use; XLA counts them, and has no flag.

    Raises:
      SystemExit: a wrong command line, or no contender is installed.
    """
    args = parse_args(argv, benchmark)
    load = os.getloadavg()[0]
    if load > BUSY:
        print(f"note: the machine is busy (load {load:.1f}); take no ratio from this run for granted")
    pythons = find_pythons(args, benchmark)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if threads is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    return Run(benchmark, args, pythons, load)


def refuse_retraces(reply: Mapping[str, int] | None) -> None:
    """Ends the process with an error if anything was traced or compiled that should not have been."""
    if reply is not None and reply["traced"] + reply["compiled"]:
        raise SystemExit(f"{reply['traced']} functions were traced, {reply['compiled']} compiled")


def run(argv: Sequence[str], benchmark: Benchmark) -> list[Row]:
    """A benchmark on the toy model, from the command line to its table and JSON."""
    this = begin(argv, benchmark)
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        toy.write_model(folder)
        prompts = toy.random_prompts(0, 1, benchmark.task["prompt_length"])
        task = {**benchmark.task, "model": str(folder), "config": toy.QWEN3, "prompts": prompts}
        contenders = start(stack, this.pythons, benchmark, task, this.args.output)
        check_same_model(contenders)
        rows = measure(contenders, benchmark.requests, this.args.warmup, this.args.repetitions)
    versions = {contender.name: contender.about["versions"] for contender in contenders}
    this.finish(rows, versions, [report.table(rows, benchmark.goals)])
    return rows
