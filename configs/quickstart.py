"""A small decoder learns two-number sums: supervised warm start, then GRPO against the task's own scorer.

    python -m jaxrl_llm.train --config=configs/quickstart.py --workdir=runs/quickstart

Five minutes on two CPU cores. `--config=configs/quickstart.py:smoke` takes a few steps of each stage.
"""

import string

from ml_collections import ConfigDict

from jaxrl_llm.training.config import default

SUMS = {"min_terms": 3, "max_terms": 3, "max_digits": 1, "operators": ("+", "-"), "allow_parentheses": False}


def get_config(arg: str = "") -> ConfigDict:
    c = default()
    c.model.hidden_size = 128
    c.model.num_layers = 2
    c.model.num_heads = 4
    c.model.num_kv_heads = 2
    c.model.head_dim = 32
    c.model.intermediate_size = 384

    c.tokenizer.kind = "characters"
    c.tokenizer.alphabet = string.ascii_letters + string.digits + " +-=.,:?!()*/\n"

    c.data.max_prompt_length = 24
    c.data.train.kind = "reasoning_gym"
    c.data.train.name = "basic_arithmetic"
    c.data.train.size = 20_000
    c.data.train.seed = 1
    c.data.train.options = SUMS
    c.eval.data.kind = "reasoning_gym"
    c.eval.data.name = "basic_arithmetic"
    c.eval.data.size = 512
    c.eval.data.seed = 0
    c.eval.data.options = SUMS
    c.eval.batch_prompts = 256  # the rows of a training step: decoding is compiled once

    c.supervised.num_steps = 300
    c.supervised.batch_rows = 64
    c.supervised.optimizer.learning_rate = 2e-3
    c.supervised.optimizer.schedule = "cosine"

    c.num_steps = 100
    c.rollout.prompts_per_step = 32
    c.rollout.num_generations = 8
    c.rollout.max_completion_length = 6
    c.reward.functions = ("reasoning_gym",)
    c.optimizer.learning_rate = 3e-4

    if arg == "smoke":
        c.supervised.num_steps, c.num_steps = 4, 3
        c.rollout.prompts_per_step, c.eval.data.size = 8, 32
        c.data.train.size = 1000
    elif arg:
        raise ValueError(f"unknown argument {arg!r}; 'smoke' or none")
    return c
