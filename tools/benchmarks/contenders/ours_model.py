"""The benchmark's model in jaxrl_llm, read from the Hugging Face folder that all contenders read."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models import huggingface, transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.huggingface_config import config_from_folder
from jaxrl_llm.models.params import Tree


def load(task: dict[str, Any]) -> tuple[Tree, ModelConfig]:
    """Params in the task's dtype (float32 unless it says), and the architecture."""
    cfg = config_from_folder(task["model"])
    return huggingface.load(task["model"], cfg, dtype=jnp.dtype(task.get("dtype", "float32"))), cfg


def last_logits(params: Tree, cfg: ModelConfig, prompts: list[list[int]]) -> list[float]:
    """Logits f32[V] after the first prompt."""
    dtype = params["final_norm"].dtype
    hidden = transformer.forward(params, jnp.asarray(prompts[:1]), cfg, dtype=dtype)
    return np.asarray(transformer.logits(params, hidden[0, -1], cfg)).tolist()
