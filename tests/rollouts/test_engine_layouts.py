"""The engine in bfloat16, and with params and slots spread over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import (
    GEMMA,
    KEY,
    STOP,
    TINY,
    make_engine,
    make_params,
    mixed_requests,
    same_bits,
)

from jaxrl_llm.models import transformer
from jaxrl_llm.models.scoring import score
from jaxrl_llm.parallel.sharding import ShardingRules, make_mesh, shardings
from jaxrl_llm.rollouts.engine import Engine, trajectories
from jaxrl_llm.sampling import slots
from jaxrl_llm.sampling.autoregressive import prepare

score_jit = jax.jit(score, static_argnames=("cfg", "dtype"))


@pytest.mark.parametrize(
    "cfg, kv_dtype",
    [(TINY, None), (GEMMA, None), (TINY, "float32")],
    ids=["qwen3", "gemma2", "qwen3 with a cache in float32"],
)
def test_bfloat16_agrees_with_the_trainers_bfloat16(cfg, kv_dtype):
    """To the rounding of bfloat16, 2⁻⁸ of logits of up to 7; and bit for bit whoever the neighbours are."""
    engine = Engine(
        prepare(make_params(cfg), cfg, jnp.bfloat16), cfg, slots=4, max_length=128, key=KEY, stop_ids=STOP,
        block=16, buckets=(16, 32), kv_dtype=kv_dtype,
    )  # fmt: skip
    assert engine.slots.keys[0].dtype == engine.slots.values[0].dtype == jnp.dtype(kv_dtype or jnp.bfloat16)
    assert engine.slots.hidden.dtype == jnp.bfloat16
    requests = mixed_requests(15, longest=30, new=30)
    completions = engine.generate(requests)
    t = trajectories(requests, completions, group=range(15), width=88)
    mask = np.asarray(t.action_mask)
    for temperature, kept, sampled in (
        (t.temperature, t.log_kept, t.behaviour_logp),
        (jnp.ones(15), 0.0, t.raw_logp),
    ):
        scored = score_jit(
            make_params(cfg), t.tokens, t.action_mask, cfg, temperature=temperature, dtype=jnp.bfloat16
        ).logp
        off = np.abs(scored - kept - sampled)[mask]
        assert off.max() < 0.06 and off.mean() < 0.01  # nats
    for c, again in zip(completions, engine.generate(requests[::-1])[::-1]):
        assert same_bits(c, again)
    assert same_bits(engine.generate(requests[4:5])[0], completions[4])


def test_on_a_mesh_it_draws_what_one_device_draws():
    """Params over fsdp and tensor; slots over data and fsdp, heads of the cache over tensor."""
    requests = mixed_requests(15, longest=16, new=40)
    expected = make_engine().generate(requests)
    mesh, rules = make_mesh(2, 2, 2), ShardingRules()
    options = {"slots": 4, "max_length": 64, "block": 16, "widths": (64,), "buckets": (16,), "key": KEY}
    options |= {"stop_ids": STOP, "sharding": rules}
    with jax.set_mesh(mesh):
        placed = shardings(transformer.param_specs(TINY), mesh, rules)
        spread = prepare(jax.device_put(make_params(), placed), TINY)
        engine = Engine(spread, TINY, **options)
        completions = engine.generate(requests[:8])
        programs = slots.decode._cache_size(), slots.place._cache_size()
        completions += engine.generate(requests[8:])
        again = Engine(spread, TINY, **options).generate(requests[::-1])[::-1]
        with pytest.raises(ValueError, match=r"'batch' has size 6, which mesh axes \('data', 'fsdp'\)"):
            Engine(spread, TINY, **options | {"slots": 6})
    assert (slots.decode._cache_size(), slots.place._cache_size()) == programs  # layouts do not drift
    for cache in jax.tree.leaves((engine.slots.keys, engine.slots.values)):
        assert {s.data.shape[:3] for s in cache.addressable_shards} == {
            (5, 1, 1)
        }  # of 5 blocks, 4 slots, 2 heads
    assert {s.data.shape for s in engine.slots.lengths.addressable_shards} == {(1,)}
    for one, other, c in zip(expected, again, completions):
        assert same_bits(other, c)
        assert one.tokens.tolist() == c.tokens.tolist() and one.reason == c.reason
        for name in ("behaviour_logp", "raw_logp", "log_kept"):
            np.testing.assert_allclose(getattr(one, name), getattr(c, name), atol=1e-5)
    with pytest.raises(ValueError, match="sharding rules need a mesh"):
        Engine(spread, TINY, **options)
