"""Import and export of Hugging Face folders: exact both ways, strict both ways, local slices only."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxrl_llm.models import huggingface
from jaxrl_llm.models.config import ModelConfig, Rope
from jaxrl_llm.models.huggingface import load, save
from jaxrl_llm.models.huggingface_config import (
    config_from_dict,
    config_from_folder,
    config_to_dict,
    read_config,
)
from jaxrl_llm.models.params import map_specs
from jaxrl_llm.models.transformer import param_specs
from jaxrl_llm.parallel.sharding import ShardingRules, make_mesh, shardings

CFG = ModelConfig(vocab_size=48, hidden_size=16, num_layers=3, num_heads=4, head_dim=6, intermediate_size=20)
BIASES = dataclasses.replace(
    CFG, family="llama", qk_norm=False, qkv_bias=True, out_bias=True, mlp_bias=True, tied_head=False
)
GEMMA = dataclasses.replace(
    CFG,
    family="gemma2",
    qk_norm=False,
    norm_plus_one=True,
    post_norms=True,
    activation="gelu_tanh",
    embed_scale=True,
    query_scale=9**-0.5,
    attention_softcap=50.0,
    window=8,
    layer_kinds=("local", "global", "local"),
)
LLADA = dataclasses.replace(
    CFG, family="llada", head_dim=4, qk_norm=False, tied_head=False, causal=False, mask_id=47
)
DREAM = dataclasses.replace(LLADA, family="Dream", qkv_bias=True, logits_shift=1)


ROUND_TRIPS = ["tied", "biases_untied", "gemma", "llada", "dream"]


def random_params(cfg, dtype=jnp.float32):
    """Random in every leaf: norms and biases too."""
    rng = np.random.default_rng(0)
    return map_specs(lambda s: jnp.asarray(rng.normal(size=s.shape).astype(dtype)), param_specs(cfg))


def assert_same(one, other):
    for (path, x), (_, y) in zip(*map(jax.tree_util.tree_leaves_with_path, (one, other)), strict=True):
        assert x.dtype == y.dtype, path
        bits = f"u{x.dtype.itemsize}"
        np.testing.assert_array_equal(np.asarray(x).view(bits), np.asarray(y).view(bits), str(path))


@pytest.mark.parametrize("cfg", [CFG, BIASES, GEMMA, LLADA, DREAM], ids=ROUND_TRIPS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("max_shard_bytes", [2**30, 3000], ids=["one_file", "sharded"])
def test_round_trip_is_exact(tmp_path, cfg, dtype, max_shard_bytes):
    params = random_params(cfg, dtype)
    save(tmp_path, params, cfg, max_shard_bytes=max_shard_bytes)
    assert config_from_folder(tmp_path) == cfg
    assert_same(load(tmp_path, cfg, dtype=dtype), params)

    files = sorted(tmp_path.glob("*.safetensors"))
    if max_shard_bytes == 3000:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert len(files) > 3 and set(index["weight_map"].values()) == {f.name for f in files}
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
        for file in files:  # a file passes the limit only if it holds a single tensor
            with safe_open(file, "numpy") as handle:
                held = list(handle.keys())
            assert file.stat().st_size < 3000 + 2000 or len(held) == 1
    else:
        assert [f.name for f in files] == ["model.safetensors"]
    dtype_key = "dtype" if cfg.causal else "torch_dtype"  # what their own code, of transformers 4, reads
    assert read_config(tmp_path)[dtype_key] == np.dtype(dtype).name


def test_layout_is_the_transpose_by_head(tmp_path):
    params = random_params(BIASES)
    save(tmp_path, params, BIASES)
    stored = load_file(tmp_path / "model.safetensors")
    heads, width = BIASES.num_heads, BIASES.head_dim
    for layer in range(BIASES.num_layers):
        q, o = (stored[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qo")
        for head in range(heads):
            rows = slice(head * width, (head + 1) * width)
            np.testing.assert_array_equal(q[rows], params["layers"]["q"][layer, :, head].T)
            np.testing.assert_array_equal(o[:, rows], params["layers"]["o"][layer, head].T)
    np.testing.assert_array_equal(stored["lm_head.weight"], params["head"])


def test_casts_on_the_way(tmp_path):
    params = random_params(CFG)
    save(tmp_path, params, CFG, dtype=jnp.bfloat16)
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert_same(load(tmp_path, CFG, dtype=jnp.bfloat16), halved)
    assert_same(load(tmp_path, CFG), jax.tree.map(lambda x: x.astype(jnp.float32), halved))


@pytest.mark.parametrize("cfg", [CFG, BIASES, GEMMA], ids=["tied", "biases_untied", "gemma"])
def test_sharded_import_reads_only_local_slices(tmp_path, monkeypatch, cfg):
    params = random_params(cfg)
    save(tmp_path, params, cfg, max_shard_bytes=4000)
    read = []

    class View:
        def __init__(self, view):
            self.view = view

        def __getitem__(self, index):
            out = self.view[index]
            read.append(out.nbytes)
            return out

        def __getattr__(self, name):
            return getattr(self.view, name)

    class Handle:
        def __init__(self, *args, **kwargs):
            self.handle = safe_open(*args, **kwargs)

        def __enter__(self):
            self.handle.__enter__()
            return self

        def __exit__(self, *args):
            return self.handle.__exit__(*args)

        def keys(self):
            return self.handle.keys()

        def get_slice(self, name):
            return View(self.handle.get_slice(name))

    monkeypatch.setattr(huggingface, "safe_open", Handle)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    where = shardings(param_specs(cfg), mesh, ShardingRules())
    sharded = load(tmp_path, cfg, shardings=where)
    assert_same(sharded, params)
    assert jax.tree.map(lambda x: x.sharding, sharded) == where
    # the two data-parallel copies share one read, and the slices add up to the whole
    assert sum(read) == sum(x.nbytes for x in jax.tree.leaves(params))

    # one process of two: only the devices of the first tensor piece ask
    read.clear()
    specs, mine = huggingface.by_path(param_specs(cfg)), set(mesh.devices[:, :, 0].flat)

    def only_mine(shape, sharding, callback):
        indices = sharding.devices_indices_map(shape)
        return [callback(indices[device]) for device in mine]

    monkeypatch.setattr(jax, "make_array_from_callback", only_mine)
    load(tmp_path, cfg, shardings=where)
    replicated = sum(
        np.prod(spec.shape) * 4
        for path, spec in specs.items()
        if "tensor" not in str(huggingface.by_path(where)[path].spec)
    )
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    assert sum(read) == replicated + (total - replicated) // 2


def test_sharded_export_equals_plain(tmp_path):
    params = random_params(GEMMA, jnp.bfloat16)
    mesh = make_mesh(fsdp=2, tensor=2)
    sharded = jax.device_put(params, shardings(param_specs(GEMMA), mesh, ShardingRules()))
    save(tmp_path / "plain", params, GEMMA)
    save(tmp_path / "sharded", sharded, GEMMA)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "sharded" / name).read_bytes()


def rewrite(folder, change):
    file = folder / "model.safetensors"
    stored = load_file(file)
    change(stored)
    save_file(stored, file)


NORM, GATE = "model.layers.1.self_attn.q_norm.weight", "model.layers.2.mlp.gate_proj.weight"
EMBED = "model.embed_tokens.weight"
BROKEN = {
    "unset": (lambda s: s.pop(NORM), f"lacks {NORM}"),
    "unused": (lambda s: s.update({"model.layers.3.extra": s[NORM]}), "uses model.layers.3.extra"),
    "shape": (lambda s: s.update({GATE: s[GATE].T.copy()}), rf"{GATE}.*shape \(16, 20\).*\(20, 16\)"),
    "dtype": (lambda s: s.update({GATE: s[GATE].astype(np.int8)}), f"{GATE}.* is I8"),
    "renamed": (lambda s: s.update({"extra": s.pop(NORM)}), f"lacks {NORM}; nothing uses extra"),
    "head": (lambda s: s.update({"lm_head.weight": s[EMBED] + 1}), "lm_head.weight.* differs from"),
}


@pytest.mark.parametrize("change,message", BROKEN.values(), ids=BROKEN)
def test_strict_import(tmp_path, change, message):
    save(tmp_path, random_params(CFG), CFG)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message) as e:
        load(tmp_path, CFG)
    assert str(tmp_path) in str(e.value)


def test_tied_head_that_is_stored_as_well_is_accepted(tmp_path):
    params = random_params(CFG)
    save(tmp_path, params, CFG)
    rewrite(tmp_path, lambda s: s.update({"lm_head.weight": s[EMBED]}))
    assert_same(load(tmp_path, CFG), params)


def test_vision_tower_of_a_multimodal_checkpoint_is_left_out(tmp_path):
    cfg = dataclasses.replace(
        GEMMA, family="gemma3_text", qk_norm=True, attention_softcap=None, rope_local=Rope(5_000.0)
    )
    params = random_params(cfg)
    save(tmp_path, params, cfg)

    def change(stored):
        for name in list(stored):
            stored[f"language_model.{name}"] = stored.pop(name)
        stored["vision_tower.patch.weight"] = np.zeros(3, np.float32)

    rewrite(tmp_path, change)
    text = read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    assert config_from_folder(tmp_path) == cfg
    assert_same(load(tmp_path, cfg), params)
    save(tmp_path / "text", params, cfg, hf_config=read_config(tmp_path))
    assert read_config(tmp_path / "text")["architectures"] == ["Gemma3ForCausalLM"]
    with pytest.raises(ValueError, match=r"lacks model\.embed.*uses language_model\.model"):
        load(tmp_path, GEMMA)
    rewrite(tmp_path, lambda s: s.update({"model.norm.weight": s["language_model.model.norm.weight"]}))
    with pytest.raises(ValueError, match=r"norm\.weight of .* is stored twice; also in .*model\.safetensors"):
        load(tmp_path, cfg)


def test_broken_files(tmp_path):
    params = random_params(CFG)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        config_from_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere", CFG)

    save(tmp_path, params, CFG, max_shard_bytes=4000)
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{second.name} is truncated"):
        load(tmp_path, CFG)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=f"{second.name} is missing"):
        load(tmp_path, CFG)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=f"{second.name} holds .*does not place there"):
        load(tmp_path, CFG)
    with safe_open(first, "numpy") as handle:
        lost = min(handle.keys())
    rewritten = load_file(first)
    del rewritten[lost]
    save_file(rewritten, first)
    second.write_bytes(whole)
    with pytest.raises(ValueError, match=f"{first.name} lacks {lost}"):
        load(tmp_path, CFG)


def test_export_replaces_an_earlier_one_and_survives_a_failed_write(tmp_path, monkeypatch):
    params = random_params(CFG)
    (tmp_path / "tokenizer.json").write_text("kept")
    save(tmp_path, jax.tree.map(jnp.zeros_like, params), CFG, max_shard_bytes=4000)
    save(tmp_path, params, CFG)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, jax.tree.map(jnp.zeros_like, params), CFG)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert_same(load(tmp_path, CFG), params)


def test_export_refuses_what_it_cannot_describe(tmp_path):
    params = random_params(CFG)
    with pytest.raises(ValueError, match=r"params lack layers/up"):
        layers = {k: v for k, v in params["layers"].items() if k != "up"}
        save(tmp_path, params | {"layers": layers}, CFG)
    with pytest.raises(ValueError, match=r"unknown head"):
        save(tmp_path, params | {"head": params["embed"]}, CFG)
    with pytest.raises(ValueError, match=r"embed has shape \(47, 16\)"):
        save(tmp_path, params | {"embed": params["embed"][:-1]}, CFG)
    other = config_to_dict(dataclasses.replace(CFG, rope=Rope(theta=7.0), norm_eps=1e-5))
    with pytest.raises(ValueError, match=r"norm_eps is 1e-05 there and 1e-06 here; rope is .*7\.0"):
        save(tmp_path, params, CFG, hf_config=other)
    with pytest.raises(ValueError, match=r"qk_norm is False there and True here"):
        save(tmp_path, params, dataclasses.replace(CFG, family="llama"))
    assert not list(tmp_path.iterdir())


def test_export_keeps_the_source_config(tmp_path):
    params = random_params(CFG)
    source = config_to_dict(CFG) | {"eos_token_id": [5, 7], "my_note": {"a": 1}, "torch_dtype": "float16"}
    del source["rope_parameters"]
    source["rope_theta"] = CFG.rope.theta  # the spelling of transformers 4
    save(tmp_path, params, CFG, hf_config=source, dtype=jnp.bfloat16)
    expected = {k: v for k, v in source.items() if k != "torch_dtype"} | {"dtype": "bfloat16"}
    assert read_config(tmp_path) == expected
    assert config_from_folder(tmp_path) == CFG

    save(tmp_path, params, CFG, hf_config={"eos_token_id": 5})
    assert read_config(tmp_path) == config_to_dict(CFG) | {"eos_token_id": 5, "dtype": "float32"}


def hf(family, **changes):
    sizes = dict(vocab_size=48, hidden_size=16, num_hidden_layers=4, intermediate_size=20)
    return {"model_type": family, "num_attention_heads": 4, "num_key_value_heads": 2} | sizes | changes


def test_config_spellings_of_transformers_4():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    llama = config_from_dict(hf("llama", rope_theta=500000.0, rope_scaling=scaling))
    assert llama.rope == Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    assert not llama.tied_head and llama.head_dim == 4 and not llama.layer_kinds

    gemma = config_from_dict(
        hf(
            "gemma3_text",
            rope_theta=1e6,
            rope_local_base_freq=1e4,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        )
        | {"head_dim": 4, "sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 9}
    )
    assert gemma.rope == Rope(1e6, "linear", 8.0) and gemma.rope_local == Rope(1e4)
    assert gemma.layer_kinds == ("local", "global") * 2 and gemma.window == 6
    assert gemma.query_scale == pytest.approx(1 / 3) and gemma.tied_head and gemma.qk_norm

    yarn = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.5,
    }
    qwen = config_from_dict(hf("qwen2", rope_scaling=yarn, sliding_window=8, use_sliding_window=False))
    assert qwen.rope == Rope(kind="yarn", factor=4.0, original_max_position=64, attention_factor=1.5)
    assert qwen.qkv_bias and not qwen.out_bias and qwen.window is None


UNSUPPORTED = {
    "family": (hf("mamba"), "model_type 'mamba' .* llama, qwen2, qwen3, mistral, gemma2, gemma3_text"),
    "rope": (
        hf("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        "'dynamic' .* default, linear",
    ),
    "rope_spelling": (
        hf("gemma3_text", rope_scaling={"type": "linear", "factor": 8.0}),
        "type 'linear' .* rope_type 'default'",
    ),
    "partial": (hf("llama", partial_rotary_factor=0.5), "partial_rotary_factor"),
    "activation": (hf("llama", hidden_act="relu"), "'relu' .* silu, gelu_pytorch_tanh"),
    "quantised": (hf("llama", quantization_config={"quant_method": "fp8"}), "quantization_config"),
    "bidirectional": (hf("gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention"),
    "layer": (
        hf("qwen3", layer_types=["chunked_attention"] * 4),
        "'chunked_attention' .* full_attention, sliding_attention",
    ),
}


@pytest.mark.parametrize("config,message", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_features_are_named(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as e:
        config_from_folder(tmp_path)
    assert str(tmp_path / "config.json") in str(e.value)
