"""config.json of the masked-diffusion families, which transformers does not have: LLaDA and Dream.

Their modeling code lies in their own repositories and reads the spelling of transformers 4. LLaDA's config
class has GPT-2's defaults, so every key that shapes the model must be written out.
"""

import json
import pathlib
from typing import Any, NamedTuple

from jaxrl_llm.models.config import ModelConfig, Rope

LLADA_KEYS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_layers",
    "n_heads": "num_heads",
    "n_kv_heads": "num_kv_heads",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position",
    "rms_norm_eps": "norm_eps",
    "include_qkv_bias": "qkv_bias",
    "weight_tying": "tied_head",
    "mask_token_id": "mask_id",
}
"""LLaDA's keys and the fields of `ModelConfig` that hold them."""

LLADA_FIXED: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "include_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "multi_query_attention": None,
    "rope": True,
    "rope_full_precision": True,
    "scale_logits": False,
}
"""LLaDA's switches and the one position of each that is supported: that of LLaDA-8B (Base, Instruct, 1.5)."""

LLADA_WRITTEN = {
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "residual_dropout": 0.0,
    "flash_attention": False,
    "use_cache": False,
    "eos_token_id": None,
    "pad_token_id": None,
}
"""Keys that are written as well, because the defaults of LLaDA's config class are others."""

LLADA_NAMES: dict[str, tuple[str, int | None]] = {
    "embed": ("model.transformer.wte.weight", None),
    "head": ("model.transformer.ff_out.weight", None),
    "final_norm": ("model.transformer.ln_f.weight", 0),
    "layers/attn_norm": ("model.transformer.blocks.{}.attn_norm.weight", 0),
    "layers/q": ("model.transformer.blocks.{}.q_proj.weight", 1),
    "layers/k": ("model.transformer.blocks.{}.k_proj.weight", 1),
    "layers/v": ("model.transformer.blocks.{}.v_proj.weight", 1),
    "layers/o": ("model.transformer.blocks.{}.attn_out.weight", 2),
    "layers/q_bias": ("model.transformer.blocks.{}.q_proj.bias", 0),
    "layers/k_bias": ("model.transformer.blocks.{}.k_proj.bias", 0),
    "layers/v_bias": ("model.transformer.blocks.{}.v_proj.bias", 0),
    "layers/mlp_norm": ("model.transformer.blocks.{}.ff_norm.weight", 0),
    "layers/gate": ("model.transformer.blocks.{}.ff_proj.weight", 1),
    "layers/up": ("model.transformer.blocks.{}.up_proj.weight", 1),
    "layers/down": ("model.transformer.blocks.{}.ff_out.weight", 1),
}
"""As `huggingface_names.TABLE`."""

END_OF_TURN = {"llada": "<|eot_id|>", "Dream": "<|im_end|>"}
"""What ends a message in the family's chat template."""


class SpecialIds(NamedTuple):
    """Token ids that decoding treats apart. None = the folder names none.

    Attributes:
      mask: stands for what is to be predicted.
      eos: ends a text.
      eot: ends a message of a conversation.
    """

    mask: int
    eos: int | None
    eot: int | None


def special_ids(folder: str | pathlib.Path) -> SpecialIds:
    """Of a LLaDA or Dream folder: `mask_token_id`, `eos_token_id` and `eot_token_id` of config.json.

    The published ones have no `eot_token_id`; there it is the id of `END_OF_TURN` among the added tokens of
    tokenizer_config.json or tokenizer.json.

    Raises:
      FileNotFoundError: no config.json.
      ValueError: another family, or no mask token.
    """
    folder = pathlib.Path(folder)
    config = json.loads((folder / "config.json").read_text())
    family = config.get("model_type")
    if family not in END_OF_TURN:
        raise ValueError(f"{folder} is no masked-diffusion model: model_type {family!r}, not llada or Dream")
    eot = config.get("eot_token_id")
    if eot is None:
        eot = _added_tokens(folder).get(END_OF_TURN[family])
    return SpecialIds(mask_id(config), config.get("eos_token_id"), eot)


def mask_id(config: dict[str, Any]) -> int:
    """`mask_token_id`. Raises ValueError where there is none: nothing could be denoised."""
    mask = config.get("mask_token_id")
    if mask is None:
        raise ValueError("mask_token_id is not set: a masked-diffusion model needs the id of its mask token")
    return int(mask)


def llada_from_dict(config: dict[str, Any]) -> ModelConfig:
    """A LLaDA config.json, parsed.

    Raises:
      ValueError: naming a key that is missing, or a switch in a position that is not supported.
    """
    mask_id(config)
    needed = [*LLADA_KEYS, *LLADA_FIXED, "rope_theta", "embedding_size"]
    missing = [key for key in needed if key not in config]
    if missing:
        raise ValueError(
            f"a llada config.json needs every key that shapes the model; missing: {', '.join(missing)}"
        )
    fixed = LLADA_FIXED | {"embedding_size": config["vocab_size"], "rope_scaling": None}
    for key, value in fixed.items():
        if (config.get(key) or None) != (value or None):  # null and false are the same
            raise ValueError(f"{key}={config[key]!r} is not supported; only {value!r}")
    fields = {ours: config[theirs] for theirs, ours in LLADA_KEYS.items()}
    if fields["num_kv_heads"] is None:
        fields["num_kv_heads"] = fields["num_heads"]
    if config["d_model"] % config["n_heads"]:
        raise ValueError(f"d_model={config['d_model']} is no multiple of n_heads={config['n_heads']}")
    return ModelConfig(
        **fields,
        family="llada",
        head_dim=config["d_model"] // config["n_heads"],
        qk_norm=False,
        rope=Rope(theta=config["rope_theta"]),
        causal=False,
    )


def llada_to_dict(cfg: ModelConfig) -> dict[str, Any]:
    """A LLaDA config.json. `huggingface_config.check_describes` says whether it can describe `cfg`."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        **{theirs: getattr(cfg, ours) for theirs, ours in LLADA_KEYS.items()},
        **LLADA_FIXED,
        **LLADA_WRITTEN,
        "rope_theta": cfg.rope.theta,
        "embedding_size": cfg.vocab_size,
    }


def dream_from_qwen2(qwen2: dict[str, Any], mask: int | None) -> dict[str, Any]:
    """Dream's config.json from that of a Qwen2 of the same shape, in the spelling of transformers 5."""
    rope = dict(qwen2["rope_parameters"])
    theta = rope.pop("rope_theta")
    left_out = ("rope_parameters", "head_dim", "layer_types")  # Dream's code does not read them
    return {key: value for key, value in qwen2.items() if key not in left_out} | {
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "max_window_layers": qwen2["num_hidden_layers"],
        "mask_token_id": mask,
    }


def _added_tokens(folder: pathlib.Path) -> dict[str, int]:
    """Special tokens that the tokenizer's files list, by their text."""
    found: dict[str, int] = {}
    file = folder / "tokenizer.json"
    if file.is_file():
        found |= {token["content"]: token["id"] for token in json.loads(file.read_text())["added_tokens"]}
    file = folder / "tokenizer_config.json"
    if file.is_file():
        listed = json.loads(file.read_text()).get("added_tokens_decoder", {})
        found |= {token["content"]: int(number) for number, token in listed.items()}
    return found
