"""GRPO on your own model, data and reward.

    python -m jaxrl_llm.train --config=configs/grpo.py:path/to/model --workdir=runs/mine \
        --config.data.train.path=train.jsonl --config.eval.data.path=test.jsonl \
        --config.reward.functions="('path/to/reward.py:score',)"

`path/to/model` is a Hugging Face folder (config.json, safetensors, tokenizer). Each line of train.jsonl has a
`prompt`, a string or a list of messages; its other columns reach the reward function, which has TRL's
signature, f(prompts, completions, completion_ids, **columns) -> list of floats, or verl's. The trained model
is left as a Hugging Face folder in runs/mine/export. The same command resumes an interrupted run.

`configs/grpo.py:path/to/model,verl-0.9/gspo` takes the loss and the advantage of another library's method, or
of a paper (`losses.PRESETS` lists them: trl-1.16, verl-0.9, tunix-0.1.7, paper).
"""

from ml_collections import ConfigDict

from jaxrl_llm.training.config import default, use_preset


def get_config(arg: str = "") -> ConfigDict:
    model, _, preset = arg.partition(",")
    c = default()
    c.model.path = model
    c.model.compute_dtype = "bfloat16"
    c.model.remat = "full"

    c.data.train.kind = "jsonl"
    c.data.train.path = "train.jsonl"
    c.data.max_prompt_length = 512
    c.eval.data.kind = "jsonl"  # without a path: no evaluation
    c.eval.every = 50

    c.num_steps = 500
    c.rollout.prompts_per_step = 32
    c.rollout.num_generations = 8
    c.rollout.max_completion_length = 1024
    c.train.micro_batch_rows = 8

    c.reward.functions = ("math_equivalence",)
    c.optimizer.learning_rate = 1e-6
    c.optimizer.warmup_steps = 10
    c.loss.epsilon_high = 0.28
    c.loss.importance_sampling_correction = "token_truncate"
    if preset:
        c.loss.epsilon_high = None
        use_preset(c, *preset.rsplit("/", 1))
    return c
