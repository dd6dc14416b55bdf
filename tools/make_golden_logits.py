"""Makes tests/golden/logits_<variant>.npz: tiny random checkpoints and their logits by transformers.

    pip install torch transformers && python tools/make_golden_logits.py

Each file holds a config, weights rounded to bfloat16 (as their 16 bits), tokens, and the float32 logits
that transformers computes from them, so that the parity tests need no torch.
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "llama_biases": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "qwen2": {"model_type": "qwen2", "head_dim": None},
    "qwen2_window": {
        "model_type": "qwen2",
        "head_dim": None,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3_yarn": {"model_type": "qwen3", "rope_parameters": YARN_ROPE},
    "mistral": {"model_type": "mistral", "sliding_window": 9},
    "mistral_global": {"model_type": "mistral", "sliding_window": None},
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": 9,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "sliding_window": 9,
        "query_pre_attn_scalar": 24,
        "layer_types": [LOCAL, LOCAL, GLOBAL],
        "rope_parameters": GEMMA3_ROPE,
    },
}
"""Name -> what it adds to `SIZES`. Windows are shorter than the rows; rope scaling acts on some waves."""


def make_model(variant: str, seed: int) -> Any:
    """A transformers model with random weights, large enough that every part shows in the logits.

    Matrices have standard deviation 1.5/sqrt(inputs); norms are spread around their neutral value.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {k: v for k, v in (SIZES | VARIANTS[variant]).items() if k != "head_dim" or v is not None}
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    neutral = 0.0 if config.model_type.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 2:
                value = noise * 1.5 / weight.shape[1] ** 0.5
            elif "norm" in name:
                value = neutral + 0.3 * noise
            else:
                value = 0.5 * noise
            weight.copy_(value.bfloat16().float())
    return model


def make_tokens(seed: int) -> np.ndarray:
    """i64[2, 40] random tokens."""
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (2, 40))


def compute_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """f32[N, T, V] of a transformers model."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


def state_dict(model: Any) -> dict[str, np.ndarray]:
    """Weights as float32 by name, those of a tied head left out."""
    import torch

    assert isinstance(model, torch.nn.Module)
    return {name: weight.detach().numpy() for name, weight in model.named_parameters()}


def main() -> None:
    """Writes one file per variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = pathlib.Path(__file__).parents[1] / "tests" / "golden"
    parser.add_argument("--out", type=pathlib.Path, default=default)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for seed, variant in enumerate(VARIANTS):
        model, tokens = make_model(variant, seed), make_tokens(seed)
        logits = compute_logits(model, tokens)
        bits = {k: (w.view(np.uint32) >> 16).astype(np.uint16) for k, w in state_dict(model).items()}
        path = args.out / f"logits_{variant}.npz"
        config = json.dumps(model.config.to_dict())
        np.savez_compressed(path, config=config, tokens=tokens.astype(np.int32), logits=logits, **bits)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB, logits up to {np.abs(logits).max():.1f}")


if __name__ == "__main__":
    main()
