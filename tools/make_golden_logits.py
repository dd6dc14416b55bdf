"""Makes tests/golden/logits_<variant>.npz: tiny random checkpoints and their logits by transformers.

    pip install torch transformers && python tools/make_golden_logits.py

Each file holds a config, weights rounded to bfloat16 (as their 16 bits), tokens, and the float32 logits
that transformers computes from them, so that the parity tests need no torch.

LLaDA and Dream are not in transformers. Their layers are those of Llama and Qwen2, which compute the logits
here with every key visible; what is stored has the config.json and the tensor names of the published
checkpoints. Of those variants some tokens are the mask token, the second row ends in padding, hidden from all
queries, and `lengths` says where.
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

MASK, LENGTHS = 65, (40, 29)
"""The mask token of the bidirectional variants, and the lengths of their two rows."""

LLADA = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_dropout": 0.0,
    "embedding_size": 67,
    "eos_token_id": 64,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": MASK,
    "max_sequence_length": 256,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 3,
    "pad_token_id": 64,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500_000.0,
    "scale_logits": False,
    "use_cache": False,
    "vocab_size": 67,
    "weight_tying": False,
}
DREAM = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 64,
    "eos_token_id": 64,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "mask_token_id": MASK,
    "max_position_embeddings": 256,
    "max_window_layers": 3,
    "model_type": "Dream",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 64,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1_000_000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 67,
}
GROUPED_TIED = {"n_kv_heads": 2, "weight_tying": True, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0}
LLADA_ROPE, DREAM_ROPE = ({"rope_type": "default", "rope_theta": theta} for theta in (5e5, 1e6))

BIDIRECTIONAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llada": (
        LLADA,
        {
            "model_type": "llama",
            "head_dim": 8,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-5,
            "rope_parameters": LLADA_ROPE,
        },
    ),
    "llada_grouped_tied": (
        LLADA | GROUPED_TIED,
        {"model_type": "llama", "head_dim": 8, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
    ),
    "dream": (
        DREAM,
        {"model_type": "qwen2", "head_dim": None, "rms_norm_eps": 1e-6, "rope_parameters": DREAM_ROPE},
    ),
}
"""Name -> config.json as published, in small, and the model of transformers with the same layers."""

LLADA_NAMES = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
    "model.layers": "model.transformer.blocks",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.o_proj": "attn_out",
    "self_attn.": "",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
"""Parts of Llama's tensor names, replaced one after the other."""


def make_model(variant: str, seed: int) -> Any:
    """A transformers model with random weights, large enough that every part shows in the logits.

    Matrices have standard deviation 1.5/sqrt(inputs); norms are spread around their neutral value.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    changes = VARIANTS[variant] if variant in VARIANTS else BIDIRECTIONAL[variant][1]
    settings = {k: v for k, v in (SIZES | changes).items() if k != "head_dim" or v is not None}
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


def make_masked_tokens(seed: int) -> np.ndarray:
    """i64[2, 40] random tokens, half of them masked; padding is 0."""
    rng = np.random.default_rng(seed)
    tokens = np.where(rng.random((2, 40)) < 0.5, MASK, rng.integers(0, MASK, (2, 40)))
    return np.where(np.arange(40) < np.array(LENGTHS)[:, None], tokens, 0)


def compute_logits(model: Any, tokens: np.ndarray, lengths: Any = None) -> np.ndarray:
    """f32[N, T, V] of a transformers model; given `lengths`, every query sees all keys before a row's end."""
    import torch

    mask = None
    if lengths is not None:
        hidden = np.arange(tokens.shape[1]) >= np.array(lengths)[:, None, None, None]
        mask = torch.zeros(len(tokens), 1, tokens.shape[1], tokens.shape[1])
        mask = mask.masked_fill(torch.from_numpy(hidden), torch.finfo(torch.float32).min)
    with torch.no_grad():
        return model(torch.from_numpy(tokens), attention_mask=mask).logits.float().numpy()


def state_dict(model: Any) -> dict[str, np.ndarray]:
    """Weights as float32 by name, those of a tied head left out."""
    import torch

    assert isinstance(model, torch.nn.Module)
    return {name: weight.detach().numpy() for name, weight in model.named_parameters()}


def published_name(variant: str, name: str) -> str:
    """What the checkpoint of a bidirectional variant calls a tensor of the model that stands in for it."""
    if variant.startswith("llada"):
        for theirs, published in LLADA_NAMES.items():
            name = name.replace(theirs, published)
    return name


def make_golden(variant: str, seed: int) -> dict[str, Any]:
    """The arrays of a variant's file but for the weights, and the weights as float32 under 'weights'."""
    model = make_model(variant, seed)
    weights = {published_name(variant, name): weight for name, weight in state_dict(model).items()}
    if variant in VARIANTS:
        config, tokens, lengths = model.config.to_dict(), make_tokens(seed), {}
        logits = compute_logits(model, tokens)
    else:
        config, tokens = BIDIRECTIONAL[variant][0], make_masked_tokens(seed)
        lengths = {"lengths": np.array(LENGTHS, np.int32)}
        logits = compute_logits(model, tokens, LENGTHS)
    arrays = {"config": json.dumps(config), "tokens": tokens.astype(np.int32), "logits": logits, **lengths}
    return arrays | {"weights": weights}


def main() -> None:
    """Writes one file per variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = pathlib.Path(__file__).parents[1] / "tests" / "golden"
    parser.add_argument("--out", type=pathlib.Path, default=default)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for seed, variant in enumerate([*VARIANTS, *BIDIRECTIONAL]):
        arrays = make_golden(variant, seed)
        bits = {k: (w.view(np.uint32) >> 16).astype(np.uint16) for k, w in arrays.pop("weights").items()}
        path = args.out / f"logits_{variant}.npz"
        np.savez_compressed(path, **arrays, **bits)
        top = np.abs(arrays["logits"]).max()
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB, logits up to {top:.1f}")


if __name__ == "__main__":
    main()
