"""Training of a masked diffusion model: pre-training from random weights, then fine-tuning.

    python -m jaxrl_llm.train --config=configs/diffusion_training.py --workdir=runs/pretrained \
        --config.tokenizer.path=path/to/tokenizer --config.supervised.train.path=texts.jsonl
    python -m jaxrl_llm.train --config=configs/diffusion_training.py:runs/pretrained/export \
        --workdir=runs/tuned --config.supervised.train.path=train.jsonl
    python -m jaxrl_llm.sample --config=configs/diffusion.py:runs/tuned/export --prompt="..."

Each line of texts.jsonl has a `text`, of which any token may be masked. Each line of train.jsonl has a
`prompt`, which is never masked, and a `completion` (strings or messages). The argument is the model to
fine-tune: a folder of LLaDA's or Dream's layout, such as the one that pre-training leaves.
"""

from ml_collections import ConfigDict

from jaxrl_llm.training.config import default


def get_config(model: str = "") -> ConfigDict:
    c = default()
    c.num_steps = 0
    c.model.path = model
    c.model.compute_dtype = "bfloat16"

    c.supervised.train.kind = "jsonl"
    c.supervised.num_steps = 1000
    c.supervised.batch_rows = 16
    c.supervised.optimizer.schedule = "cosine"
    c.supervised.optimizer.warmup_steps = 50
    if model:
        c.supervised.objective = "diffusion_finetuning"
        c.supervised.train.path = "train.jsonl"
        c.supervised.max_length = 2048
        c.supervised.completion_length = 128  # the max_new_tokens that it will be sampled with
        c.supervised.optimizer.learning_rate = 1e-5
        c.model.remat = "full"
        return c

    c.supervised.objective = "diffusion_pretraining"
    c.supervised.train.path = "texts.jsonl"
    c.supervised.train.options = {"form": "text"}
    c.supervised.max_length = 512
    c.supervised.optimizer.learning_rate = 1e-3
    c.model.family = "llada"  # or Dream
    c.model.hidden_size, c.model.num_layers, c.model.intermediate_size = 512, 8, 1536
    c.model.num_heads = c.model.num_kv_heads = 8
    c.model.head_dim = 64
    return c
