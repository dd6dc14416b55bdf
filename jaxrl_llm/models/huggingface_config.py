"""A Hugging Face config.json to `ModelConfig`, and back."""

import dataclasses
import json
import pathlib
from typing import Any, Literal

from jaxrl_llm.models.config import ModelConfig, Rope
from jaxrl_llm.models.huggingface_diffusion import dream_from_qwen2, llada_from_dict, llada_to_dict, mask_id

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "llada": "LLaDAModelLM",
    "Dream": "DreamModel",
}
"""`model_type` -> the class in transformers, or in LLaDA's and Dream's own code. Of the multimodal 'gemma3',
the text model is read."""

TRANSFORMERS_4 = ("llada", "Dream")
"""Families whose own code reads the spelling of transformers 4."""

ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
LAYER_KINDS = {"full_attention": "global", "sliding_attention": "local"}
ROPE_KEYS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_position",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_position",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}
"""`rope_type` -> its keys in `rope_parameters` and the fields of `Rope` that hold them."""


def read_config(folder: str | pathlib.Path) -> dict[str, Any]:
    """config.json of a folder as it stands, for `huggingface.save(hf_config=...)`.

    Raises:
      FileNotFoundError: no such file.  ValueError: it is no JSON object.
    """
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {folder} is no Hugging Face model folder")
    try:
        config = json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path} is no valid JSON: {e}") from e
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object")
    return config


def config_from_folder(folder: str | pathlib.Path) -> ModelConfig:
    """The architecture of a Hugging Face folder. No weights are read.

    Raises:
      FileNotFoundError: no config.json.
      ValueError: a `model_type` or a feature that the decoder does not have, by name.
    """
    config = read_config(folder)
    try:
        return config_from_dict(config)
    except ValueError as e:
        raise ValueError(f"{pathlib.Path(folder) / 'config.json'}: {e}") from e


def config_from_dict(config: dict[str, Any]) -> ModelConfig:
    """As `config_from_folder`, of the parsed JSON.

    The keys are read through transformers, which knows the defaults of every family and the spellings of
    its own earlier versions.
    """
    from transformers import AutoConfig

    config = text_config(config)
    family = config.get("model_type")
    if family not in ARCHITECTURES:
        raise ValueError(f"model_type {family!r} is not supported; one of {', '.join(ARCHITECTURES)}, gemma3")
    if config.get("quantization_config"):
        raise ValueError("quantization_config: quantised weights are not supported; dequantise them first")
    if family == "llada":
        return llada_from_dict(config)
    dream = family == "Dream"  # Qwen2 but for the mask
    hf = AutoConfig.for_model(
        **json.loads(json.dumps(config | {"model_type": "qwen2"} if dream else config))
    )  # a copy: transformers writes into nested dicts
    if getattr(hf, "use_bidirectional_attention", False):
        raise ValueError("use_bidirectional_attention is not supported: attention is causal")

    activation = getattr(hf, "hidden_activation", None) or hf.hidden_act
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not supported; one of {', '.join(ACTIVATIONS)}")

    window = getattr(hf, "sliding_window", None)
    if family == "mistral":  # has no layer_types: the window holds for every layer
        types = ["sliding_attention" if window else "full_attention"] * hf.num_hidden_layers
    else:
        types = getattr(hf, "layer_types", None) or ["full_attention"] * hf.num_hidden_layers
    for kind in types:
        if kind not in LAYER_KINDS:
            raise ValueError(f"layer type {kind!r} is not supported; one of {', '.join(LAYER_KINDS)}")
    kinds = tuple(LAYER_KINDS[kind] for kind in types)
    has_local = "local" in kinds
    if has_local and dream:
        raise ValueError("use_sliding_window is not supported in a bidirectional model")
    if has_local and not window:
        raise ValueError("layer_types has sliding_attention but sliding_window is not set")

    nested = "full_attention" in hf.rope_parameters
    rope = _rope(hf.rope_parameters["full_attention"] if nested else hf.rope_parameters, hf)
    rope_local = _rope(hf.rope_parameters["sliding_attention"], hf) if nested and has_local else None

    gemma = family.startswith("gemma")
    attention_bias = bool(getattr(hf, "attention_bias", False))
    return ModelConfig(
        family=family,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        intermediate_size=hf.intermediate_size,
        max_position=hf.max_position_embeddings,
        norm_eps=hf.rms_norm_eps,
        norm_plus_one=gemma,
        post_norms=gemma,
        qk_norm=family in ("qwen3", "gemma3_text"),
        qkv_bias=attention_bias or family == "qwen2" or dream,
        out_bias=attention_bias,
        mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        activation=ACTIVATIONS[activation],
        tied_head=bool(hf.tie_word_embeddings),
        embed_scale=gemma,
        query_scale=hf.query_pre_attn_scalar**-0.5 if gemma else None,
        attention_softcap=getattr(hf, "attn_logit_softcapping", None),
        logit_softcap=getattr(hf, "final_logit_softcapping", None),
        window=window if has_local else None,
        layer_kinds=kinds if has_local else (),
        rope=rope,
        rope_local=rope_local,
        causal=not dream,
        mask_id=mask_id(config) if dream else None,
        logits_shift=1 if dream else 0,
    )


