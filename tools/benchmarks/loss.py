"""Value and gradient of a policy loss from hidden states: ours beside five others.

    python tools/benchmarks/loss.py

PPO's clipped loss (ε = 0.2, mean over tokens, neither KL nor entropy bonus) of N tokens in 8 sequences, of
which up to half are masked at the end, and some of the others clipped, as in training: ours leaves both out.
In float32, differentiated with respect to hidden states [N, D] and head [V, D]; every library on the same
arrays in its own layout, on 2 cores. Before the clock starts all agree on the loss to 1e-4 and on the norms
of both gradients to 1e-3. tokamax has the cross-entropy of all tokens alone: its value is checked against
that of ours. A round is one call, compiled and warm, its results waited for; nothing is optimised or fetched.

The second table sets ours beside the three bare matrix products (logits, gradient of hidden, gradient of
head, each jitted by itself), timed in turn in the same process, and the temporaries that XLA plans for ours
beside those of naive, which is jax.numpy with all logits in float32. The third is the same loss in bfloat16
compiled ahead of time for one TPU v5p: it proves that it compiles and what memory it takes, and says nothing
about speed. google-tunix 0.1.7 has no chunked form, so that is not in it.
"""

import contextlib
import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import harness
import peers
import report
from report import OURS, Row

NAIVE = "naive"
CASES: dict[str, dict[str, int]] = {
    "1024 × 256 × 32768": {"sequences": 8, "tokens": 128, "features": 256, "vocab": 32_768},
    "2048 × 512 × 32768": {"sequences": 8, "tokens": 256, "features": 512, "vocab": 32_768},
    "1024 × 896 × 151936": {"sequences": 8, "tokens": 128, "features": 896, "vocab": 151_936},
}
"""N × D × V."""
TPU = {"topology": "v5p:2x2x1", "sequences": 8, "tokens": 1024, "features": 1024, "vocab": 151_936}

FASTER, PRODUCTS, SMALLER = 1.25, 1.5, 16.0
"""Goals: at least as many times faster than the fastest other; at most as many times the bare products; at
least as many times naive's temporaries."""
TPU_GIB = 0.10
"""Goal: temporaries on the TPU."""

BENCHMARK = harness.Benchmark(
    name="loss",
    description=__doc__,
    peers=(peers.TUNIX, peers.TOKAMAX, peers.TRL, peers.LIGER),
    scripts={
        OURS: "ours_loss.py",
        NAIVE: "naive_loss.py",
        peers.TUNIX.name: "tunix_loss.py",
        peers.TOKAMAX.name: "tokamax_loss.py",
        peers.TRL.name: "trl_loss.py",
        peers.LIGER.name: "liger_loss.py",
    },
    task={"threads": 2},
    requests=itertools.repeat({case: {"time": True} for case in CASES}),
    goals={},  # known when the fastest is
    own=(OURS, NAIVE),
)

Replies = Mapping[str, Mapping[str, Any]]
"""Contender -> its reply."""


def check_same_loss(prepared: Replies, tolerance: float = 1e-4, gradient_tolerance: float = 1e-3) -> None:
    """All contenders with a loss of the same name have the same value and the same gradients.

    Args:
      prepared: replies to `prepare`; the gradients belong to the loss that is named first.
      tolerance, gradient_tolerance: relative differences that are let pass.

    Raises:
      RuntimeError: two of them differ.
    """
    seen: dict[str, tuple[str, float]] = {}
    for contender, reply in prepared.items():
        name = next(iter(reply["losses"]))
        norms = {f"{name}, gradient of {of}": x for of, x in zip(("hidden", "head"), reply["gradients"])}
        for what, value in (reply["losses"] | norms).items():
            other, expected = seen.setdefault(what, (contender, value))
            allowed = gradient_tolerance if what in norms else tolerance
            if not abs(value - expected) <= allowed * abs(expected):
                raise RuntimeError(
                    f"{other} and {contender} compute different losses: {what} {expected:.6g} and {value:.6g}"
                )


