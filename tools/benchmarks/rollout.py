"""Rollouts: the engine beside google-tunix's Sampler, gemma's SamplerLoop and transformers, with and without
continuous batching.

    python tools/benchmarks/rollout.py

One random Qwen3 that all read from the same files (gemma: a Gemma 3 of the same shape, with random weights of
its own), 2 cores, prompts that differ in every round. A round is one call of the library's public function,
prompts in and tokens out on the host: prefill, decoding and its own conversions; not loading, not compiling.
Ours returns the log-probs of what it drew besides; the others, as called here, return none. No token ends a
completion, so that every library writes as many.

Toy model (4 layers of width 256, 8 heads over 4, vocabulary 4096, float32):
- 16 and 64 prompts of 64 tokens, 128 new tokens each, all decoded together;
- queue: 256 prompts of 64 tokens, whose completions have lengths from a long-tailed distribution: mean 64,
  at most 512 tokens, the same in every round. Ours and transformers-cb (continuous batching) refill, given
  each request's limit; the others serve the queue in batches, in its order, each up to its longest row. Only
  the tokens that were asked for count. Each library has as many rows at a time, 16, 32 or 64, as it was
  faster with: `queue_rows` of its file in `contenders/`;
- first token: 8 rows of one prompt of 512 tokens, one new token each.

Shape of Qwen3-0.6B, 8 prompts of 32 tokens, the weights in float32 and in bfloat16:
- 32 steps of decoding alone: the time for 33 new tokens without that for 1, after one round of warm-up (of
  fewer steps the prefill's noise would drown the slower libraries'). "bare products" is a program that does
  nothing but the weight products of as many steps.

At last 1,000 requests of mixed lengths and parameters are served by an engine that is warm, which must trace
and compile nothing.
"""

import contextlib
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import harness
import numpy as np
import peers
import report
import toy
from report import OURS, Row

PRODUCTS = "bare products"
THREADS = 2
REFILL = (peers.CONTINUOUS.name,)
"""Peers that put a waiting row in the place of one that is complete."""
QUEUE, FIRST, RETRACES = "queue", "first token", "retraces"
TOY: dict[str, dict[str, Any]] = {
    f"{rows} rows, {what}": {"prompts": rows, "length": 64, "new_tokens": 128, "rows": rows, "top_p": top_p}
    for rows in (16, 64)
    for what, top_p in (("T = 1", 1.0), ("top-p .95", 0.95))
} | {
    QUEUE: {"prompts": 256, "length": 64, "new_tokens": "long-tailed", "rows": None},
    FIRST: {"prompts": 1, "num_generations": 8, "length": 512, "new_tokens": 1, "rows": 8},
}
DECODE: dict[str, str] = {"0.6B, float32": "float32", "0.6B, bfloat16": "bfloat16"}
"""Case -> dtype."""
STEPS = {"prompts": 8, "length": 32, "new_tokens": 33, "rows": 8, "decode_alone": True}
MIXED = {"requests": 1000, "slots": 16, "most": 256}
"""See `contenders/ours_rollout.py`."""
SAME = {"float32": 1e-3, "bfloat16": 1.0}
"""How far apart the logits of two libraries may be."""


def long_tail(count: int = 256, mean: float = 64, most: int = 512, seed: int = 0) -> list[int]:
    """Lengths from a log-normal distribution (σ = 1) cut at `most`, scaled until their mean is right."""
    draws = np.exp(np.random.default_rng(seed).normal(size=count))
    low, high = 0.0, float(most)
    for _ in range(60):
        scale = (low + high) / 2
        lengths = np.clip(np.round(scale * draws), 1, most)
        low, high = (scale, high) if lengths.mean() < mean else (low, scale)
    return lengths.astype(int).tolist()


