"""Group advantages against hand-worked values, a numpy loop over groups, and rewards that go wrong."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.advantages import ADVANTAGES, group_advantage, grpo
from jaxrl_llm.advantages.group import BASELINES, SCALES
from jaxrl_llm.losses import finalize


@cache
def jitted(scale="group", baseline="mean", epsilon=1e-6, ddof=1):
    return jax.jit(lambda *a: group_advantage(*a, scale=scale, baseline=baseline, epsilon=epsilon, ddof=ddof))


def reference(rewards, group, valid, scale, baseline, epsilon=1e-6, ddof=1):
    """The same in float64, one row at a time."""
    rewards, out = np.asarray(rewards, np.float64), np.zeros(len(rewards))
    usable = np.asarray(valid) & np.isfinite(rewards)
    for i in np.flatnonzero(usable):
        rows = usable & (group == group[i])
        if np.ptp(rewards[rows]) == 0:
            continue
        others = rows & (np.arange(len(rewards)) != i) if baseline == "leave_one_out" else rows
        of = {"group": rows, "batch": usable, "none": None}[scale]
        std = 1 if of is None else np.std(rewards[of], ddof=ddof) + epsilon
        out[i] = (rewards[i] - rewards[others].mean()) / std
    return out


def test_closed_forms():
    """Group 5 has rewards 0, 2, 4 (mean 2, sample std 2), group −1 has 1 and 2 (mean 1.5, std √½); mixed order.

    The whole batch: mean 1.8, squares 1.8² + 0.2² + 2.2² + 0.8² + 0.2² = 8.8, sample std √(8.8/4) = √2.2.
    Leaving one out: 0 − 3, 2 − 2, 4 − 1 and 1 − 2, 2 − 1.
    """
    rewards = jnp.array([0.0, 1.0, 2.0, 2.0, 4.0])
    group = jnp.array([5, -1, 5, -1, 5])
    deviation = np.array([-2, -0.5, 0, 0.5, 2])
    alone = np.array([-3, -1, 0, 1, 3])
    group_std = np.array([2, 0.5**0.5, 2, 0.5**0.5, 2])
    for baseline, difference in {"mean": deviation, "leave_one_out": alone}.items():
        for scale, std in {"none": 1, "group": group_std, "batch": 2.2**0.5}.items():
            got, metrics = jitted(scale, baseline, 0.0)(rewards, group)
            np.testing.assert_allclose(got, difference / std, rtol=1e-6, atol=1e-7)
            assert finalize(metrics) == pytest.approx(
                {
                    "reward": 1.8,
                    "reward_std": (2 + 0.5**0.5) / 2,
                    "frac_reward_zero_std": 0,
                    "nonfinite_rewards": 0,
                }
            )


def test_population_standard_deviation():
    """Rewards 0 and 1: ddof 0 gives std 1/2, ddof 1 gives √½; epsilon is added to it."""
    rewards, group = jnp.array([0.0, 1.0]), jnp.zeros(2, int)
    np.testing.assert_allclose(jitted(ddof=0)(rewards, group)[0], [-1, 1], rtol=1e-5)
    np.testing.assert_allclose(
        jitted(epsilon=0.5)(rewards, group)[0], 0.5 / (0.5**0.5 + 0.5) * np.array([-1, 1])
    )


def test_names_are_settings_of_one_function():
    rewards, group = jnp.array([1.0, 3.0, 7.0, 2.0]), jnp.array([0, 0, 0, 1])
    for name, options in {
        "group": {},
        "grpo": {},
        "dr_grpo": {"scale": "none"},
        "rloo": {"scale": "none", "baseline": "leave_one_out"},
    }.items():
        wanted = jitted(**options)(rewards, group)[0]
        np.testing.assert_allclose(ADVANTAGES[name](rewards, group)[0], wanted, rtol=1e-6)
        np.testing.assert_allclose(ADVANTAGES[name](rewards, group, jnp.ones(4, bool))[0], wanted, rtol=1e-6)
    assert len(ADVANTAGES) == 4
    np.testing.assert_allclose(
        grpo(rewards, group, epsilon=0.5, ddof=0)[0], jitted(epsilon=0.5, ddof=0)(rewards, group)[0]
    )


N = 9
REWARDS = st.one_of(
    st.floats(-3, 3, width=32),
    st.sampled_from([0.0, 0.7, 1.0, -1e8, 1e8, 1e8 + 8, float("nan"), float("inf"), -float("inf")]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rewards=st.lists(REWARDS, min_size=N, max_size=N),
    group=st.lists(st.sampled_from([-(2**31), -7, 0, 3, 2**31 - 1]), min_size=N, max_size=N),
    valid=st.lists(st.sampled_from([True, True, True, False]), min_size=N, max_size=N),
    scale=st.sampled_from(SCALES),
    baseline=st.sampled_from(BASELINES),
)
def test_ragged_groups_equal_a_loop_over_groups(rewards, group, valid, scale, baseline):
    """Any rewards, any ids in any order, any rows left out: float32 against a float64 loop."""
    rewards, group, valid = np.array(rewards, np.float32), np.array(group, np.int32), np.array(valid)
    got, metrics = jitted(scale, baseline)(rewards, group, valid)
    wanted = reference(rewards, group, valid, scale, baseline)
    assert np.all(np.isfinite(got))
    largest = np.max(np.abs(rewards[valid & np.isfinite(rewards)]), initial=0)
    tolerance = 2e-6 * (largest if scale == "none" else 1) * N
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=tolerance)
    assert np.all(np.asarray(got)[wanted == 0] == 0) or np.all(np.abs(got[wanted == 0]) <= tolerance)
    usable = valid & np.isfinite(rewards)
    groups = [rewards[usable & (group == g)].astype(np.float64) for g in set(group[usable])]
    expected = {"nonfinite_rewards": np.mean(~np.isfinite(rewards[valid]))} if valid.any() else {}
    if groups:
        expected["reward"] = rewards[usable].astype(np.float64).mean()
        expected["reward_std"] = np.mean([np.std(r, ddof=1) if len(r) > 1 else 0 for r in groups])
        expected["frac_reward_zero_std"] = np.mean([np.ptp(r) == 0 for r in groups])
    assert finalize(metrics) == pytest.approx(expected, rel=1e-5, abs=1e-6 * max(largest, 1))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(-1e8, 1e8, width=32), min_size=3, max_size=3),
    group=st.lists(st.integers(0, 2), min_size=N, max_size=N),
    scale=st.sampled_from(SCALES),
    baseline=st.sampled_from(BASELINES),
)
def test_equal_rewards_give_exactly_zero(values, group, scale, baseline):
    """Whatever the value: of eight rewards 0.7 the plain float32 formula makes 0.056."""
    rewards = np.array(values, np.float32)[group]
    got, metrics = jitted(scale, baseline)(rewards, np.array(group, np.int32), np.ones(N, bool))
    assert np.all(got == 0)
    assert finalize(metrics)["frac_reward_zero_std"] == 1 and finalize(metrics)["reward_std"] == 0


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_rows_that_cannot_count(scale, baseline):
    """A group of one, a group with one usable row, a group with none; the last group is as it is alone."""
    nan, inf = np.nan, np.inf
    rewards = np.array([3.0, nan, 5.0, inf, -inf, nan, 1.0, 2.0, 9.0], np.float32)
    group = np.array([0, 1, 1, 1, 2, 2, 3, 3, 3], np.int32)
    valid = np.array([True] * 8 + [False])
    got, metrics = jitted(scale, baseline)(rewards, group, valid)
    assert np.all(np.asarray(got)[[0, 1, 2, 3, 4, 5, 8]] == 0)
    assert got[6] == -got[7] < 0
    numbers = finalize(metrics)
    assert numbers["nonfinite_rewards"] == 4 / 8
    assert numbers["reward"] == (3 + 5 + 1 + 2) / 4
    assert numbers["frac_reward_zero_std"] == pytest.approx(2 / 3)  # groups 0 and 1 of 0, 1 and 3
    if scale != "batch":
        alone, _ = jitted(scale, baseline)(
            np.roll(rewards, 3), np.roll(group, 3), np.roll(valid & (group == 3), 3)
        )
        np.testing.assert_array_equal(np.roll(got, 3), alone)


@pytest.mark.parametrize("scale", SCALES)
def test_nothing_to_count(scale):
    empty, metrics = group_advantage(jnp.zeros(0), jnp.zeros(0, int), scale=scale)
    assert empty.shape == (0,) and finalize(metrics) == {}
    got, metrics = jitted(scale)(np.full(N, np.nan, np.float32), np.zeros(N, np.int32), np.zeros(N, bool))
    assert np.all(got == 0) and finalize(metrics) == {}


def test_large_rewards_keep_their_differences():
    """1e8, 1e8+8, 1e8+16 are neighbours in float32: deviations −8, 0, 8 and std 8, which plain sums lose."""
    rewards = np.float32(1e8) + np.array([0, 8, 16], np.float32)
    assert jitted("none")(rewards, np.zeros(3, np.int32))[0].tolist() == [-8, 0, 8]
    np.testing.assert_allclose(jitted()(rewards, np.zeros(3, np.int32))[0], [-1, 0, 1], rtol=1e-6)


def test_precision_and_gradient():
    group = jnp.array([0, 0, 1])
    for dtype, wanted in {jnp.bfloat16: "float32", jnp.int32: "float32", jnp.float32: "float32"}.items():
        assert jax.eval_shape(jitted(), jnp.zeros(3, dtype), group)[0].dtype == wanted
    with jax.enable_x64(True):
        assert jax.eval_shape(jitted(), jnp.zeros(3, jnp.float64), group)[0].dtype == "float64"
    gradient = jax.grad(lambda r: jnp.sum(jitted()(r, group)[0] ** 2))(jnp.array([1.0, 1.0, 2.0]))
    assert gradient.tolist() == [0, 0, 0]


def test_jit_changes_nothing():
    rng = np.random.default_rng(0)
    rewards, group = rng.normal(size=N).astype(np.float32), rng.integers(0, 3, N).astype(np.int32)
    plain = group_advantage(rewards, group, np.ones(N, bool))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        plain,
        jitted()(rewards, group, np.ones(N, bool)),
    )


def test_errors_name_what_is_wrong():
    rewards, group = jnp.zeros(3), jnp.zeros(3, int)
    with pytest.raises(ValueError, match="scale 'std'; one of group, batch, none"):
        group_advantage(rewards, group, scale="std")
    with pytest.raises(ValueError, match="baseline 'median'; one of mean, leave_one_out"):
        group_advantage(rewards, group, baseline="median")
    with pytest.raises(ValueError, match=r"rewards \(3,\), group \(2,\)"):
        group_advantage(rewards, group[:2])
