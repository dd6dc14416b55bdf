"""A run of seconds: a policy of a few thousand params learns to write short sums."""

from ml_collections import ConfigDict

from jaxrl_llm.training.config import default


def get_config(arg: str = "") -> ConfigDict:
    c = default()
    c.num_steps = 4
    c.model.hidden_size, c.model.num_layers, c.model.num_heads, c.model.num_kv_heads = 16, 1, 2, 1
    c.model.head_dim, c.model.intermediate_size = 8, 32
    c.tokenizer.kind, c.tokenizer.alphabet = "characters", "0123456789+-=. Calculate"
    c.tokenizer.alphabet = "".join(sorted(set("0123456789+-(). Calculate")))
    c.data.max_prompt_length = 24
    for source, seed, size in ((c.data.train, 1, 300), (c.eval.data, 0, 20)):
        source.kind, source.name, source.seed, source.size = "reasoning_gym", "basic_arithmetic", seed, size
        source.options = {"max_terms": 2, "max_digits": 1, "operators": ("+",), "allow_parentheses": False}
    c.eval.batch_prompts = 16
    c.eval.every = 2
    c.supervised.num_steps, c.supervised.batch_rows, c.supervised.max_length = 2, 8, 32
    c.rollout.prompts_per_step, c.rollout.num_generations, c.rollout.max_completion_length = 4, 4, 6
    c.reward.functions = ("tests/training/tiny_reward.py:score",)
    c.reward.workers = 1
    c.optimizer.learning_rate = 1e-3
    c.checkpoint.every = 1
    c.log.completions_every = 1
    c.log.plots = False
    if arg == "composed":  # HA-DW's weights (which remember), DynaMO's factors and DGPO's surrogate
        c.advantage.name, c.advantage.modulation, c.loss.surrogate = "ha_dw", "decay6", "dgpo"
    return c
