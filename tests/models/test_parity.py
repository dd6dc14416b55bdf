"""Logits equal those of transformers for every family and variant, and through import and export."""

import functools
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.huggingface import load, save
from jaxrl_llm.models.huggingface_config import config_from_folder, read_config

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = sorted((ROOT / "tests" / "golden").glob("logits_*.npz"))


def variants() -> dict:
    """`VARIANTS` and functions of the script that made the golden files."""
    spec = importlib.util.spec_from_file_location(
        "make_golden_logits", ROOT / "tools" / "make_golden_logits.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


@functools.partial(jax.jit, static_argnames="cfg")
def our_logits(params: dict, tokens: jax.Array, cfg: ModelConfig) -> jax.Array:
    return transformer.logits(params, transformer.forward(params, tokens, cfg), cfg)


def test_golden_files_cover_every_variant():
    names = {path.stem.removeprefix("logits_") for path in GOLDEN}
    assert names == set(variants()["VARIANTS"])


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem.removeprefix("logits_"))
def test_logits_equal_golden(path, tmp_path):
    stored = dict(np.load(path))
    config, tokens, expected = (stored.pop(key) for key in ("config", "tokens", "logits"))
    (tmp_path / "config.json").write_text(str(config))
    weights = {name: (bits.astype(np.uint32) << 16).view(np.float32) for name, bits in stored.items()}
    save_file(weights, tmp_path / "model.safetensors")

    cfg = config_from_folder(tmp_path)
    params = load(tmp_path, cfg)
    actual = np.asarray(our_logits(params, jnp.asarray(tokens), cfg))
    assert np.abs(expected).max() > 2  # the weights are no small perturbation of nothing
    assert np.abs(actual - expected).max() <= 1e-4

    # every parameter matters: with one of them neutralised the parity is gone
    blind = [
        jax.tree_util.keystr(where)
        for where, leaf in jax.tree_util.tree_leaves_with_path(params)
        if np.allclose(our_logits(_replaced(params, leaf), jnp.asarray(tokens), cfg), expected, atol=1e-3)
    ]
    assert not blind

    # our own export describes the same model
    save(tmp_path / "again", params, cfg, hf_config=json.loads(str(config)))
    assert config_from_folder(tmp_path / "again") == cfg
    save(tmp_path / "fresh", params, cfg)
    assert config_from_folder(tmp_path / "fresh") == cfg


def _replaced(params, leaf):
    constant = np.full_like(leaf, 1.5 * np.mean(leaf))
    constant = jax.device_put(constant, leaf.sharding)  # laid out alike: no second compilation
    return jax.tree.map(lambda x: constant if x is leaf else x, params)


@pytest.mark.oracle
@pytest.mark.parametrize("variant", sorted(variants()["VARIANTS"]))
def test_live_logits_both_ways(variant, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    tool = variants()
    model, tokens = tool["make_model"](variant, seed=1000), tool["make_tokens"](1000)
    expected = tool["compute_logits"](model, tokens)
    model.save_pretrained(tmp_path / "theirs")
    cfg = config_from_folder(tmp_path / "theirs")
    params = load(tmp_path / "theirs", cfg)
    actual = np.asarray(our_logits(params, jnp.asarray(tokens), cfg))
    assert np.abs(actual - expected).max() <= 1e-4

    for name, hf_config in {"fresh": None, "kept": read_config(tmp_path / "theirs")}.items():
        folder = tmp_path / name
        save(folder, params, cfg, hf_config=hf_config, max_shard_bytes=20_000)
        again, report = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
        )
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        np.testing.assert_array_equal(tool["compute_logits"](again.eval(), tokens), expected)


@pytest.mark.oracle
def test_live_multimodal_gemma3(tmp_path):
    pytest.importorskip("torch")
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tool = variants()
    text = {k: v for k, v in (tool["SIZES"] | tool["VARIANTS"]["gemma3_text"]).items()}
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(image_size=16, patch_size=8)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=66)
    config.boi_token_index, config.eoi_token_index = 64, 65
    config._attn_implementation = "eager"
    model = Gemma3ForConditionalGeneration(config).eval()
    tokens = tool["make_tokens"](0) % 60
    expected = tool["compute_logits"](model, tokens)
    model.save_pretrained(tmp_path)
    cfg = config_from_folder(tmp_path)
    actual = our_logits(load(tmp_path, cfg), jnp.asarray(tokens), cfg)
    assert np.abs(np.asarray(actual) - expected).max() <= 1e-4