def request(case: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What contenders are sent, see `contenders/rollout_worker.py`."""
    given, groups = case["new_tokens"], case.get("num_generations", 1)
    new_tokens = long_tail(case["prompts"]) if given == "long-tailed" else [given] * case["prompts"] * groups
    return {
        "prompts": toy.random_prompts(seed, case["prompts"], case["length"]),
        "num_generations": groups,
        "new_tokens": new_tokens,
        "rows": case["rows"],
        "temperature": 1.0,
        "top_p": case.get("top_p", 1.0),
        "seed": seed,
        "decode_alone": case.get("decode_alone", False),
    }


def requests(cases: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, dict[str, Any]]]:
    """New prompts and a new seed for every case of every round, the same for every contender."""
    seed = 1
    while True:
        yield {name: request(case, seed + index) for index, (name, case) in enumerate(cases.items())}
        seed += len(cases)


def goals(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """(case, contender) -> how many times faster ours is meant to be, mostly than the fastest peer."""
    found: dict[tuple[str, str], float] = {}
    for case in dict.fromkeys(row.case for row in rows):
        others = {row.contender: row.median for row in rows if row.case == case and row.contender != OURS}
        bare = others.pop(PRODUCTS, None)
        without = {name: seconds for name, seconds in others.items() if name not in REFILL}
        refill = {name: seconds for name, seconds in others.items() if name in REFILL}
        if case == QUEUE:
            wanted = [(without, 3.0), (refill, 1.5)]
        elif case == FIRST:
            wanted = [({name: s for name, s in others.items() if name == peers.TUNIX.name}, 4.0)]
        elif case in DECODE:
            wanted = [(others, 1.0), ({} if bare is None else {PRODUCTS: bare}, 0.8)]
        else:
            wanted = [(others, 6.0 if TOY[case].get("top_p", 1.0) < 1 else 2.0)]
        found |= {(case, min(among, key=among.__getitem__)): goal for among, goal in wanted if among}
    return found


BENCHMARK = harness.Benchmark(
    name="rollout",
    description=__doc__,
    peers=(peers.TUNIX, peers.GEMMA, peers.TORCH, peers.CONTINUOUS),
    scripts={
        OURS: "ours_rollout.py",
        PRODUCTS: "products_rollout.py",
        peers.TUNIX.name: "tunix_rollout.py",
        peers.GEMMA.name: "gemma_rollout.py",
        peers.TORCH.name: "transformers_rollout.py",
        peers.CONTINUOUS.name: "continuous_rollout.py",
    },
    task={"threads": THREADS},
    requests=requests(TOY),
    goals={},  # known when the fastest is
    own=(OURS, PRODUCTS),
    cases=(*TOY, *DECODE, RETRACES),
    repetitions=5,
    warmup=2,
)


def retraces_line(reply: Mapping[str, Any]) -> str:
    """What 1,000 mixed requests have made the engine trace and compile."""
    verdict = "none wanted: " + ("reached" if reply["traced"] == reply["compiled"] == 0 else "missed")
    return (
        f"{reply['requests']:,} requests of mixed lengths and parameters after warm-up, {reply['tokens']:,} "
        f"tokens: {reply['traced']} functions traced, {reply['compiled']} compiled ({verdict})"
    )


def run(argv: Sequence[str]) -> list[Row]:
    """From the command line to the table and the JSON.

    Raises:
      SystemExit: something was traced or compiled that should not have been.
    """
    this = harness.begin(argv, BENCHMARK, threads=THREADS)
    args, pythons = this.args, this.pythons
    rows: list[Row] = []
    versions: dict[str, dict[str, str]] = {}
    retraces: dict[str, Any] | None = None

    def phase(
        names: Sequence[str], config: Mapping[str, Any], folder: str, dtype: str, cases: Mapping[str, Any]
    ) -> None:
        """Starts contenders on one model and lets them take turns in its cases."""
        nonlocal retraces
        prompts = toy.random_prompts(0, 1, 64)
        task = {**BENCHMARK.task, "model": folder, "config": config, "prompts": prompts, "dtype": dtype}
        with contextlib.ExitStack() as stack:
            present = {name: python for name, python in pythons.items() if name in names}
            contenders = harness.start(stack, present, BENCHMARK, task, args.output)
            versions.update({contender.name: contender.about["versions"] for contender in contenders})
            comparable = [contender for contender in contenders if "logits" in contender.about]
            if comparable:
                harness.check_same_model(comparable, SAME[dtype])
            if cases:
                warmup = args.warmup if config is toy.QWEN3 else 1
                rows.extend(harness.measure(contenders, requests(cases), warmup, args.repetitions))
            if config is toy.QWEN3 and RETRACES in args.cases and contenders[0].name == OURS:
                retraces = contenders[0].ask({"call": "retraces", **MIXED})

    with tempfile.TemporaryDirectory() as folder:
        cases = {name: case for name, case in TOY.items() if name in args.cases}
        if cases or RETRACES in args.cases:
            toy.write_model(pathlib.Path(folder))
            everyone = [name for name in pythons if name != PRODUCTS]
            phase(everyone if cases else [OURS], toy.QWEN3, folder, "float32", cases)
    with tempfile.TemporaryDirectory() as folder:
        decode = {case: dtype for case, dtype in DECODE.items() if case in args.cases}
        if decode:
            toy.write_model(pathlib.Path(folder), toy.QWEN3_0_6B)
        for case, dtype in decode.items():
            phase(list(pythons), toy.QWEN3_0_6B, folder, dtype, {case: STEPS})
    this.finish(
        rows,
        versions,
        [report.table(rows, goals(rows)), *([] if retraces is None else [retraces_line(retraces)])],
        cases={**TOY, **DECODE},
        steps=STEPS,
        retraces=retraces,
    )
    harness.refuse_retraces(retraces)
    return rows


if __name__ == "__main__":
    run(sys.argv[1:])
