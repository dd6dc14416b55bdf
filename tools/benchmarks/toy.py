"""The toy model and its prompts, the same for every contender."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 768,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "torch_dtype": "float32",
    "bos_token_id": None,
    "eos_token_id": None,
}
"""Its config.json. No EOS: every completion has the same length in every library."""

QWEN3_0_6B: dict[str, Any] = QWEN3 | {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151_936,
    "torch_dtype": "bfloat16",
}
"""The same in the shape of Qwen3-0.6B."""


def write_model(folder: pathlib.Path, config: Mapping[str, Any] = QWEN3, seed: int = 0) -> None:
    """A random Qwen3 as a Hugging Face folder in the config's dtype, which every contender reads.

    The embedding, which is also the head, has standard deviation 0.15: logits of about ±2.4, hence a nucleus
    that is neither everything nor one token.
    """
    import ml_dtypes  # noqa: F401  (numpy knows bfloat16 by its name from here on)
    from safetensors.numpy import save_file

    rng, dtype = np.random.default_rng(seed), np.dtype(config["torch_dtype"])
    d, f, h = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]

    def matrix(rows: int, columns: int, std: float | None = None) -> np.ndarray:
        return rng.normal(0, std or columns**-0.5, (rows, columns)).astype(dtype)

    def norm(size: int) -> np.ndarray:
        return rng.uniform(0.8, 1.2, size).astype(dtype)

    tensors = {"embed_tokens": matrix(config["vocab_size"], d, 0.15), "norm": norm(d)}
    for index in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm": norm(d),
            "self_attn.q_proj": matrix(heads * h, d),
            "self_attn.k_proj": matrix(kv * h, d),
            "self_attn.v_proj": matrix(kv * h, d),
            "self_attn.o_proj": matrix(d, heads * h),
            "self_attn.q_norm": norm(h),
            "self_attn.k_norm": norm(h),
            "post_attention_layernorm": norm(d),
            "mlp.gate_proj": matrix(f, d),
            "mlp.up_proj": matrix(f, d),
            "mlp.down_proj": matrix(d, f),
        }
        tensors |= {f"layers.{index}.{name}": tensor for name, tensor in layer.items()}
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"model.{name}.weight": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))


def random_prompts(seed: int, count: int, length: int) -> list[list[int]]:
    """`count` prompts of `length` token ids of the toy model."""
    return np.random.default_rng(seed).integers(0, QWEN3["vocab_size"], (count, length)).tolist()
