"""What must hold of every loss: exact sums over any cut, finite at overflow, deaf to what is masked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_table import ALL_LOSSES, FLOATS, jitted, random_batch

from jaxrl_llm import losses

every_loss = pytest.mark.parametrize("name", ALL_LOSSES)

ROWS, WIDTH = 6, 8
PIECE_ROWS, PIECE_WIDTH = 3, 7


@st.composite
def cuts(draw):
    """A seed, row lengths, and the rows dealt out to ranks × micro-batches of 0 to 3 rows in any order."""
    lengths = draw(st.lists(st.integers(0, PIECE_WIDTH), min_size=ROWS, max_size=ROWS))
    order = draw(st.permutations(range(ROWS)))
    pieces = []
    for size in [*draw(st.lists(st.integers(0, PIECE_ROWS), max_size=8)), *[1] * ROWS]:
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
    batch = random_batch(seed, ROWS, WIDTH, np.float64)
    batch["mask"] &= np.arange(WIDTH) < np.array(lengths)[:, None]
    with jax.enable_x64(True):
        whole = jitted(name)(batch)
        gradients = {key: np.full_like(g, np.nan) for key, g in whole.gradients.items()}
        sums, weights, metrics = 0.0, 0.0, {}
        for rank in ranks:
            rank_metrics = {}
            for rows in rank:
                piece = random_batch(seed + 1, PIECE_ROWS, PIECE_WIDTH, np.float64)  # padding is no zeros
                for key in piece:
                    piece[key][: len(rows)] = batch[key][list(rows), :PIECE_WIDTH]
                piece["mask"][len(rows) :] = False
                part = jitted(name)(piece)
                for key, g in gradients.items():
                    g[:, list(rows), :PIECE_WIDTH] = part.gradients[key][:, : len(rows)]
                    g[:, list(rows), PIECE_WIDTH:] = 0
                sums, weights = sums + part.sums, weights + part.weights
                rank_metrics = losses.merge(rank_metrics, part.metrics)
            metrics = losses.merge(metrics, rank_metrics)
    for key, g in gradients.items():
        assert g.dtype == np.float64
        np.testing.assert_allclose(g, whole.gradients[key], rtol=1e-12, atol=0)
    np.testing.assert_array_equal(weights, whole.weights)
    np.testing.assert_allclose(sums, whole.sums, rtol=0, atol=1e-12 * (1 + np.sum(np.abs(whole.per_token))))
    merged, expected = losses.finalize(metrics), losses.finalize(whole.metrics)
    assert merged.keys() == expected.keys()
    np.testing.assert_allclose(list(merged.values()), list(expected.values()), rtol=1e-11, atol=1e-12)


@every_loss
def test_a_piece_without_rows(name):
    """A rank that got nothing: shape [0, T]."""
    batch = {key: x[:0] for key, x in random_batch(0).items()}
    per_token, metrics = ALL_LOSSES[name](batch)
    assert per_token.shape == batch["mask"].shape
    assert losses.finalize(metrics) == {}


@every_loss
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, "random"])
def test_masked_garbage_changes_nothing(name, garbage):
    clean = random_batch(7)
    dirty = dict(clean)
    rng = np.random.default_rng(8)
    for key in FLOATS:
        noise = rng.normal(0, 1e3, clean[key].shape) if garbage == "random" else garbage
        dirty[key] = np.where(clean["mask"], clean[key], noise).astype(np.float32)
    result = jitted(name)(clean)
    jax.tree.map(np.testing.assert_array_equal, result, jitted(name)(dirty))
    assert np.all(np.asarray(result.per_token)[~clean["mask"]] == 0)
    for gradient in result.gradients.values():
        assert np.all(np.asarray(gradient)[:, ~clean["mask"]] == 0)


def assert_finite(result):
    jax.tree.map(lambda x: np.testing.assert_equal(np.isfinite(x), True), result._replace(metrics={}))
    for name, value in losses.finalize(result.metrics).items():
        assert np.isfinite(value), name


LOWERED = [("logp",), ("old_logp", "ref_logp", "behaviour_logp"), ("old_logp",), ("behaviour_logp",)]


@every_loss
@pytest.mark.parametrize("lowered", LOWERED, ids="+".join)
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_one_token_at_log_ratio_1000(name, lowered, advantage):
    """One policy, or every other one, gives one token 1000 nats less: log-ratios of −1000 and +1000."""
    batch = random_batch(1)
    batch["advantages"][0] = advantage
    for key in lowered:
        batch[key][0, 0] -= 1000
    assert_finite(jitted(name)(batch))


@every_loss
def test_fully_masked_batch(name):
    batch = random_batch(2)
    batch["mask"][:] = False
    result = jitted(name)(batch)
    for x in [result.per_token, result.sums, result.weights, *result.gradients.values()]:
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
    for plain, fused in zip(ALL_LOSSES[name](batch), (compiled.per_token, compiled.metrics)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), plain, fused)


@every_loss
def test_precision_is_float32_at_least(name):
    """bfloat16 inputs give exactly what their float32 copies give; float64 stays float64."""
    batch = random_batch(5)
    half = {key: jnp.asarray(x, jnp.bfloat16) if key in FLOATS else x for key, x in batch.items()}
    single = {key: jnp.asarray(x, jnp.float32) if key in FLOATS else x for key, x in half.items()}
    from_half, from_single = ALL_LOSSES[name](half), ALL_LOSSES[name](single)
    assert {x.dtype for x in jax.tree.leaves(from_half)} == {np.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, from_half, from_single)
    with jax.enable_x64(True):
        per_token, _ = jax.eval_shape(ALL_LOSSES[name], random_batch(5, dtype=np.float64))
    assert per_token.dtype == np.float64


@every_loss
def test_only_the_policy_in_training_gets_a_gradient(name):
    gradients = jitted(name)(random_batch(6)).gradients
    assert np.any(gradients["logp"] != 0) or np.any(gradients["entropy"] != 0)
    for key in ("old_logp", "ref_logp", "behaviour_logp", "advantages"):
        assert np.all(gradients[key] == 0), key
