"""Group advantages against hand-worked values, a numpy loop over groups, and rewards that go wrong."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.advantages import (
    ADVANTAGES,
    batch_statistics,
    dr_grpo,
    group_advantage,
    grpo,
    hacpo,
    merge_statistics,
    opo,
    reinforce_plus_plus_baseline,
)
from jaxrl_llm.advantages.group import BASELINES, SCALES
from jaxrl_llm.losses import finalize


@cache
def jitted(scale="group", baseline="mean"):
    def f(rewards, group, valid, epsilon=1e-6):
        return group_advantage(rewards, group, valid, scale=scale, baseline=baseline, epsilon=epsilon)

    return jax.jit(f)


def reference(rewards, group, valid, scale, baseline):
    """The same in float64, one row at a time; NaN where the advantage must be exactly 0."""
    rewards, out = np.asarray(rewards, np.float64), np.full(len(rewards), np.nan)
    usable = np.asarray(valid) & np.isfinite(rewards)
    for i in np.flatnonzero(usable):
        rows = usable & (group == group[i])
        if np.ptp(rewards[rows]) == 0:
            continue
        others = rows & (np.arange(len(rewards)) != i) if baseline == "leave_one_out" else rows
        of = {"group": rows, "batch": usable, "none": None}[scale]
        std = 1 if of is None else np.std(rewards[of], ddof=1) + 1e-6
        out[i] = (rewards[i] - rewards[others].mean()) / std
    return out


# Group 5 has rewards 0, 2, 4: mean 2, sample std 2. Group −1 has 1 and 2: mean 1.5, sample std √½.
# The batch has mean 1.8, squares 1.8² + 0.8² + 0.2² + 0.2² + 2.2² = 8.8, sample std √(8.8/4) = √2.2.
REWARDS = jnp.array([0.0, 1.0, 2.0, 2.0, 4.0])
GROUP = jnp.array([5, -1, 5, -1, 5])
DEVIATION = np.array([-2, -0.5, 0, 0.5, 2])
FROM_OTHERS = np.array([-3, -1, 0, 1, 3])  # 0 − 3, 1 − 2, 2 − 2, 2 − 1, 4 − 1
GROUP_STD = np.array([2, 0.5**0.5, 2, 0.5**0.5, 2])


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)


def test_closed_forms():
    for baseline, difference in {"mean": DEVIATION, "leave_one_out": FROM_OTHERS}.items():
        for scale, std in {"none": 1, "group": GROUP_STD, "batch": 2.2**0.5}.items():
            got, metrics = group_advantage(REWARDS, GROUP, scale=scale, baseline=baseline, epsilon=0.5)
            close(got, difference / (std + (0 if scale == "none" else 0.5)))
            assert finalize(metrics) == pytest.approx(
                {"reward": 1.8, "reward_std": (2 + 0.5**0.5) / 2}
                | {"frac_reward_zero_std": 0, "nonfinite_rewards": 0}
            )


def test_names_are_settings_of_one_function():
    wanted = {"group": DEVIATION / GROUP_STD, "grpo": DEVIATION / GROUP_STD}
    wanted |= {"dr_grpo": DEVIATION, "rloo": FROM_OTHERS, "hacpo": DEVIATION / GROUP_STD}
    for name, values in wanted.items():
        np.testing.assert_allclose(ADVANTAGES[name](REWARDS, GROUP)[0], values, rtol=2e-6)
        # without its last row group 5 is 0 and 2: deviations ∓1, std √2, differences from the other ∓2
        short, _ = ADVANTAGES[name](REWARDS, GROUP, jnp.arange(5) < 4)
        np.testing.assert_allclose(
            short[jnp.array([0, 2, 4])],
            np.array([-1, 1, 0]) * {"dr_grpo": 1, "rloo": 2}.get(name, 0.5**0.5),
            rtol=2e-6,
        )


def test_sample_weights_move_the_baseline_alone():
    """Group 5: mean of 3·0, 0.5·2, 2·4 is 3 instead of 2; group −1: of 2·1, 1·2 it is 2 instead of 1.5."""
    weight = jnp.array([3.0, 2.0, 0.5, 1.0, 2.0])
    baseline = np.where(GROUP == 5, 3, 2)
    close(
        hacpo(REWARDS, GROUP, sample_weight=weight, epsilon=0.5)[0], (REWARDS - baseline) / (GROUP_STD + 0.5)
    )
    close(group_advantage(REWARDS, GROUP, scale="none", sample_weight=weight)[0], REWARDS - baseline)
    # without its last row the baseline of group 5 is (0 + 1) / 2
    short, _ = group_advantage(REWARDS, GROUP, jnp.arange(5) < 4, scale="none", sample_weight=weight)
    close(short, [-0.5, -1, 1.5, 0, 0])
    for garbage in (np.nan, np.inf):  # in rows that do not count
        dirty = REWARDS.at[4].set(garbage), GROUP
        got, _ = group_advantage(*dirty, scale="none", sample_weight=weight.at[4].set(garbage))
        np.testing.assert_array_equal(got, short)


def test_capabilities():
    """HACPO's baseline is the learner's own mean where the ratio of agents is the same on every prompt.

    Agent 1 is half as good as agent 0 on both prompts, so ω = (1, 2) for learner 0 and (½, 1) for learner 1.
    """
    rewards, group, agent = jnp.array([0.4, 0.2, 0.8, 0.4]), jnp.array([0, 0, 1, 1]), jnp.array([0, 1, 0, 1])
    for learner, (own, weight) in enumerate(zip(([0.4, 0.8], [0.2, 0.4]), ([1.0, 2.0], [0.5, 1.0]))):
        got, _ = hacpo(rewards, group, sample_weight=jnp.array(weight)[agent], epsilon=0.0)
        std = jnp.array([0.02, 0.08])[group] ** 0.5  # (0.1² + 0.1²)/1 and (0.2² + 0.2²)/1
        close(got, (rewards - jnp.array(own)[group]) / std)
        assert float(got[learner]) == pytest.approx(0, abs=1e-6)
    scaled, _ = hacpo(7 * rewards, group, sample_weight=jnp.array([0.5, 1.0])[agent], epsilon=0.0)
    np.testing.assert_allclose(scaled, got, rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    rewards=st.lists(st.floats(-3, 3, width=32, allow_subnormal=False), min_size=9, max_size=9),
    weight=st.floats(0.1, 10),
)
def test_weights_of_one_and_equal_rewards(rewards, weight):
    """ω = 1 is GRPO bit by bit; a group of equal rewards gets 0 under any ω."""
    rewards, group = jnp.array(rewards), jnp.arange(9) % 3
    plain, weighted = (hacpo(rewards, group, sample_weight=w)[0] for w in (None, jnp.ones(9)))
    np.testing.assert_array_equal(plain, weighted)
    assert np.all(hacpo(rewards[group], group, sample_weight=jnp.full(9, weight))[0] == 0)


def test_opo():
    """Group 5: lengths 1, 3, 4 of 0, 2, 4 make (6 + 16)/8 = 2.75; group −1: 2, 6 of 1, 2 make 14/8 = 1.75."""
    lengths, baseline = jnp.array([1, 2, 3, 6, 4]), np.where(GROUP == 5, 2.75, 1.75)
    got, metrics = opo(REWARDS, GROUP, lengths=lengths)
    close(got, REWARDS - baseline)
    assert finalize(metrics)["reward"] == pytest.approx(1.8)
    # without its last row the baseline of group 5 is 6/4; a row without a number has no length either
    for rewards, valid in ((REWARDS, jnp.arange(5) < 4), (REWARDS.at[4].set(jnp.inf), None)):
        close(opo(rewards, GROUP, valid, lengths=lengths)[0], [-1.5, -0.75, 0.5, 0.25, 0])
    close(opo(REWARDS, GROUP, lengths=jnp.full(5, 7))[0], DEVIATION)
    close(opo(REWARDS, GROUP, lengths=jnp.zeros(5, int))[0], DEVIATION)  # rows without tokens


def test_opo_has_the_least_variance_where_gradients_grow_with_length():
    """Of baselines b, Σ_i len_i·(r_i − b)² is smallest at OPO's: a row's squared gradient is len·(r − b)²."""
    lengths = jnp.array([1.0, 2, 3, 6, 4])
    advantages, _ = opo(REWARDS, GROUP, lengths=lengths)
    spread = [float(jnp.sum(lengths * (advantages - shift) ** 2)) for shift in (-0.1, 0.0, 0.1)]
    assert spread[1] < min(spread[0], spread[2])


def test_reinforce_plus_plus_baseline():
    """d = −2, −½, 0, ½, 2 over rows: variance 8.5/4. Over tokens of lengths 1, 2, 3, 2, 1, nine in all, the
    mean is 0 and the variance (4 + ½ + ½ + 4)/8; with lengths 1, 2, 3, 2, 9 the mean is 16/17."""
    got, _ = reinforce_plus_plus_baseline(REWARDS, GROUP, epsilon=0.5)
    close(got, DEVIATION / ((8.5 / 4) ** 0.5 + 0.5))
    got, _ = reinforce_plus_plus_baseline(REWARDS, GROUP, lengths=jnp.array([1, 2, 3, 2, 1]), epsilon=0.0)
    close(got, DEVIATION / (9 / 8) ** 0.5)
    lengths = jnp.array([1, 2, 3, 2, 9])
    tokens = np.repeat(DEVIATION, lengths)
    got, _ = reinforce_plus_plus_baseline(REWARDS, GROUP, lengths=lengths, epsilon=0.0)
    close(got, (DEVIATION - 16 / 17) / tokens.std(ddof=1))
    # the group of equal rewards counts in the mean, and gets 0
    rewards = REWARDS.at[3].set(1.0)
    got, _ = reinforce_plus_plus_baseline(rewards, GROUP, lengths=lengths, epsilon=0.0)
    assert got[1] == got[3] == 0
    tokens = np.repeat([-2, 0, 0, 0, 2], lengths)
    close(got[2], -tokens.mean() / tokens.std(ddof=1))


def test_batch_statistics_of_pieces():
    """Both halves of a batch that is cut between its groups, by the statistics of the whole."""
    pieces, lengths = [GROUP == 5, GROUP == -1], jnp.array([1, 2, 3, 2, 9])
    deviations = [dr_grpo(REWARDS, GROUP, piece)[0] for piece in pieces]
    total = merge_statistics(*(batch_statistics(REWARDS, piece) for piece in pieces))
    centred = merge_statistics(*(batch_statistics(d, p, weight=lengths) for d, p in zip(deviations, pieces)))
    for function, options, whole in [
        (group_advantage, {"scale": "batch", "statistics": total}, {"scale": "batch"}),
        (reinforce_plus_plus_baseline, {"statistics": centred}, {"lengths": lengths}),
    ]:
        wanted, _ = function(REWARDS, GROUP, **whole)
        for piece in pieces:
            close(function(REWARDS, GROUP, piece, **options)[0], np.where(piece, wanted, 0))


def test_population_standard_deviation():
    """Two rows at ±1/2 from their mean: √(½/1) with ddof 1, √(½/2) with 0. Three at ±2: √(8/3) with 0."""
    close(grpo(REWARDS, GROUP, epsilon=0.5, ddof=1)[0], DEVIATION / (GROUP_STD + 0.5))
    population = np.where(GROUP == 5, (8 / 3) ** 0.5, 0.5)
    close(grpo(REWARDS, GROUP, epsilon=0.0, ddof=0)[0], DEVIATION / population)


N = 9
ANY_REWARD = st.one_of(
    st.floats(-3, 3, width=32, allow_subnormal=False),
    st.sampled_from([0.0, 0.7, 1.0, -1e8, 1e8, 1e8 + 8, float("nan"), float("inf"), -float("inf")]),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rewards=st.lists(ANY_REWARD, min_size=N, max_size=N),
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
    largest = float(np.max(np.abs(rewards[valid & np.isfinite(rewards)]), initial=0))
    tolerance = 2e-6 * (largest if scale == "none" else 1) * N
    must_be_zero = np.isnan(wanted)
    assert np.all(np.asarray(got)[must_be_zero] == 0)
    np.testing.assert_allclose(got, np.where(must_be_zero, 0, wanted), rtol=1e-4, atol=tolerance)
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
    values=st.lists(st.floats(-1e8, 1e8, width=32, allow_subnormal=False), min_size=3, max_size=3),
    group=st.lists(st.integers(0, 2), min_size=N, max_size=N),
    scale=st.sampled_from(SCALES),
    baseline=st.sampled_from(BASELINES),
    epsilon=st.sampled_from([0.0, 1e-6]),
)
def test_equal_rewards_give_exactly_zero(values, group, scale, baseline, epsilon):
    """Whatever the value: of eight rewards 0.7 the plain float32 formula makes 0.056."""
    rewards = np.array(values, np.float32)[group]
    arrays = rewards, np.array(group, np.int32), np.ones(N, bool)
    got, metrics = jitted(scale, baseline)(*arrays, epsilon)
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
    """1e8, 1e8+8, ... are neighbours in float32: deviations −16 to 16, which plain sums lose."""
    rewards = np.float32(1e8) + 8 * np.arange(5, dtype=np.float32)
    group = np.zeros(5, np.int32)
    assert group_advantage(rewards, group, scale="none")[0].tolist() == [-16, -8, 0, 8, 16]
    close(grpo(rewards, group)[0], np.arange(-2, 3) / 2.5**0.5)


def test_precision_and_gradient():
    for dtype, wanted in {jnp.bfloat16: "float32", jnp.int32: "float32", jnp.float32: "float32"}.items():
        assert jax.eval_shape(group_advantage, jnp.zeros(5, dtype), GROUP)[0].dtype == wanted
    with jax.enable_x64(True):
        assert jax.eval_shape(group_advantage, jnp.zeros(5, jnp.float64), GROUP)[0].dtype == "float64"
    gradient = jax.grad(lambda r: jnp.sum(grpo(r, GROUP)[0] ** 3))(REWARDS)
    assert gradient.tolist() == [0] * 5


def test_jit_changes_nothing():
    jax.tree.map(close, group_advantage(REWARDS, GROUP), jitted()(REWARDS, GROUP, jnp.ones(5, bool)))


def test_errors_name_what_is_wrong():
    rewards, group = jnp.zeros(3), jnp.zeros(3, int)
    with pytest.raises(ValueError, match="scale 'std'; one of group, batch, none"):
        group_advantage(rewards, group, scale="std")
    with pytest.raises(ValueError, match="baseline 'median'; one of mean, leave_one_out"):
        group_advantage(rewards, group, baseline="median")
    with pytest.raises(ValueError, match=r"rewards \(3,\), group \(2,\)"):
        group_advantage(rewards, group[:2])
    with pytest.raises(ValueError, match=r"sample_weight \(2,\)"):
        group_advantage(rewards, group, sample_weight=jnp.ones(2))
    with pytest.raises(ValueError, match=r"lengths \(2,\)"):
        opo(rewards, group, lengths=jnp.ones(2))
    with pytest.raises(ValueError, match="baseline 'leave_one_out' has none"):
        group_advantage(rewards, group, sample_weight=jnp.ones(3), baseline="leave_one_out")