def config_to_dict(cfg: ModelConfig) -> dict[str, Any]:
    """config.json for a model of ours, in the spelling of transformers 5 (LLaDA's and Dream's: of 4).

    The special token ids are null, not the family's defaults: the model does not know its tokenizer.

    Raises:
      ValueError: a family that transformers does not have.
    """
    if cfg.family not in ARCHITECTURES:
        raise ValueError(f"family {cfg.family!r} cannot be exported; one of {', '.join(ARCHITECTURES)}")
    if cfg.family == "llada":
        return llada_to_dict(cfg)
    hf_activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[cfg.activation]
    out: dict[str, Any] = {
        "architectures": [ARCHITECTURES[cfg.family]],
        "model_type": cfg.family,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.intermediate_size,
        "max_position_embeddings": cfg.max_position,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied_head,
        "rope_parameters": _rope_to_dict(cfg.rope),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    types = [{"global": "full_attention", "local": "sliding_attention"}[k] for k in cfg.layer_kinds]
    types = types or ["full_attention"] * cfg.num_layers
    if cfg.family.startswith("gemma"):
        out["hidden_activation"] = hf_activation
        scalar = cfg.head_dim if cfg.query_scale is None else cfg.query_scale**-2
        out["query_pre_attn_scalar"] = round(scalar)  # transformers takes an integer; read back and compared
        out["attn_logit_softcapping"] = cfg.attention_softcap
        out["final_logit_softcapping"] = cfg.logit_softcap
    else:
        out["hidden_act"] = hf_activation
    if cfg.family == "mistral":
        out["sliding_window"] = cfg.window if "local" in cfg.layer_kinds else None
    elif cfg.family != "llama":
        out["layer_types"] = types
        out["sliding_window"] = cfg.window
    if cfg.family in ("qwen2", "qwen3", "Dream"):
        out["use_sliding_window"] = cfg.window is not None
    if cfg.family not in ("qwen2", "mistral", "Dream"):
        out["attention_bias"] = cfg.out_bias
    if cfg.family == "llama":
        out["mlp_bias"] = cfg.mlp_bias
    if cfg.family == "gemma3_text":
        local = _rope_to_dict(cfg.rope_local or cfg.rope)
        out["rope_parameters"] = {"full_attention": out["rope_parameters"], "sliding_attention": local}
    return dream_from_qwen2(out, cfg.mask_id) if cfg.family == "Dream" else out


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The decoder's own part of a multimodal Gemma 3 config; any other config as it is."""
    if config.get("model_type") != "gemma3":
        return config
    text = dict(config.get("text_config") or {})
    if "tie_word_embeddings" in config:
        text.setdefault("tie_word_embeddings", config["tie_word_embeddings"])
    return text | {"model_type": "gemma3_text", "architectures": [ARCHITECTURES["gemma3_text"]]}


def _rope(parameters: dict[str, Any], hf: Any) -> Rope:
    """`rope_parameters` of one kind of layer -> `Rope`."""
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_KEYS:
        raise ValueError(f"rope_type {kind!r} is not supported; one of {', '.join(ROPE_KEYS)}")
    if parameters.get("type", kind) != kind:
        raise ValueError(f"rope has type {parameters['type']!r} but transformers reads rope_type {kind!r}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not supported: the whole head is rotated")
    if not parameters.get("truncate", True):
        raise ValueError("rope truncate=false is not supported")
    fields = {
        ours: parameters[key] for key, ours in ROPE_KEYS[kind].items() if parameters.get(key) is not None
    }
    if kind == "yarn":
        fields.setdefault(
            "factor", hf.max_position_embeddings / parameters["original_max_position_embeddings"]
        )
        if "attention_factor" not in fields and parameters.get("mscale") and parameters.get("mscale_all_dim"):
            raise ValueError("yarn with mscale and mscale_all_dim is not supported; give attention_factor")
    return Rope(theta=parameters["rope_theta"], kind=kind, **fields)


def _rope_to_dict(rope: Rope) -> dict[str, Any]:
    values = {key: getattr(rope, ours) for key, ours in ROPE_KEYS[rope.kind].items()}
    known = {key: value for key, value in values.items() if value is not None}
    return {"rope_type": rope.kind, "rope_theta": rope.theta, **known}


def check_describes(config: dict[str, Any], cfg: ModelConfig) -> None:
    """Raises unless config.json, read back, is `cfg`: then what transformers builds from it is our model.

    Raises:
      ValueError: naming each field that differs, with both values.
    """
    there, here = (dataclasses.asdict(_normal(c)) for c in (config_from_dict(config), cfg))
    differ = [
        f"{key} is {there[key]!r} there and {here[key]!r} here" for key in here if there[key] != here[key]
    ]
    if differ:
        raise ValueError(
            f"a config.json of model_type {config.get('model_type')!r} does not describe this model: "
            + "; ".join(differ)
        )


def _normal(cfg: ModelConfig) -> ModelConfig:
    """The same model with every default spelt out."""
    has_local = "local" in cfg.layer_kinds
    rope_local = cfg.rope if cfg.rope_local is None else cfg.rope_local
    return dataclasses.replace(
        cfg,
        query_scale=cfg.head_dim**-0.5 if cfg.query_scale is None else cfg.query_scale,
        window=cfg.window if has_local else None,
        layer_kinds=cfg.layer_kinds or ("global",) * cfg.num_layers,
        rope_local=rope_local if has_local else None,
    )
