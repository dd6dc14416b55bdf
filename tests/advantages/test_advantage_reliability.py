"""What must hold of every advantage: 0 where nothing is to be learned, deaf to whatever does not count."""

from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from advantage_table import (
    ALL_ADVANTAGES,
    COMPARED,
    FLOATS,
    GROUP,
    TOKENS,
    TURNS,
    VALID,
    N,
    counts,
    evaluate,
    inputs,
    jitted,
    jitted_statistics,
    random_batch,
    run,
    with_statistics,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from jaxrl_llm.losses import finalize

every_advantage = pytest.mark.parametrize("name", ALL_ADVANTAGES)
every_relative_one = pytest.mark.parametrize("name", [n for n, c in ALL_ADVANTAGES.items() if c.is_relative])

MASKS = ("valid", "mask", "turn_mask")


def rewards_of(name):
    return [key for key in inputs(name) if key in COMPARED]


def without(batch, row):
    """The batch with one row left out."""
    return batch | {
        key: np.where((np.arange(N) == row).reshape(-1, *[1] * (batch[key].ndim - 1)), False, batch[key])
        for key in MASKS
    }


@every_relative_one
def test_groups_that_say_nothing(name):
    """Equal rewards, whatever they are (eight of 0.7 make 0.056 in plain float32), and a single row."""
    batch = random_batch(1)
    for key in rewards_of(name):
        if key in TURNS or key in TOKENS:  # what one row has several of may be compared within it
            batch[key][GROUP == 40] = 0.7
    assert np.all(run(name, batch)[0][GROUP == 40] == 0)
    for value in (0.7, 1.0, -3.3, 1e8):
        for key in rewards_of(name):
            batch[key] = np.where((GROUP == 3).reshape(-1, *[1] * (batch[key].ndim - 1)), value, batch[key])
            batch[key] = batch[key].astype(np.float32)
        assert np.all(run(name, batch)[0][GROUP == 3] == 0)
    for key in rewards_of(name):
        batch[key][:] = 0.7
    assert np.all(run(name, batch)[0] == 0)


def whole(name, batch):
    """The advantage of a batch that is all there is: its own statistics."""
    return evaluate(name, with_statistics(name, batch))


@every_advantage
def test_huge_rewards_stay_finite(name):
    batch = random_batch(2)
    for key in rewards_of(name):
        batch[key] = np.where(np.random.default_rng(0).random(batch[key].shape) < 0.5, 1e8, -1e8).astype(
            np.float32
        )
    result, metrics = run(name, batch)
    assert np.all(np.isfinite(result)) and np.all(np.isfinite(list(finalize(metrics).values())))


@every_advantage
@pytest.mark.parametrize("reward", [np.nan, np.inf, -np.inf])
def test_rows_without_a_number_are_left_out(name, reward):
    """The others get what they get without that row, exactly; the row itself gets 0 and is counted."""
    batch = random_batch(3)
    wanted, _ = run(name, without(batch, 1))
    for key in rewards_of(name):
        batch[key][1] = np.where(counts(key, batch)[1], reward, batch[key][1])
    result, metrics = run(name, batch)
    np.testing.assert_array_equal(result, wanted)
    assert np.all(result[1] == 0)
    assert "nonfinite_rewards" not in metrics or finalize(metrics)["nonfinite_rewards"] > 0


@every_advantage
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, "random"])
def test_what_does_not_count_changes_nothing(name, garbage):
    clean = random_batch(4)
    dirty, rng = dict(clean), np.random.default_rng(5)
    for key in inputs(name):
        noise = rng.normal(0, 1e3, clean[key].shape) if garbage == "random" else garbage
        dirty[key] = np.where(counts(key, clean), clean[key], noise).astype(np.float32)
    dirty["group"] = np.where(VALID, GROUP, 3)
    dirty["turn"] = np.where(clean["mask"], clean["turn"], rng.integers(-99, 99, clean["turn"].shape))
    dirty["turn"] = dirty["turn"].astype(np.int32)
    result, metrics = run(name, clean)
    jax.tree.map(np.testing.assert_array_equal, (result, metrics), run(name, dirty))
    assert np.all(result[~VALID] == 0)


@every_advantage
def test_nothing_counts(name):
    batch = random_batch(6)
    batch |= {key: np.zeros_like(batch[key]) for key in MASKS}
    result, metrics = run(name, batch)
    assert np.all(result == 0) and finalize(metrics) == {}


