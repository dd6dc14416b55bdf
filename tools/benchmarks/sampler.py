"""Sampling speed: ours beside google-tunix's vanilla Sampler and transformers' generate.

    python tools/benchmarks/sampler.py

A batch of 16 different prompts of 64 tokens, 128 new tokens each, with one random Qwen3 (4 layers of width
256, 8 heads over 4, vocabulary 4096, float32) that all contenders read from the same files. No completion
ends early. A round is one call of the library's public function, prompts in and tokens out on the host:
prefill, decoding and its own conversions; not loading, not compiling. Ours returns the log-probs of what it
drew besides; the others, as called here, return none.
"""

import sys
from collections.abc import Iterator
from typing import Any

import harness
import peers
import report
import toy

TASK = {"batch": 16, "prompt_length": 64, "new_tokens": 128}
CASES = {
    "temperature 1": {"temperature": 1.0, "top_p": 1.0},
    "top-p 0.95": {"temperature": 1.0, "top_p": 0.95},
}


def requests() -> Iterator[dict[str, dict[str, Any]]]:
    """New prompts and a new seed for every round, the same for every contender and case."""
    seed = 1
    while True:
        prompts = toy.random_prompts(seed, TASK["batch"], TASK["prompt_length"])
        yield {case: {"prompts": prompts, "seed": seed, **sampling} for case, sampling in CASES.items()}
        seed += 1


BENCHMARK = harness.Benchmark(
    name="sampler",
    description=__doc__,
    peers=(peers.TUNIX, peers.TORCH),
    scripts={
        report.OURS: "ours_sampler.py",
        peers.TUNIX.name: "tunix_sampler.py",
        peers.TORCH.name: "transformers_sampler.py",
    },
    task=TASK,
    requests=requests(),
    goals={("temperature 1", peers.TUNIX.name): 2.0, ("top-p 0.95", peers.TUNIX.name): 6.0},
)

if __name__ == "__main__":
    harness.run(sys.argv[1:], BENCHMARK)
