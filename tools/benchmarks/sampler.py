"""Sampling speed: ours beside google-tunix's vanilla Sampler and transformers' generate.

    python tools/benchmarks/sampler.py

16 completions of 128 new tokens by one random Qwen3 (4 layers of width 256, 8 heads over 4, vocabulary 4096,
float32) that all contenders read from the same files: 2 prompts of 64 tokens × 8 completions, as in a GRPO
step, and once 16 different prompts. No completion ends early. A round is one call of the library's public
function, prompts in and tokens out on the host: prefill, decoding and its own conversions; not loading, not
compiling. Ours returns the log-probs of what it drew besides; the others, as called here, return none.
"""

import sys
from collections.abc import Iterator
from typing import Any

import harness
import peers
import report
import toy

PROMPT_LENGTH, NEW_TOKENS = 64, 128
CASES: dict[str, dict[str, Any]] = {
    "temperature 1": {"count": 2, "num_generations": 8, "temperature": 1.0, "top_p": 1.0},
    "top-p 0.95": {"count": 2, "num_generations": 8, "temperature": 1.0, "top_p": 0.95},
    "16 prompts": {"count": 16, "num_generations": 1, "temperature": 1.0, "top_p": 1.0},
}


def requests() -> Iterator[dict[str, dict[str, Any]]]:
    """New prompts and a new seed for every round, the same for every contender."""
    seed = 1
    while True:
        yield {
            case: {
                **wanted,
                "seed": seed,
                "prompts": toy.random_prompts(seed, wanted["count"], PROMPT_LENGTH),
            }
            for case, wanted in CASES.items()
        }
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
    task={"prompt_length": PROMPT_LENGTH, "new_tokens": NEW_TOKENS},
    requests=requests(),
    goals={("temperature 1", peers.TUNIX.name): 2.0, ("top-p 0.95", peers.TUNIX.name): 6.0},
)

if __name__ == "__main__":
    harness.run(sys.argv[1:], BENCHMARK)
