"""Rows that share a prompt: scored once for all, they get what they get one by one."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from jaxrl_llm.models import params as params_lib
from jaxrl_llm.models import transformer
from jaxrl_llm.models.attention import row_attention, splash_rows
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.scoring import score, score_groups
from jaxrl_llm.parallel.sharding import ShardingRules, batch_sharding, make_mesh, shardings
from jaxrl_llm.trajectory import length_mask

QWEN = ModelConfig(
    vocab_size=60,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
)
GEMMA = dataclasses.replace(
    QWEN, qk_norm=False, attention_softcap=5.0, logit_softcap=8.0, window=4, layer_kinds=("local", "global")
)
GROUP, PROMPT, COMPLETION = 3, 9, 70


def make_rows(seed=0):
    """4 groups of 3 rows: prompts of 1 to 9 tokens, completions of 0 to 70 of which some begin alike."""
    rng = np.random.default_rng(seed)
    prompt = np.repeat([1, 9, 4, 6], GROUP)
    count = rng.integers(0, COMPLETION + 1, 12)
    count[:2] = 0, COMPLETION
    tokens = rng.integers(1, 60, (12, PROMPT + COMPLETION))
    for first in range(0, 12, GROUP):
        tokens[first : first + GROUP, : prompt[first]] = tokens[first, : prompt[first]]
    tokens[3:6, 9:12] = 5  # the first tokens of these completions are the same: scored, so not prompt
    real = np.asarray(length_mask(jnp.asarray(prompt + count), tokens.shape[1]))
    mask = real & ~np.asarray(length_mask(jnp.asarray(prompt), tokens.shape[1]))
    mask[7] = False  # a row that does not count
    return jnp.asarray(np.where(real, tokens, 0), jnp.int32), jnp.asarray(mask)


def make_params(cfg):
    params = params_lib.init(jax.random.key(0), transformer.param_specs(cfg))
    return params | {"embed": params["embed"] * 20}


def grouped(cfg, group=GROUP, **options):
    return partial(
        score_groups,
        cfg=cfg,
        group_size=group,
        max_prompt_length=PROMPT + 3,
        max_completion_length=COMPLETION,
        **options,
    )


@pytest.mark.parametrize("cfg", [QWEN, GEMMA], ids=["global", "local_and_capped"])
def test_values_and_gradients_equal_those_of_single_rows(cfg):
    tokens, mask = make_rows()
    temperature = jnp.linspace(0.5, 1.5, len(tokens))
    weights = jax.random.normal(jax.random.key(1), (2, *tokens.shape))

    def objective(score, params):
        out = score(params, tokens, mask, temperature=temperature)
        return jnp.sum(weights[0] * out.logp + weights[1] * out.entropy), out

    def both(fn):
        return jax.jit(jax.grad(partial(objective, fn), has_aux=True))(make_params(cfg))

    (gradient, out), (wanted_gradient, wanted) = (
        both(grouped(cfg, remat="dots")),
        both(partial(score, cfg=cfg)),
    )
    assert np.all(np.asarray(wanted.logp)[np.asarray(mask)] < 0)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), out, wanted)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient)):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(np.abs(other).max()) + 1e-6)


def test_a_token_out_of_reach_is_not_left_out_silently():
    """Rows that share no prompt need more room than completions have."""
    tokens, mask = make_rows()
    order = np.array([0, 3, 6, 1, 4, 7, 2, 5, 8, 9, 10, 11])
    assert np.all(np.isnan(grouped(QWEN)(make_params(QWEN), tokens[order], mask[order]).logp))


def test_a_mesh_changes_nothing():
    tokens, mask = make_rows()
    alone = jax.jit(grouped(QWEN))(make_params(QWEN), tokens, mask)
    mesh, rules = make_mesh(data=2, fsdp=2, tensor=2), ShardingRules()
    with jax.set_mesh(mesh):
        params = jax.device_put(make_params(QWEN), shardings(transformer.param_specs(QWEN), mesh, rules))
        rows = jax.device_put((tokens, mask), rules.spec(("batch",)))
        spread = jax.jit(grouped(QWEN, rules=rules))(params, *rows)
    np.testing.assert_allclose(alone.logp, spread.logp, atol=1e-5)


@pytest.mark.parametrize("window", [None, 9])
def test_the_kernel_equals_dense_attention_after_a_prompt(window):
    """In emulation: queries are the last of the keys, and neither length is a multiple of the kernel's."""
    rng = np.random.default_rng(0)
    rows, before, length = 2, 140, 150
    q = rng.normal(size=(rows, length, 4, 16)).astype(np.float32)
    k, v = (rng.normal(size=(rows, before + length, 2, 16)).astype(np.float32) for _ in range(2))
    columns = np.arange(before + length) - np.array([[0], [77]])  # the second prompt is shorter
    positions = jnp.asarray(np.maximum(columns, 0), jnp.int32)
    segments = jnp.asarray(columns >= 0, jnp.int32)
    options = {"window": window, "scale": 0.3, "softcap": None}

    def dense(q, k, v):
        return row_attention(q, k, v, positions, segments, None, rules=None, **options)

    def kernel(q, k, v):
        return splash_rows(q, k, v, segments, None, interpret=True, **options)

    cotangent = rng.normal(size=q.shape).astype(np.float32)
    for one, other in zip(
        *(jax.jit(lambda *a, f=f: jax.vjp(f, *a)[1](cotangent))(q, k, v) for f in (kernel, dense))
    ):
        np.testing.assert_allclose(one, other, atol=3e-5)
    np.testing.assert_allclose(jax.jit(kernel)(q, k, v), jax.jit(dense)(q, k, v), atol=2e-5)


def test_a_tpu_gets_the_kernel_for_prompts_and_continuations():
    tokens, mask = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in make_rows())
    params = params_lib.abstract(transformer.param_specs(QWEN))

    def loss(params, tokens, mask):
        return grouped(QWEN, remat="dots")(params, tokens, mask).logp.mean()

    lowered = jax.jit(jax.grad(loss)).trace(params, tokens, mask).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 2 * 3  # forward and two backward kernels each


@pytest.mark.aot
@pytest.mark.parametrize("cfg", [QWEN, GEMMA], ids=["global", "local_and_capped"])
def test_compiles_for_tpu(monkeypatch, cfg):
    """By the real compiler for 4 chips, 2 by 2: lengths that the kernel's do not divide, with gradients."""
    pytest.importorskip("libtpu")
    for variable, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        monkeypatch.setenv(variable, value)
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh, rules = make_mesh(fsdp=2, tensor=2, devices=chips), ShardingRules()
    cfg = dataclasses.replace(cfg, hidden_size=128, head_dim=32, intermediate_size=256, vocab_size=64)
    specs, inputs = transformer.param_specs(cfg), make_rows()

    def place(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def loss(params, tokens, mask):
        fn = grouped(cfg, rules=rules, remat="dots", dtype=jnp.bfloat16)
        return fn(params, tokens, mask).logp.mean()

    with jax.set_mesh(mesh):
        params = jax.tree.map(place, params_lib.abstract(specs), shardings(specs, mesh, rules))
        rows = (place(x, batch_sharding(mesh, rules)) for x in inputs)
        jax.jit(jax.grad(loss)).lower(params, *rows).compile()
