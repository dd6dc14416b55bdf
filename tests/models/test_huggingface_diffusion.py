"""Configs, tensors and special tokens of LLaDA and Dream folders: what is read, what is refused by name."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl_llm.models.config import ModelConfig, Rope
from jaxrl_llm.models.huggingface import load, save
from jaxrl_llm.models.huggingface_config import config_from_dict, config_from_folder, config_to_dict
from jaxrl_llm.models.huggingface_diffusion import LLADA_FIXED, SpecialIds, special_ids
from jaxrl_llm.models.params import count, map_specs
from jaxrl_llm.models.transformer import param_specs

LLADA_8B = ModelConfig(
    family="llada",
    vocab_size=126_464,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_size=12_288,
    max_position=4096,
    norm_eps=1e-5,
    qk_norm=False,
    tied_head=False,
    rope=Rope(500_000.0),
    causal=False,
    mask_id=126_336,
)
DREAM_7B = ModelConfig(
    family="Dream",
    vocab_size=152_064,
    hidden_size=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    intermediate_size=18_944,
    max_position=131_072,
    qk_norm=False,
    qkv_bias=True,
    tied_head=False,
    rope=Rope(1e6),
    causal=False,
    mask_id=151_666,
    logits_shift=1,
)
SMALL = dict(vocab_size=48, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4)
LLADA = dataclasses.replace(LLADA_8B, **SMALL, intermediate_size=20, mask_id=47)
DREAM = dataclasses.replace(DREAM_7B, **SMALL, intermediate_size=20, mask_id=47)


@pytest.mark.parametrize(
    "cfg,parameters", [(LLADA_8B, 8_015_581_184), (DREAM_7B, 7_615_616_512)], ids=["llada", "dream"]
)
def test_published_sizes(cfg, parameters):
    assert count(param_specs(cfg)) == parameters
    assert config_from_dict(config_to_dict(cfg)) == cfg


@pytest.mark.parametrize("key", LLADA_FIXED)
def test_llada_switches_are_supported_in_one_position(key):
    config = config_to_dict(LLADA)
    other = {"block_type": "sequential", "block_group_size": 4, "activation_type": "swiglu"}
    value = other.get(key, "default" if key == "layer_norm_type" else not config[key])
    with pytest.raises(ValueError, match=rf"^{key}={value!r} is not supported; only {config[key]!r}"):
        config_from_dict(config | {key: value})
    del config[key]
    with pytest.raises(ValueError, match=rf"needs every key that shapes the model; missing: {key}$"):
        config_from_dict(config)


REFUSED = {
    "rope_scaling": (LLADA, {"rope_scaling": {"type": "linear"}}, r"rope_scaling=.* is not supported"),
    "rows": (LLADA, {"embedding_size": 64}, r"embedding_size=64 is not supported; only 48"),
    "heads": (LLADA, {"n_heads": 3}, r"d_model=16 is no multiple of n_heads=3"),
    "llada_mask": (LLADA, {"mask_token_id": None}, "mask_token_id is not set"),
    "dream_mask": (DREAM, {"mask_token_id": None}, "mask_token_id is not set"),
    "outside": (DREAM, {"mask_token_id": 48}, "mask_id=48 is outside the vocabulary of 48"),
    "window": (
        DREAM,
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "use_sliding_window is not supported in a bidirectional model",
    ),
    "activation": (DREAM, {"hidden_act": "relu"}, "'relu' .* silu"),
}


@pytest.mark.parametrize("cfg,changes,message", REFUSED.values(), ids=REFUSED)
def test_unsupported_features_are_named(tmp_path, cfg, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(cfg) | changes))
    with pytest.raises(ValueError, match=message) as e:
        config_from_folder(tmp_path)
    assert str(tmp_path / "config.json") in str(e.value)


def test_spellings():
    config = config_to_dict(LLADA)
    assert config_from_dict(config | {"n_kv_heads": None}).num_kv_heads == 4
    assert config_from_dict(config | {"multi_query_attention": False, "alibi": None}) == LLADA
    biases = config_from_dict(config | {"include_qkv_bias": True, "weight_tying": True})
    assert biases == dataclasses.replace(LLADA, qkv_bias=True, tied_head=True)
    yarn = Rope(1e6, "yarn", factor=4.0, original_max_position=64)
    scaled = config_to_dict(dataclasses.replace(DREAM, rope=yarn))
    assert scaled["rope_theta"] == 1e6 and scaled["rope_scaling"]["rope_type"] == "yarn"
    assert config_from_dict(scaled).rope == yarn


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(rope=Rope(1e4, "linear", 2.0)), "rope is .*default.* there and .*linear.* here"),
        (dict(qk_norm=True), "qk_norm is False there and True here"),
        (dict(head_dim=6), "head_dim is 4 there and 6 here"),
        (dict(causal=True, mask_id=None), "mask_token_id is not set"),
        (dict(logits_shift=1), "logits_shift is 0 there and 1 here"),
    ],
    ids=["rope", "qk_norm", "head_dim", "causal", "shift"],
)
def test_export_refuses_what_llada_cannot_be(tmp_path, changes, message):
    cfg = dataclasses.replace(LLADA, **changes)
    params = map_specs(lambda s: np.zeros(s.shape, np.float32), param_specs(cfg))
    with pytest.raises(ValueError, match=message):
        save(tmp_path, params, cfg)
    assert not list(tmp_path.iterdir())


NORM, HEAD = "model.transformer.blocks.1.ff_norm.weight", "model.transformer.ff_out.weight"


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda s: s.pop(NORM), f"lacks {NORM}"),
        (lambda s: s.pop(HEAD), f"lacks {HEAD}"),
        (lambda s: s.update({"model.transformer.wpe.weight": s[HEAD]}), "uses model.transformer.wpe.weight"),
        (
            lambda s: s.update({"model.transformer.blocks.0.q_norm.weight": s[NORM]}),
            r"uses model.transformer.blocks.0.q_norm.weight \(in model.safetensors\)",
        ),
        (lambda s: s.update({HEAD: s[HEAD][:-1]}), r"shape \(47, 16\); the config says \(48, 16\)"),
    ],
    ids=["norm", "head", "positions", "q_norm", "rows"],
)
def test_strict_import(tmp_path, change, message):
    params = map_specs(lambda s: np.ones(s.shape, np.float32), param_specs(LLADA))
    save(tmp_path, params, LLADA)
    stored = load_file(tmp_path / "model.safetensors")
    change(stored)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path, LLADA)


def test_tied_head_that_is_stored_as_well(tmp_path):
    cfg = dataclasses.replace(LLADA, tied_head=True)
    params = map_specs(lambda s: np.ones(s.shape, np.float32), param_specs(cfg))
    save(tmp_path, params, cfg)
    stored = load_file(tmp_path / "model.safetensors")
    embed = stored["model.transformer.wte.weight"]
    save_file(stored | {HEAD: embed}, tmp_path / "model.safetensors")
    assert "head" not in load(tmp_path, cfg)
    save_file(stored | {HEAD: embed + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{HEAD} in .* differs from model.transformer.wte.weight"):
        load(tmp_path, cfg)


def test_special_ids(tmp_path):
    config = config_to_dict(LLADA) | {"eos_token_id": 40}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert special_ids(tmp_path) == SpecialIds(mask=47, eos=40, eot=None)
    added = [{"id": 40, "content": "<|endoftext|>"}, {"id": 44, "content": "<|eot_id|>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert special_ids(tmp_path).eot == 44
    (tmp_path / "config.json").write_text(json.dumps(config | {"eot_token_id": 45}))
    assert special_ids(tmp_path).eot == 45
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(DREAM) | {"eos_token_id": 40}))
    decoder = {"41": {"content": "<|im_end|>"}, "44": {"content": "<|eot_id|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    assert special_ids(tmp_path) == SpecialIds(mask=47, eos=40, eot=41)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type 'llama', not llada or Dream"):
        special_ids(tmp_path)
