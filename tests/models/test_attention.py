"""The TPU kernel computes what the dense attention does, and it is what a TPU gets."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from jaxrl_llm.models import attention as module
from jaxrl_llm.models import transformer
from jaxrl_llm.models.attention import attention, causal_mask, row_attention, splash_rows
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.params import abstract
from jaxrl_llm.parallel.sharding import ShardingRules, batch_sharding, make_mesh, shardings

CFG = ModelConfig(
    num_heads=4, num_kv_heads=2, attention_softcap=5.0, window=9, layer_kinds=("local", "global")
)
SCORES = re.compile(r"dot_general.*(64x64|130x130)x")
KINDS = {
    "global": dataclasses.replace(CFG, attention_softcap=None, window=None, layer_kinds=()),
    "softcap_mixed": CFG,
    "all_local": dataclasses.replace(CFG, attention_softcap=None, layer_kinds=("local", "local")),
    "bidirectional": dataclasses.replace(
        CFG, attention_softcap=None, window=None, layer_kinds=(), causal=False
    ),
}


def random_inputs(rows=2, length=150, heads=4, kv=2, width=16):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(rows, length, n, width)).astype(np.float32) for n in (heads, kv, kv))
    return q, k, v, rng.normal(size=q.shape).astype(np.float32)


def value_and_gradients(fn, q, k, v, cotangent):
    out, vjp = jax.vjp(jax.jit(fn), q, k, v)
    return out, *vjp(cotangent)


@pytest.mark.parametrize(
    "window,local,softcap,packed",
    [(9, True, 2.0, True), pytest.param(9, False, None, False, marks=pytest.mark.slow)],
)
def test_kernel_equals_dense(window, local, softcap, packed):
    """The kernel in emulation: lengths no multiple of its block, grouped heads, values and gradients."""
    *qkv, cotangent = random_inputs()
    length = qkv[0].shape[1]
    start = 70 if packed else 0  # a second sequence begins here
    positions = np.broadcast_to(np.r_[:start, : length - start], (2, length))
    segments = np.broadcast_to((np.arange(length) >= start).astype(np.int32), (2, length)) if packed else None
    mask = causal_mask(jnp.asarray(positions), segments, None if local is False else window)
    flag = None if local is None else jnp.asarray(local)
    kernel = value_and_gradients(
        lambda q, k, v: splash_rows(
            q, k, v, segments, flag, window=window, scale=0.3, softcap=softcap, interpret=True
        ),
        *qkv,
        cotangent,
    )
    dense = value_and_gradients(
        lambda q, k, v: attention(q, k, v, mask, scale=0.3, softcap=softcap), *qkv, cotangent
    )
    for one, other in zip(kernel, dense):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_kernel_equals_dense_without_causality(packed):
    """In emulation: neither another sequence of the row nor what fills the kernel's block is seen."""
    *qkv, cotangent = random_inputs()
    length = qkv[0].shape[1]
    segments = np.where(np.arange(length) < 70, 1, np.where(np.arange(length) < 120, 2, 0)).astype(np.int32)
    mask = jnp.asarray(segments[:, None] == segments if packed else np.ones((length, length), bool))
    segments = jnp.broadcast_to(segments, (2, length)) if packed else None
    options = dict(window=None, scale=0.3, softcap=None)
    kernel = value_and_gradients(
        lambda *qkv: splash_rows(*qkv, segments, None, causal=False, interpret=True, **options),
        *qkv,
        cotangent,
    )
    dense = value_and_gradients(
        lambda *qkv: row_attention(*qkv, None, segments, None, causal=False, rules=None, **options),
        *qkv,
        cotangent,
    )
    expected = value_and_gradients(
        lambda q, k, v: attention(q, k, v, mask[None, None], scale=0.3, softcap=None), *qkv, cotangent
    )
    for one, other, third in zip(kernel, dense, expected):
        np.testing.assert_allclose(one, third, atol=2e-5)
        np.testing.assert_allclose(other, third, atol=2e-6)


def test_rows_of_many_queries_are_cut_and_a_window_is_refused(monkeypatch):
    q, k, v, _ = random_inputs(length=75)
    options = dict(scale=0.3, softcap=None, rules=None, causal=False)
    segments = jnp.asarray(np.arange(75) >= 40, jnp.int32)[None].repeat(2, axis=0)
    whole = row_attention(q, k, v, None, segments, None, window=None, **options)
    monkeypatch.setattr(module, "WIDE_CHUNK", 16)
    cut = row_attention(q, k, v, None, segments, None, window=None, **options)
    np.testing.assert_allclose(cut, whole, atol=2e-6)
    with pytest.raises(ValueError, match="window=4 looks back only"):
        row_attention(q, k, v, None, segments, None, window=4, **options)


