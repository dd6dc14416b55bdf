"""A tiny model and its engine, for the tests of rollouts. All of them compile the same few shapes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models import params as params_lib
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.rollouts.engine import Completion, Engine, Request
from jaxrl_llm.sampling.autoregressive import prepare

TINY = ModelConfig(
    vocab_size=150,
    hidden_size=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
)
GEMMA = dataclasses.replace(
    TINY,
    family="gemma2",
    num_layers=2,
    qk_norm=False,
    norm_plus_one=True,
    post_norms=True,
    embed_scale=True,
    attention_softcap=20.0,
    logit_softcap=10.0,
    window=6,
    layer_kinds=("local", "global"),
)
BIASES = dataclasses.replace(TINY, family="qwen2", qk_norm=False, qkv_bias=True, tied_head=False)
KEY = jax.random.key(5)
STOP = (3, 4, 5)


@functools.cache
def make_params(cfg: ModelConfig = TINY, seed: int = 0):
    rng = np.random.default_rng(seed)

    def one(spec: params_lib.ParamSpec) -> jax.Array:
        noise = rng.standard_normal(spec.shape)
        if spec.init in ("zeros", "ones"):  # norms and biases, which would hide mistakes as they begin
            return jnp.asarray((spec.init == "ones") + 0.1 * noise, jnp.float32)
        # embeddings larger than the default, under which every distribution is flat
        std = 0.15 if "vocab" in spec.axes else spec.fan_in**-0.5
        return jnp.asarray(std * noise, jnp.float32)

    return params_lib.map_specs(one, transformer.param_specs(cfg))


@functools.cache
def prepared(cfg: ModelConfig = TINY, seed: int = 0):
    return prepare(make_params(cfg, seed), cfg)


def make_engine(cfg: ModelConfig = TINY, *, seed: int = 0, **options) -> Engine:
    """Four slots, contexts of up to 128 tokens in two widths."""
    options = {
        "slots": 4,
        "max_length": 128,
        "block": 16,
        "widths": (64, 128),
        "buckets": (16, 32),
        "stop_ids": STOP,
    } | options
    engine = Engine(prepared(cfg, seed), cfg, key=options.pop("key", KEY), **options)
    engine.stop_ids = jnp.resize(engine.stop_ids, len(STOP) + 1)  # one compilation with and without any
    return engine


def make_prompt(size: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, size]).integers(6, 150, size).tolist()


def mixed_requests(
    count: int, *, longest: int = 40, new: int = 48, seed: int = 0, **options
) -> list[Request]:
    """Lengths and sampling parameters of every kind."""
    rng = np.random.default_rng(seed)
    truncations = ({}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"top_p": 0.9, "top_k": 20})
    return [
        Request(
            make_prompt(int(rng.integers(1, longest + 1)), seed + i),
            max_new_tokens=int(rng.integers(1, new + 1)),
            uid=1000 * seed + i,
            temperature=(0.6, 1.0, 1.3)[i % 3],
            **truncations[i % 5],
            **options,
        )
        for i in range(count)
    ]


def same_bits(a: Completion, b: Completion) -> bool:
    """Whether two completions are equal to the last bit."""
    arrays = ("tokens", "behaviour_logp", "raw_logp", "log_kept", "policy_version")
    return a.reason == b.reason and all(np.array_equal(getattr(a, x), getattr(b, x)) for x in arrays)
