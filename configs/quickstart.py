"""A small decoder learns sums of three digits: supervised warm start, then GRPO on the task's own scorer.

    python -m jaxrl_llm.train --config=configs/quickstart.py --workdir=runs/quickstart

Minutes on two CPU cores. `--config=configs/quickstart.py:smoke` takes a few steps of each stage.
"""

import string

from ml_collections import ConfigDict

from jaxrl_llm.training.config import default

SUMS = {"min_terms": 3, "max_terms": 3, "max_digits": 1, "operators": ("+", "-"), "allow_parentheses": False}


def get_config(arg: str = "") -> ConfigDict:
    c = default()
    c.model.hidden_size = 64
    c.model.num_layers = 2
    c.model.num_heads = 4
    c.model.num_kv_heads = 4
    c.model.head_dim = 16
    c.model.intermediate_size = 192

    c.tokenizer.kind = "characters"
    c.tokenizer.alphabet = string.ascii_letters + string.digits + " +-=.,:?!()*/\n"

    c.data.max_prompt_length = 24
    for source, seed, size in ((c.eval.data, 0, 512), (c.data.train, 1, 20_000)):
        source.kind, source.name, source.seed, source.size = "reasoning_gym", "basic_arithmetic", seed, size
        source.options = SUMS
    c.eval.every = 40
    c.eval.batch_prompts = 512  # as many rows as a training step has: decoding is compiled once

    c.supervised.num_steps = 600
    c.supervised.batch_rows = 64
    # the warm start is not annealed: RL's own schedule ends what it begins
    c.supervised.optimizer.learning_rate = 4e-3

    c.num_steps = 120
    c.train.num_iterations = 2
    c.rollout.prompts_per_step = 64
    c.rollout.num_generations = 8
    c.rollout.max_completion_length = 6
    c.reward.functions = ("reasoning_gym",)
    c.optimizer.learning_rate = 1e-3
    c.optimizer.b2 = 0.98
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 5

    if arg == "smoke":
        c.supervised.num_steps, c.num_steps = 4, 3
        c.rollout.prompts_per_step, c.eval.data.size, c.eval.batch_prompts = 8, 32, 32
        c.data.train.size = 1000
    elif arg:
        raise ValueError(f"unknown argument {arg!r}; 'smoke' or none")
    return c
