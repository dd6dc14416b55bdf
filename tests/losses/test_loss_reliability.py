"""What must hold of every loss: exact sums over any cut, finite at overflow, deaf to what is masked."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from loss_table import (
    ALL_LOSSES,
    BY_ROW,
    FLOATS,
    LOG_PROBS,
    counts,
    evaluate,
    inputs,
    jitted,
    random_batch,
    reductions,
)

from jaxrl_llm import losses

every_loss = pytest.mark.parametrize("name", ALL_LOSSES)

HEIGHT, WIDTH = 6, 8
PIECE_HEIGHT, PIECE_WIDTH = 3, 7


@st.composite
def cuts(draw):
    """A seed, row lengths, and the rows dealt out to ranks × micro-batches of 0 to 3 rows in any order."""
    lengths = draw(st.lists(st.integers(0, PIECE_WIDTH), min_size=HEIGHT, max_size=HEIGHT))
    order = draw(st.permutations(range(HEIGHT)))
    pieces = []
    for size in [*draw(st.lists(st.integers(0, PIECE_HEIGHT), max_size=8)), *[1] * HEIGHT]:
        pieces.append(order[:size])
        order = order[size:]
    ranks = draw(st.integers(1, 3))
    return draw(st.integers(0, 2**31)), lengths, [pieces[rank::ranks] for rank in range(ranks)]


@every_loss
@settings(max_examples=10, deadline=None, derandomize=True)
@given(cut=cuts())
def test_any_cut_gives_the_whole_batch(name, cut):
    """Every token's gradient in its micro-batch (padded, narrower than the batch) is that in the whole batch.

    The gradient of any params is a sum of these, so it agrees to 1e-12 of the sum of absolute terms.
    """
    seed, lengths, ranks = cut
    batch = random_batch(seed, HEIGHT, WIDTH, np.float64)
    batch["mask"] &= np.arange(WIDTH) < np.array(lengths)[:, None]
    with jax.enable_x64(True):
        whole = jitted(name)(batch)
        gradients = {key: np.full_like(g, np.nan) for key, g in whole.gradients.items()}
        sums, weights, metrics = 0.0, 0.0, {}
        for rank in ranks:
            rank_metrics = {}
            for rows in rank:
                piece = random_batch(seed + 1, PIECE_HEIGHT, PIECE_WIDTH, np.float64)  # padding is no zeros
                for key in piece:
                    taken = batch[key][list(rows)]
                    piece[key][: len(rows)] = taken if key in BY_ROW else taken[:, :PIECE_WIDTH]
                piece["mask"][len(rows) :] = False
                part = jitted(name)(piece)
                for key, g in gradients.items():
                    taken = part.gradients[key][:, : len(rows)]
                    if key in BY_ROW:
                        g[:, list(rows)] = taken
                    else:
                        g[:, list(rows), :PIECE_WIDTH] = taken
                        g[:, list(rows), PIECE_WIDTH:] = 0
                sums, weights = sums + part.sums, weights + part.weights
                rank_metrics = losses.merge(rank_metrics, part.metrics)
            metrics = losses.merge(metrics, rank_metrics)
    for key, g in gradients.items():
        assert g.dtype == np.float64
        np.testing.assert_allclose(g, whole.gradients[key], rtol=1e-12, atol=0)
    np.testing.assert_array_equal(weights, whole.weights)
    np.testing.assert_allclose(sums, whole.sums, rtol=0, atol=1e-12 * (1 + np.sum(np.abs(whole.loss))))
    merged, expected = losses.finalize(metrics), losses.finalize(whole.metrics)
    assert merged.keys() == expected.keys()
    np.testing.assert_allclose(list(merged.values()), list(expected.values()), rtol=1e-11, atol=1e-12)


@every_loss
def test_a_piece_without_rows(name):
    """A rank that got nothing: shape [0, T]."""
    batch = {key: x[:0] for key, x in random_batch(0).items()}
    loss, metrics = jax.jit(partial(evaluate, name))(batch)
    assert loss.shape == batch["mask"].shape[: loss.ndim]
    assert losses.finalize(metrics) == {}


@every_loss
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, "random"])
def test_masked_garbage_changes_nothing(name, garbage):
    clean = random_batch(7)
    dirty = dict(clean)
    rng = np.random.default_rng(8)
    for key in inputs(name):
        noise = rng.normal(0, 1e3, clean[key].shape) if garbage == "random" else garbage
        dirty[key] = np.where(counts(key, clean), clean[key], noise).astype(np.float32)
    dirty["flag"] = np.where(clean["mask"], clean["flag"], rng.random(clean["flag"].shape) > 0.5)
    result = jitted(name)(clean)
    jax.tree.map(np.testing.assert_array_equal, result, jitted(name)(dirty))
    mask = clean["mask"] if result.loss.ndim == 2 else clean["mask"].any(1)
    assert np.all(np.asarray(result.loss)[~mask] == 0)
    for key, gradient in result.gradients.items():
        assert np.all(np.asarray(gradient)[:, ~counts(key, clean)] == 0)


def assert_finite(result):
    jax.tree.map(lambda x: np.testing.assert_equal(np.isfinite(x), True), result._replace(metrics={}))
    for name, value in losses.finalize(result.metrics).items():
        assert np.isfinite(value), name


LOWERED = [("logp",), LOG_PROBS, *((key,) for key in LOG_PROBS)]


@every_loss
def test_one_token_at_log_ratio_1000(name):
    """One policy, or every other one, gives one token 1000 nats less: log-ratios of −1000 and +1000."""
    signs = (1.0, 0.0, -1.0) if "advantages" in inputs(name) else (1.0,)
    read = {tuple(key for key in keys if key in inputs(name)) for keys in LOWERED} - {()}
    for lowered, advantage in itertools.product(sorted(read), signs):
        batch = random_batch(1)
        batch["advantages"][0] = advantage
        for key in lowered:
            batch[key][0, 0] -= 1000
        assert_finite(jitted(name)(batch))


@every_loss
@pytest.mark.parametrize("size", [-1000.0, 1000.0])
def test_one_huge_number(name, size):
    """Whatever is no log-prob of a token: scores, logits, sums of log-probs."""
    for key in inputs(name):
        if not key.endswith("logp"):
            batch = random_batch(1)
            batch[key].flat[0] += size
            assert_finite(jitted(name)(batch))


@every_loss
def test_fully_masked_batch(name):
    batch = random_batch(2)
    batch["mask"][:] = False
    result = jitted(name)(batch)
    for x in [result.loss, result.sums, result.weights, *result.gradients.values()]:
        assert np.all(x == 0)
    assert losses.finalize(result.metrics) == {}


@every_loss
@pytest.mark.parametrize("advantage", [1e8, -1e8])
def test_huge_advantages_stay_finite(name, advantage):
    batch = random_batch(3)
    batch["advantages"][:] = advantage
    batch["old_logp"][0, 0] -= 1000
    assert_finite(jitted(name)(batch))


@every_loss
def test_jit_changes_nothing(name):
    """Beyond the order in which float32 sums are taken."""
    batch = random_batch(4)
    compiled = jitted(name)(batch)
    for plain, fused in zip(evaluate(name, batch), (compiled.loss, compiled.metrics)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), plain, fused)


@every_loss
def test_devices_hold_rows(name):
    """Under shard_map over the rows, sums and weights added over devices are those of the whole batch."""
    batch = random_batch(4)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

    def share(batch):
        pairs = reductions(evaluate(name, batch)[0], batch)
        return jax.lax.psum(jax.tree.map(lambda *x: jnp.stack(x), *pairs), "data")

    rows = PartitionSpec("data")
    whole = jax.jit(jax.shard_map(share, mesh=mesh, in_specs=(rows,), out_specs=PartitionSpec()))(batch)
    alone = jitted(name)(batch)
    np.testing.assert_array_equal(whole.weight, alone.weights)
    np.testing.assert_allclose(whole.sum, alone.sums, rtol=2e-6, atol=1e-5)


@every_loss
def test_vmap_is_a_loop(name):
    batches = [random_batch(4), random_batch(5)]
    stacked = {key: np.stack([batch[key] for batch in batches]) for key in batches[0]}
    both = jax.jit(jax.vmap(lambda batch: evaluate(name, batch)[0]))(stacked)
    for one, batch in zip(both, batches):
        np.testing.assert_allclose(one, jitted(name)(batch).loss, rtol=2e-6, atol=1e-6)


@every_loss
def test_precision_is_float32_at_least(name):
    """bfloat16 inputs give exactly what their float32 copies give; float64 stays float64."""
    batch = random_batch(5)
    half = {key: jnp.asarray(x, jnp.bfloat16) if key in FLOATS else x for key, x in batch.items()}
    single = {key: jnp.asarray(x, jnp.float32) if key in FLOATS else x for key, x in half.items()}
    from_half, from_single = map(jax.jit(partial(evaluate, name)), (half, single))
    assert {x.dtype for x in jax.tree.leaves(from_half)} == {np.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, from_half, from_single)
    with jax.enable_x64(True):
        loss, _ = jax.eval_shape(partial(evaluate, name), random_batch(5, dtype=np.float64))
    assert loss.dtype == np.float64


@every_loss
def test_only_what_is_in_training_gets_a_gradient(name):
    gradients = jitted(name)(random_batch(6)).gradients
    trained = {key for key, gradient in gradients.items() if np.any(np.asarray(gradient) != 0)}
    assert trained == set(ALL_LOSSES[name].trains)
