"""Supervised fine-tuning of your own model.

    python -m jaxrl_llm.train --config=configs/sft.py:path/to/model --workdir=runs/sft \
        --config.supervised.train.path=train.jsonl

Each line of train.jsonl has a `prompt` and a `completion` (strings or messages). Examples are packed, and
the loss is on completions alone. The trained model is left as a Hugging Face folder in runs/sft/export.
"""

from ml_collections import ConfigDict

from jaxrl_llm.training.config import default


def get_config(model: str = "") -> ConfigDict:
    c = default()
    c.num_steps = 0
    c.model.path = model
    c.model.compute_dtype = "bfloat16"
    c.model.remat = "full"

    c.supervised.train.kind = "jsonl"
    c.supervised.train.path = "train.jsonl"
    c.supervised.num_steps = 1000
    c.supervised.batch_rows = 16
    c.supervised.max_length = 2048
    c.supervised.optimizer.learning_rate = 1e-5
    c.supervised.optimizer.schedule = "cosine"
    c.supervised.optimizer.warmup_steps = 50
    return c
