"""Reductions against hand-worked sums and numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import AGGREGATIONS, EffectiveSize, Max, Min, WeightedSum, aggregate, finalize, merge
from jaxrl_llm.losses.aggregation import masked_max, masked_min, masked_sum

LOSS = np.array([[1, 2, 3, 9], [5, 9, 9, 9], [9, 9, 9, 9]], np.float32)
MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)


@pytest.mark.parametrize(
    "mode, total, weight, weight_with_empty",
    [
        ("token_mean", 11, 4, 4),  # 1 + 2 + 3 + 5 over 4 tokens
        ("seq_mean_token_mean", 7, 2, 3),  # 6/3 + 5/1
        ("seq_mean_token_sum", 11, 2, 3),
        ("seq_mean_token_sum_norm", 1.1, 2, 3),  # 11/10
    ],
)
def test_closed_forms(mode, total, weight, weight_with_empty):
    got = aggregate(LOSS, MASK, mode, norm=10)
    assert float(got.sum) == pytest.approx(total) and float(got.weight) == weight
    got = aggregate(LOSS, MASK, mode, norm=10, count_empty=True)
    assert float(got.sum) == pytest.approx(total) and float(got.weight) == weight_with_empty


@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize("count_empty", [False, True])
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_two_pieces_of_their_own_width_are_the_whole(mode, count_empty, cut):
    """Every loss is a multiple of 12, so that no division by 1 to 4 tokens rounds."""
    lengths = [3, 1, 4, 0, 2]
    loss = np.arange(20, dtype=np.float32).reshape(5, 4) * 12
    mask = np.arange(4) < np.array(lengths)[:, None]
    options = {"mode": mode, "count_empty": count_empty, "norm": 4}
    whole = aggregate(loss, mask, **options)
    parts = [
        aggregate(loss[rows, :width], mask[rows, :width], **options)
        for rows in (slice(0, cut), slice(cut, 5))
        for width in [max(lengths[rows], default=0)]
    ]
    assert float(whole.sum) == float(parts[0].sum + parts[1].sum)
    assert float(whole.weight) == float(parts[0].weight + parts[1].weight)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"per_token \(3, 4\), mask \(3, 3\)"):
        aggregate(LOSS, MASK[:, :3])
    with pytest.raises(ValueError, match="'mean'; one of token_mean"):
        aggregate(LOSS, MASK, "mean")
    with pytest.raises(ValueError, match="needs norm"):
        aggregate(LOSS, MASK, "seq_mean_token_sum_norm")


def test_merge_and_finalize_equal_numpy():
    """Three unequal pieces, one of them empty, against numpy on all numbers at once."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=17).astype(np.float32)
    mask = rng.random(17) > 0.3

    def metrics(piece):
        total, square = masked_sum(x[piece], mask[piece]), masked_sum(x[piece] ** 2, mask[piece])
        return {
            "mean": total,
            "max": masked_max(x[piece], mask[piece]),
            "min": masked_min(x[piece], mask[piece]),
            "size": EffectiveSize(total.sum, square.sum, total.weight),
        }

    merged = {}
    for piece in (slice(0, 4), slice(4, 4), slice(4, 17)):
        merged = merge(merged, metrics(piece))
    y = x[mask].astype(np.float64)
    expected = {
        "mean": y.mean(),
        "max": y.max(),
        "min": y.min(),
        "size": y.sum() ** 2 / (len(y) * (y**2).sum()),
    }
    got = finalize(merged)
    assert list(got) == list(expected)
    assert got == pytest.approx(expected, rel=1e-5)


def test_merge_keeps_what_only_one_piece_has():
    one, two = WeightedSum(jnp.float32(1), jnp.float32(2)), Max(jnp.float32(3))
    assert finalize(merge({"a": one}, {"b": two})) == {"a": 0.5, "b": 3.0}
    with pytest.raises(TypeError, match="'a' is a WeightedSum here and a Max there"):
        merge({"a": one}, {"a": two})


def test_nothing_is_left_out_of_finalize_but_nothing():
    """A mean or extreme over nothing has no value; one that is not a number must be seen."""
    zero, nan = jnp.float32(0), jnp.float32(np.nan)
    empty = jnp.zeros(0, bool)
    assert finalize({"a": WeightedSum(zero, zero), "b": EffectiveSize(zero, zero, zero)}) == {}
    assert finalize({"a": masked_max(zero, empty), "b": masked_min(zero, empty)}) == {}
    got = finalize({"a": WeightedSum(nan, zero + 1), "b": Max(nan), "c": Min(nan)})
    assert set(got) == {"a", "b", "c"} and all(np.isnan(x) for x in got.values())
