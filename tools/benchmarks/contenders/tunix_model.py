"""The benchmark's model in google-tunix, read from the Hugging Face folder that all contenders read."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params as qwen3_params


def load(task: dict[str, Any], mesh: jax.sharding.Mesh | None = None) -> qwen3.Qwen3:
    """The model, in the task's dtype (float32 unless it says)."""
    config, dtype = task["config"], jnp.dtype(task.get("dtype", "float32"))
    shape = qwen3.ModelConfig(
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        hidden_dim=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        head_dim=config["head_dim"],
        num_kv_heads=config["num_key_value_heads"],
        norm_eps=config["rms_norm_eps"],
        rope_theta=config["rope_theta"],
        use_tied_embedding=config["tie_word_embeddings"],
        dtype=dtype,
        param_dtype=dtype,
    )
    return qwen3_params.create_model_from_safe_tensors(task["model"], shape, mesh, dtype=dtype)


def last_logits(model: qwen3.Qwen3, prompts: list[list[int]]) -> list[float]:
    """Logits f32[V] after the first prompt."""
    tokens = jnp.asarray(prompts[:1])
    length = tokens.shape[1]
    positions = jnp.arange(length)[None]
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    logits, _ = model(tokens, positions, None, mask)
    return np.asarray(logits[0, -1], np.float32).tolist()
