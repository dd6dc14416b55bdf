"""Logits equal those of transformers for every family and variant, and through import and export."""

import functools
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.huggingface import load, save
from jaxrl_llm.models.huggingface_config import config_from_folder, read_config

ROOT = pathlib.Path(__file__).parents[2]
NOT_THE_SHAPE = {
    *("alibi_bias_max", "attention_layer_norm_with_affine", "mlp_ratio", "precision"),
    *("init_cutoff_factor", "init_device", "init_fn", "init_std"),  # LLaDA's
    *("initializer_range", "attention_dropout", "use_cache"),  # Dream's
}
"""Keys of the published configs that change no logit while the switches that we write have their values."""
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
def our_logits(params: dict, tokens: jax.Array, cfg: ModelConfig, segment_ids=None) -> jax.Array:
    hidden = transformer.forward(params, tokens, cfg, segment_ids=segment_ids)
    return transformer.logits(params, hidden, cfg)


def real_tokens(stored: dict, tokens: np.ndarray) -> np.ndarray:
    """bool[N, T]; rows of bidirectional variants say how long they are."""
    return np.arange(tokens.shape[1]) < stored.pop("lengths", np.full(len(tokens), tokens.shape[1]))[:, None]


def test_golden_files_cover_every_variant():
    names = {path.stem.removeprefix("logits_") for path in GOLDEN}
    assert names == {*variants()["VARIANTS"], *variants()["BIDIRECTIONAL"]}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem.removeprefix("logits_"))
def test_logits_equal_golden(path, tmp_path):
    stored = dict(np.load(path))
    config, tokens, expected = (stored.pop(key) for key in ("config", "tokens", "logits"))
    real = real_tokens(stored, tokens)
    (tmp_path / "config.json").write_text(str(config))
    weights = {name: (bits.astype(np.uint32) << 16).view(np.float32) for name, bits in stored.items()}
    save_file(weights, tmp_path / "model.safetensors")

    cfg = config_from_folder(tmp_path)
    params = load(tmp_path, cfg)
    arguments = jnp.asarray(tokens), cfg, None if cfg.causal else jnp.asarray(real, jnp.int32)
    actual = np.asarray(our_logits(params, *arguments))
    expected = expected[real]
    assert np.abs(expected).max() > 2  # the weights are no small perturbation of nothing
    assert np.abs(actual[real] - expected).max() <= 1e-4

    # every parameter matters: with one of them neutralised the parity is gone
    blind = [
        jax.tree_util.keystr(where)
        for where, leaf in jax.tree_util.tree_leaves_with_path(params)
        if np.allclose(np.asarray(our_logits(_replaced(params, leaf), *arguments))[real], expected, atol=1e-3)
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


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_export_gives_the_published_tensors_again(name, tmp_path):
    """Names, shapes and bits, where transformers cannot load what we write."""
    stored = dict(np.load(ROOT / "tests" / "golden" / f"logits_{name}.npz"))
    config, *_ = (stored.pop(key) for key in ("config", "tokens", "logits", "lengths"))
    weights = {name: (bits.astype(np.uint32) << 16).view(np.float32) for name, bits in stored.items()}
    (tmp_path / "config.json").write_text(str(config))
    save_file(weights, tmp_path / "model.safetensors")
    cfg = config_from_folder(tmp_path)
    save(tmp_path / "again", load(tmp_path, cfg), cfg, hf_config=read_config(tmp_path))
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == weights.keys()
    for key, weight in weights.items():
        np.testing.assert_array_equal(again[key], weight, key)
    assert read_config(tmp_path / "again") == json.loads(str(config)) | {"torch_dtype": "float32"}
    save(tmp_path / "fresh", load(tmp_path, cfg), cfg)
    shape = read_config(tmp_path / "fresh")
    ids = {"eos_token_id", "pad_token_id", "bos_token_id", "torch_dtype"}
    same = {key for key, value in json.loads(str(config)).items() if shape.get(key, "absent") == value}
    assert json.loads(str(config)).keys() - same - ids <= NOT_THE_SHAPE
    assert not shape.keys() - same - ids


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
@pytest.mark.parametrize("variant", sorted(variants()["BIDIRECTIONAL"]))
def test_live_bidirectional_logits(variant, tmp_path):
    pytest.importorskip("torch")
    golden = variants()["make_golden"](variant, seed=1000)
    tokens, expected = golden["tokens"], golden["logits"]
    real = real_tokens(golden, tokens)
    (tmp_path / "config.json").write_text(golden["config"])
    save_file(golden["weights"], tmp_path / "model.safetensors")
    cfg = config_from_folder(tmp_path)
    actual = our_logits(load(tmp_path, cfg), jnp.asarray(tokens), cfg, jnp.asarray(real, jnp.int32))
    assert np.abs(np.asarray(actual) - expected)[real].max() <= 1e-4


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
