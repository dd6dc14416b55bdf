"""A whole GRPO step: ours beside google-tunix's GRPOLearner.

    python tools/benchmarks/grpo_step.py

2 prompts of 64 tokens × 8 completions of 128 tokens at temperature 1, one update of the whole batch with
AdamW, no reference model (beta 0), one random Qwen3 (4 layers of width 256, 8 heads over 4, vocabulary 4096,
float32) read by both from the same files. No completion ends early. The reward is the share of even token
ids, which costs nothing. A round is one step of the library's own loop with everything in it: rollout,
reward, advantages, loss, gradient, optimizer, its own metrics; the new params are waited for. Not in it:
loading, compiling, checkpoints.
"""

import sys
from collections.abc import Iterator
from typing import Any

import harness
import peers
import report
import toy

CASE = "GRPO step"
PROMPTS, PROMPT_LENGTH = 2, 64


def requests() -> Iterator[dict[str, dict[str, Any]]]:
    """New prompts for every step, the same for both."""
    seed = 1
    while True:
        yield {CASE: {"prompts": toy.random_prompts(seed, PROMPTS, PROMPT_LENGTH), "seed": seed}}
        seed += 1


BENCHMARK = harness.Benchmark(
    name="grpo_step",
    description=__doc__,
    peers=(peers.TUNIX,),
    scripts={report.OURS: "ours_grpo.py", peers.TUNIX.name: "tunix_grpo.py"},
    task={
        "prompts_per_step": PROMPTS,
        "num_generations": 8,
        "prompt_length": PROMPT_LENGTH,
        "new_tokens": 128,
        "temperature": 1.0,
        "top_p": 1.0,
        "learning_rate": 1e-6,
    },
    requests=requests(),
    goals={(CASE, peers.TUNIX.name): 2.0},
)

if __name__ == "__main__":
    harness.run(sys.argv[1:], BENCHMARK)