def fastest_goals(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """The goal belongs to the fastest of the others in each case."""
    goals = {}
    for case in dict.fromkeys(row.case for row in rows):
        others = [row for row in rows if row.case == case and row.contender != OURS]
        if others:
            goals[case, min(others, key=lambda row: row.median).contender] = FASTER
    return goals


def work_table(rows: Sequence[Row], temporaries: Mapping[tuple[str, str], int | None]) -> str:
    """Ours beside the bare products and beside naive's memory.

    Args:
      rows: timings; those of ours have the part "products".
      temporaries: (case, contender) -> bytes.
    """
    lines = [("case", "ours (s)", "bare products (s)", "ratio", "goal")]
    lines[0] += ("ours (MiB)", "naive (MiB)", "naive / ours", "goal")
    for row in rows:
        if row.contender != OURS:
            continue
        bare = statistics.median(row.parts["products"])
        ratio = row.median / bare
        own, naive = temporaries.get((row.case, OURS)), temporaries.get((row.case, NAIVE))
        smaller = naive / own if own and naive else None
        lines.append(
            (
                row.case,
                f"{row.median:.3f}",
                f"{bare:.3f}",
                f"{ratio:.2f}×",
                f"≤ {PRODUCTS:g}×: {'reached' if ratio <= PRODUCTS else 'missed'}",
                "" if own is None else f"{own / 2**20:.1f}",
                "" if naive is None else f"{naive / 2**20:.1f}",
                "" if smaller is None else f"{smaller:.1f}×",
                "" if smaller is None else report.verdict(smaller, SMALLER),
            )
        )
    return report.markdown(lines)


def tpu_table(compiled: Mapping[str, int | None]) -> str:
    """Temporaries on one TPU, contender -> bytes; None where libtpu is not installed."""
    lines = [("library", "temporaries (GiB)", "goal")]
    missing = [name for name, size in compiled.items() if size is None]
    for name, size in compiled.items():
        if size is not None:
            gib = size / 2**30
            goal = f"≤ {TPU_GIB:.2f}: {'reached' if gib <= TPU_GIB else 'missed'}" if name == OURS else ""
            lines.append((name, f"{gib:.2f}", goal))
    notes = [f"{name} was not compiled for the TPU: no libtpu in its environment." for name in missing]
    if missing:
        notes.append(
            "To include it: the extra tpu (pip install -e '.[tpu]'), in a peer's pip install 'jax[tpu]'"
        )
    return "\n".join([*([report.markdown(lines)] if len(lines) > 1 else []), *notes])


def run(argv: Sequence[str]) -> list[Row]:
    """From the command line to the three tables and the JSON."""
    this = harness.begin(argv, BENCHMARK, threads=BENCHMARK.task["threads"])
    args = this.args
    rows: list[Row] = []
    temporaries: dict[tuple[str, str], int | None] = {}
    with contextlib.ExitStack() as stack:
        contenders = harness.start(stack, this.pythons, BENCHMARK, BENCHMARK.task, args.output)
        for case, sizes in CASES.items():
            prepared = {contender.name: contender.ask({"prepare": sizes}) for contender in contenders}
            check_same_loss(prepared)
            temporaries |= {(case, name): reply["temporaries"] for name, reply in prepared.items()}
            requests = itertools.repeat({case: {"time": True}})
            rows += harness.measure(contenders, requests, args.warmup, args.repetitions)
        compiled = {
            contender.name: contender.ask({"compile_for": TPU})["temporaries"]
            for contender in contenders
            if contender.name in (OURS, NAIVE, peers.TUNIX.name)
        }
    versions = {contender.name: contender.about["versions"] for contender in contenders}
    timings = [Row(row.case, row.contender, row.seconds, row.tokens) for row in rows]
    lines = [report.table(timings, fastest_goals(rows))]
    if OURS in this.pythons:
        lines += ["", work_table(rows, temporaries)]
    if compiled:
        sizes = ", ".join(f"{name} {value}" for name, value in TPU.items())
        lines += ["", f"Compiled ahead of time ({sizes}, bfloat16), not run:", tpu_table(compiled)]
    this.finish(
        rows,
        versions,
        lines,
        cases=CASES,
        tpu=TPU,
        temporaries=[
            {"case": case, "contender": name, "bytes": size} for (case, name), size in temporaries.items()
        ],
        tpu_temporaries=compiled,
    )
    return rows


if __name__ == "__main__":
    run(sys.argv[1:])