@every_advantage
def test_a_batch_without_rows(name):
    batch = {key: x[:0] for key, x in random_batch(6).items()}
    result, metrics = jax.jit(partial(whole, name))(batch)
    assert result.shape[0] == 0 and finalize(metrics) == {}


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@every_advantage
@settings(max_examples=5, deadline=None, derandomize=True)
@given(order=st.permutations(range(N)), names=st.permutations([-(2**31), -7, 0, 2**31 - 1]))
def test_order_of_rows_and_names_of_groups(name, order, names):
    """Rows in another order get the same in that order, and groups may be called anything."""
    with jax.enable_x64(True):
        batch = random_batch(7, np.float64)
        rename = np.array([{3: names[0], -7: names[1], 40: names[2]}[g] for g in GROUP], np.int32)
        other = {key: x[list(order)] for key, x in (batch | {"group": rename}).items()}
        (plain, metrics), (moved, moved_metrics) = run(name, batch), run(name, other)
    close(moved, plain[list(order)])
    jax.tree.map(close, metrics, moved_metrics)


@every_advantage
@pytest.mark.parametrize("groups", [[3], [-7], [40], [40, 3]])
def test_cuts_between_groups(name, groups):
    """A piece of some groups beside other rows, given the statistics of the whole batch."""
    with jax.enable_x64(True):
        batch, other = random_batch(8, np.float64), random_batch(9, np.float64)
        whole, _ = run(name, batch)
        rows = np.flatnonzero(np.isin(GROUP, groups))
        piece = {key: np.concatenate([x[rows], other[key][: N - len(rows)]]) for key, x in batch.items()}
        for key in MASKS:
            piece[key][len(rows) :] = False
        part, _ = jitted(name)(piece | {"statistics": jitted_statistics(name)(batch)})
    close(part[: len(rows)], whole[rows])


@every_advantage
def test_devices_hold_groups(name):
    """Under shard_map over rows sorted by group, statistics known, devices get what one device gets."""
    batch = {key: x[np.argsort(GROUP, kind="stable")] for key, x in random_batch(10).items()}
    batch["group"] = np.array([0, 0, 0, 1, 2, 2, 2, 3], np.int32)  # cut in the middle: 0, 1 | 2, 3
    whole, _ = run(name, batch)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    rows, everywhere = PartitionSpec("data"), PartitionSpec()

    def share(batch, statistics):
        return evaluate(name, batch | {"statistics": statistics})[0]

    sharded = jax.shard_map(share, mesh=mesh, in_specs=(rows, everywhere), out_specs=rows)
    np.testing.assert_allclose(
        jax.jit(sharded)(batch, jitted_statistics(name)(batch)), whole, rtol=2e-6, atol=1e-6
    )


@every_advantage
def test_jit_and_vmap_change_nothing(name):
    """Beyond the order in which float32 sums are taken."""
    batches = [random_batch(seed) for seed in (11, 12)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *batches)
    both = jax.jit(jax.vmap(partial(whole, name)))(stacked)
    alike = partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6)
    for i, batch in enumerate(batches):
        jax.tree.map(alike, run(name, batch), jax.tree.map(itemgetter(i), both))
    jax.tree.map(alike, run(name, batches[0]), whole(name, batches[0]))


@every_advantage
def test_precision_is_float32_at_least(name):
    """bfloat16 inputs give exactly what their float32 copies give; float64 stays float64."""
    batch = random_batch(13)
    half = {key: jnp.asarray(x, jnp.bfloat16) if key in FLOATS else x for key, x in batch.items()}
    single = {key: jnp.asarray(x, jnp.float32) if key in FLOATS else x for key, x in half.items()}
    from_half, from_single = map(jax.jit(partial(whole, name)), (half, single))
    assert {x.dtype for x in jax.tree.leaves(from_half)} == {np.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, from_half, from_single)
    with jax.enable_x64(True):
        double = random_batch(13, np.float64)
        result, _ = jax.eval_shape(partial(whole, name), double)
    assert result.dtype == np.float64


@every_advantage
def test_advantages_are_constants(name):
    batch = random_batch(14)

    def total(floats):
        result, _ = whole(name, batch | floats)
        return jnp.sum(result * jnp.arange(1, 1 + result.size).reshape(result.shape))

    floats = {key: jnp.asarray(batch[key]) for key in inputs(name)}
    for gradient in jax.jit(jax.grad(total))(floats).values():
        assert np.all(np.asarray(gradient) == 0)
