"""One update: exact accumulation, skipped when not finite, the same on a mesh as on one device."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import finalize
from jaxrl_llm.models import params as params_lib
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.parallel.sharding import ShardingRules, batch_sharding, make_mesh, shardings
from jaxrl_llm.training import state as state_lib
from jaxrl_llm.training.config import default
from jaxrl_llm.training.update import (
    PolicyBatch,
    accumulate,
    make_scorer,
    make_update,
    policy_loss,
    policy_scorer,
    scorer,
    shared,
)
from jaxrl_llm.trajectory import Trajectories, length_mask

CFG = ModelConfig(
    vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, intermediate_size=32
)
N, T = 8, 12
GROUP = 4
SPECS = transformer.param_specs(CFG)


def config(**loss):
    c = default()
    c.data.max_prompt_length, c.rollout.max_completion_length = 4, T - 4
    c.rollout.num_generations = GROUP
    c.loss.beta = 0.1
    c.loss.entropy_coef = 0.01
    c.loss.update(loss)
    return c


def make_params(seed=0):
    params = params_lib.init(jax.random.key(seed), SPECS)
    return params | {"embed": params["embed"] * 10}


def make_batch(seed=0) -> PolicyBatch:
    """Two groups of rows of unequal lengths, one of them without a token to learn from."""
    rng = np.random.default_rng(seed)
    lengths = np.array([12, 5, 9, 4, 7, 12, 6, 10], np.int32)
    real = length_mask(jnp.asarray(lengths), T)
    action = real & (jnp.arange(T) >= 4)
    logp = jnp.where(action, jnp.asarray(rng.normal(-3, 0.5, (N, T)), jnp.float32), 0)
    tokens = rng.integers(1, 64, (N, T))
    tokens[:, :4] = np.repeat(tokens[::GROUP, :4], GROUP, axis=0)
    t = Trajectories(
        tokens=jnp.where(real, jnp.asarray(tokens, jnp.int32), 0),
        lengths=jnp.asarray(lengths),
        action_mask=action,
        behaviour_logp=logp,
        raw_logp=logp,
        log_kept=jnp.zeros((N, T)),
        temperature=jnp.asarray(rng.uniform(0.7, 1.3, N), jnp.float32),
        finished=jnp.ones(N, bool),
        group=jnp.arange(N, dtype=jnp.int32) // GROUP,
    )
    return PolicyBatch(t, jnp.asarray(rng.normal(size=N), jnp.float32), ref_logp=logp * 1.1)


def leaves_close(a, b, tolerance):
    for path, x in jax.tree_util.tree_leaves_with_path(a):
        y = dict(jax.tree_util.tree_leaves_with_path(b))[path]
        scale = max(float(jnp.max(jnp.abs(x))), 1e-6)
        np.testing.assert_allclose(x, y, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("mode", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"])
def test_micro_batches_change_nothing(mode):
    c = config(loss_aggregation=mode)
    loss = policy_loss(c, policy_scorer(c, CFG, None))
    run = jax.jit(lambda p, b, n: accumulate(loss, p, b, n), static_argnums=2)
    whole, total, metrics = run(make_params(), make_batch(), 1)
    for pieces in (2, 8):
        cut, cut_total, cut_metrics = run(make_params(), make_batch(), pieces)
        leaves_close(whole, cut, 1e-5)
        np.testing.assert_allclose(total, cut_total, rtol=1e-5)
        a, b = finalize(metrics), finalize(cut_metrics)
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name


def test_sharing_a_groups_prompt_changes_nothing():
    plain = config()
    plain.train.num_minibatches = 2  # rows may come in any order then: nothing is shared
    out = {}
    for name, c in (("shared", config()), ("plain", plain)):
        score = policy_scorer(c, CFG, None)
        gradient = partial(accumulate, policy_loss(c, score), pieces=1)
        out[name] = jax.jit(gradient)(make_params(), make_batch())
        text = str(jax.make_jaxpr(score)(make_params(), make_batch().trajectories))
        assert (f"f32[{N // GROUP},4,{CFG.hidden_size}]" in text) == (name == "shared")
    leaves_close(out["plain"][0], out["shared"][0], 1e-5)
    np.testing.assert_allclose(out["plain"][1], out["shared"][1], rtol=1e-5)


def test_how_many_rows_share_a_prompt():
    assert shared(16, 8, None) == 8  # whole groups
    assert shared(4, 8, None) == 4  # a micro-batch of half a group
    assert shared(12, 8, None) == 4  # one and a half
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        assert shared(16, 8, ShardingRules()) == 4  # as many prompts as devices to spread them over


def build(c):
    optimizer = state_lib.make_optimizer(c.optimizer, 10)
    loss = policy_loss(c, policy_scorer(c, CFG, None))
    return optimizer, make_update(loss, optimizer, state_lib.schedule(c.optimizer, 10))


def fresh(optimizer, mesh=None, rules=None):
    mesh = mesh or make_mesh()
    placed = state_lib.state_shardings(SPECS, optimizer, mesh, rules or ShardingRules())
    params = jax.device_put(make_params(), shardings(SPECS, mesh, rules or ShardingRules()))
    return state_lib.init_state(params, optimizer, placed)


def test_an_update_that_is_not_finite_changes_nothing_but_the_counters():
    c = config()
    optimizer, update = build(c)
    batch = make_batch()
    before = jax.device_get(fresh(optimizer))
    bad = dataclasses.replace(batch, advantages=batch.advantages.at[0].set(jnp.nan))
    after, metrics = update(fresh(optimizer), bad)
    again, _ = update(jax.tree.map(jnp.copy, after), bad)
    assert int(after.nonfinite) == 1 and int(again.nonfinite) == 2 and int(again.skipped) == 2
    assert int(after.version) == 0
    for name in ("params", "opt_state"):
        same = jax.tree.map(np.array_equal, getattr(before, name), jax.device_get(getattr(after, name)))
        assert all(jax.tree.leaves(same))
    good, _ = update(again, batch)
    assert int(good.nonfinite) == 0 and int(good.skipped) == 2 and int(good.version) == 1
    assert "loss" in metrics


@pytest.mark.parametrize("sizes", [(1, 4, 1), (2, 1, 2), (2, 2, 2)])
def test_a_mesh_gives_what_one_device_gives(sizes):
    c = config()
    c.optimizer.learning_rate = 1e-2
    optimizer, update = build(c)
    one, one_metrics = update(fresh(optimizer), make_batch())
    mesh, rules = make_mesh(*sizes), ShardingRules()
    with jax.set_mesh(mesh):
        loss = policy_loss(c, policy_scorer(c, CFG, rules))
        spread_update = make_update(loss, optimizer, state_lib.schedule(c.optimizer, 10))
        batch = jax.device_put(make_batch(), batch_sharding(mesh, rules))
        many, many_metrics = spread_update(fresh(optimizer, mesh, rules), batch)
    a, b = finalize(one_metrics), finalize(many_metrics)
    for name in a:
        assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name
    # Adam's first step is lr·sign: compare the moments, which are linear in the gradient
    leaves_close(one.opt_state[1][0].mu, many.opt_state[1][0].mu, 1e-4)
    gate = many.params["layers"]["gate"]
    assert gate.addressable_shards[0].data.size == gate.size // (sizes[1] * sizes[2])


def test_scoring_in_pieces_is_scoring():
    c = config()
    t = make_batch().trajectories
    score = policy_scorer(c, CFG, None)
    whole = make_scorer(score)(make_params(), t).logp
    pieces = make_scorer(score, pieces=4)(make_params(), t).logp
    np.testing.assert_allclose(whole, pieces, atol=1e-6)
    assert np.all(np.asarray(whole)[~np.asarray(t.action_mask)] == 0)


def test_padding_and_packing_do_not_change_log_probs():
    """A sequence alone, padded, and packed beside others: the same within 1e-5 (one pad id = eos id = 0)."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 64, n) for n in (5, 3, 4)]
    score = jax.jit(scorer(config(), CFG, None))
    alone = []
    for row in rows:
        tokens = jnp.asarray(row)[None]
        alone.append(np.asarray(score(make_params(), tokens, jnp.ones_like(tokens, bool)).logp[0]))
    padded = np.zeros((3, 9), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    mask = np.arange(9) < np.array([[5], [3], [4]])
    out = np.asarray(score(make_params(), jnp.asarray(padded), jnp.asarray(mask)).logp)
    packed = np.concatenate([*rows, [0, 0]])[None]
    segments = np.array([[1] * 5 + [2] * 3 + [3] * 4 + [0] * 2])
    positions = np.concatenate([np.arange(5), np.arange(3), np.arange(4), [0, 0]])[None]
    targets = (segments > 0) & (positions > 0)
    out_packed = np.asarray(
        score(
            make_params(),
            jnp.asarray(packed),
            jnp.asarray(targets),
            positions=jnp.asarray(positions),
            segment_ids=jnp.asarray(segments),
        ).logp
    )[0]
    start = 0
    for i, (row, expected) in enumerate(zip(rows, alone)):
        np.testing.assert_allclose(out[i, 1 : len(row)], expected[1:], atol=1e-5)
        np.testing.assert_allclose(out_packed[start + 1 : start + len(row)], expected[1:], atol=1e-5)
        assert out_packed[start] == 0  # nothing before it in its own sequence: never a target
        start += len(row)