def loss(params, tokens, cfg, segment_ids=None, rules=None, remat="none"):
    hidden = transformer.forward(params, tokens, cfg, segment_ids=segment_ids, rules=rules, remat=remat)
    return hidden.astype(jnp.float32).mean()


def lower(platform, cfg, *, segment_ids=None, rules=None, mesh=None, length=130, remat="none"):
    params = abstract(transformer.param_specs(cfg))
    tokens = jax.ShapeDtypeStruct((4, length), jnp.int32)
    if mesh is not None:

        def place(x, sharding):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        params = jax.tree.map(place, params, shardings(transformer.param_specs(cfg), mesh, rules))
        tokens = place(tokens, batch_sharding(mesh, rules))
    step = jax.jit(jax.grad(loss), static_argnames=("cfg", "rules", "remat"))
    return step.trace(params, tokens, cfg, segment_ids, rules, remat).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS)
def test_tpu_gets_the_kernel_and_others_do_not(cfg):
    segments = jax.ShapeDtypeStruct((4, 130), jnp.int32) if cfg.layer_kinds else None
    tpu = lower("tpu", cfg, segment_ids=segments, remat="dots").as_text()
    # forward, once, and the two kernels of the backward pass, for each kind of layer
    assert tpu.count("tpu_custom_call") == 3 * len(set(cfg.layer_kinds) or {"global"})
    assert not SCORES.search(tpu)
    cpu = lower("cpu", cfg, segment_ids=segments).as_text()
    assert "tpu_custom_call" not in cpu and SCORES.search(cpu)


@pytest.mark.parametrize("kv_heads", ["tensor", None])
def test_tpu_gets_the_kernel_on_a_mesh(kv_heads):
    rules = dataclasses.replace(ShardingRules(), kv_heads=kv_heads)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        text = lower("tpu", KINDS["global"], rules=rules, mesh=mesh).as_text()
    assert text.count("tpu_custom_call") == 3
    # each device runs it on its own row, with two of the four heads
    assert "tensor<1x2x256x32xf32>" in text and "tensor<4x4x256x32xf32>" not in text


@pytest.mark.parametrize("kv_heads", [None, pytest.param("tensor", marks=pytest.mark.slow)])
def test_kernel_on_a_mesh_equals_dense(monkeypatch, kv_heads):
    """The layout around the kernel: rows and heads go where they belong, gradients come back whole."""

    def emulated(*args, **kwargs):
        return splash_rows(*args, **kwargs, interpret=True)

    def take_tpu(*args, tpu, default):
        return tpu(*args)

    *qkv, cotangent = random_inputs(rows=2, length=20, heads=4, kv=2)
    positions = jnp.broadcast_to(jnp.arange(20), (2, 20))
    settings = dict(window=None, scale=0.3, softcap=None)
    dense = value_and_gradients(
        lambda q, k, v: row_attention(q, k, v, positions, None, None, rules=None, **settings),
        *qkv,
        cotangent,
    )
    monkeypatch.setattr(module, "splash_rows", emulated)
    monkeypatch.setattr(jax.lax, "platform_dependent", take_tpu)
    rules = dataclasses.replace(ShardingRules(), kv_heads=kv_heads)
    with jax.set_mesh(make_mesh(data=2, tensor=2)):
        kernel = value_and_gradients(
            lambda q, k, v: row_attention(q, k, v, positions, None, None, rules=rules, **settings),
            *qkv,
            cotangent,
        )
    for one, other in zip(kernel, dense):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.aot
@pytest.mark.parametrize("name", ["global", "softcap_mixed"])
def test_compiles_for_tpu_without_a_trace_of_the_dense_branch(monkeypatch, name):
    """Of 4 chips, 2 by 2: legal for the real compiler, in the memory of the kernel alone."""
    pytest.importorskip("libtpu")
    for variable, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        monkeypatch.setenv(variable, value)
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh, rules = make_mesh(fsdp=2, tensor=2, devices=chips), ShardingRules()

    def temporary_bytes():
        with jax.set_mesh(mesh):
            compiled = lower("tpu", KINDS[name], rules=rules, mesh=mesh, length=1024).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    both = temporary_bytes()
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, tpu, default: tpu(*args))
    assert both == temporary_bytes()
