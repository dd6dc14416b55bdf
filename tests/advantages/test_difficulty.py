"""HA-DW: the closed forms of its weights, its two anchors, and the bias that it corrects."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.advantages import (
    ADVANTAGES,
    baseline_bias,
    dr_grpo,
    grpo,
    ha_dw,
    ha_dw_anchor,
    ha_dw_init,
    ha_dw_update,
    ha_dw_weights,
    rloo,
)
from jaxrl_llm.losses import finalize

# Group 3: one success of four, p̂ = ¼. Group −1: p̂ = ¾. Group 0: only successes.
REWARDS = jnp.array([1.0, 0, 0, 0, 1, 1, 1, 0, 1, 1])
GROUP = jnp.array([3, 3, 3, 3, -1, -1, -1, -1, 0, 0])
up, down = math.exp(0.25), math.exp(-0.25)


@pytest.mark.parametrize("base", [grpo, rloo])
def test_closed_form(base):
    """Anchor ½, λ = 1.5: a success has λ·e^¼ if the prompt is hard, λ·e^−¼ if easy; a failure the reverse."""
    advantages, _ = base(REWARDS, GROUP)
    weights, metrics = ha_dw_weights(advantages, REWARDS, GROUP, anchor=0.5, weight_scale=1.5)
    np.testing.assert_allclose(
        weights, 1.5 * np.array([up] + [down] * 3 + [down] * 3 + [up] + [1, 1]), rtol=1e-6
    )
    mean = 1.5 * (2 * up + 6 * down) / 8  # the group of equal rewards has no advantage to weigh
    assert finalize(metrics) == pytest.approx({"ha_dw/weight": mean, "ha_dw/clamped_ratio": 0})


def test_as_one_function():
    """GRPO's advantage times the weight, by default against the batch's own accuracy, 6/10."""
    plain, numbers = grpo(REWARDS, GROUP)
    for anchor, used in ((None, 0.6), (0.5, 0.5)):
        weights, more = ha_dw_weights(plain, REWARDS, GROUP, anchor=used)
        got, metrics = ADVANTAGES["ha_dw"](REWARDS, GROUP, anchor=anchor)
        np.testing.assert_allclose(got, plain * weights, rtol=1e-6)
        assert finalize(metrics) == pytest.approx(finalize(numbers | more))
    assert got[-2:].tolist() == [0, 0]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rewards=st.lists(st.sampled_from([0.0, 1.0, float("nan")]), min_size=10, max_size=10),
    valid=st.lists(st.sampled_from([True, True, False]), min_size=10, max_size=10),
    anchor=st.floats(0, 1),
    scale=st.floats(0.5, 2),
)
def test_properties(rewards, valid, anchor, scale):
    """Signs stay; λ/e ≤ Φ ≤ λ·e; a success's factor times a failure's is λ²; no weight at λ = 1, p̂ = C."""
    rewards, valid = jnp.array(rewards), jnp.array(valid)
    plain, _ = grpo(rewards, GROUP, valid)
    weights, _ = ha_dw_weights(plain, rewards, GROUP, valid, anchor=anchor, weight_scale=scale)
    got, _ = ha_dw(rewards, GROUP, valid, anchor=anchor, weight_scale=scale)
    assert np.all(np.sign(got) == np.sign(plain))
    assert np.all(weights >= scale / math.e * 0.999) and np.all(weights <= scale * math.e * 1.001)
    usable = np.asarray(valid & jnp.isfinite(rewards))
    for g in set(GROUP.tolist()):
        rows = usable & (np.asarray(GROUP) == g)
        for a in np.flatnonzero(rows & (np.asarray(rewards) == 1)):
            for b in np.flatnonzero(rows & (np.asarray(rewards) == 0)):
                assert float(weights[a] * weights[b]) == pytest.approx(scale**2, rel=1e-5)
        if rows.any():
            level = float(np.asarray(rewards)[rows].mean())
            same, _ = ha_dw(rewards, GROUP, valid, anchor=level, weight_scale=1.0)
            np.testing.assert_allclose(same[rows], plain[rows], rtol=1e-6)


def test_effective_baseline():
    """A weighted success of reward 1 − p̂ above its baseline is one above 1 − Φ·(1 − p̂), without the std."""
    advantages = REWARDS - jnp.array([0.25, 0.75, 1.0])[jnp.array([0] * 4 + [1] * 4 + [2] * 2)]
    weights, _ = ha_dw_weights(advantages, REWARDS, GROUP, anchor=0.5, weight_scale=1.3)
    np.testing.assert_allclose(1 - weights[0] * advantages[0], 1 - 1.3 * up * 0.75, rtol=1e-5)
    assert 1 - weights[0] * advantages[0] < 0.25  # lower than p̂ on the hard prompt, as the bias asks for


def test_rewards_that_are_no_accuracies_stay_finite():
    rewards, group = jnp.array([1e8, 0.0, -1e8, jnp.inf]), jnp.zeros(4, int)
    got, metrics = ha_dw(rewards, group, anchor=0.5 + 1e7)
    assert np.all(np.isfinite(got)) and finalize(metrics)["ha_dw/clamped_ratio"] == 1
    assert jax.grad(lambda r: jnp.sum(ha_dw(r, group, anchor=r[0])[0]))(rewards).tolist() == [0] * 4


def kept_groups(size):
    """All groups of `size` rewards 0 and 1 with both among them: [groups, size]."""
    return np.array([[k >> i & 1 for i in range(size)] for k in range(1, 2**size - 1)], np.float32)


def chances(outcomes, p):
    """Of each group, given that it is kept."""
    weight = np.prod(np.where(outcomes > 0, p, 1 - p), axis=1)
    return weight / weight.sum()


@pytest.mark.parametrize("p, anchor, success", [(0.1, 0.3, True), (0.9, 0.7, False)])
def test_weights_correct_the_bias_of_kept_groups(p, anchor, success):
    """Over all 2^8 − 2 groups of eight with a success and a failure, weighed by their probability.

    The true advantage of a success at p = 0.1 is 0.9. Its mean over kept groups is
    1 − [1 + 7(p − p^7)/(1 − p^7)]/8 = 0.7875; the weights bring it nearer. p = 0.9 is the mirror image.
    """
    outcomes = kept_groups(8)
    rewards, group = outcomes.ravel(), np.repeat(np.arange(254), 8)
    advantages = (outcomes - outcomes.mean(1, keepdims=True)).ravel()
    weights, _ = ha_dw_weights(advantages, rewards, group, anchor=anchor, weight_scale=1.0)
    chance = chances(outcomes, p).repeat(8) * (rewards == success)
    truth = success - p
    plain = np.sum(chance * advantages) / chance.sum()
    weighted = np.sum(chance * advantages * weights) / chance.sum()
    assert abs(plain) == pytest.approx(1 - (1 + 7 * (0.1 - 0.1**7) / (1 - 0.1**7)) / 8, rel=1e-5)
    assert abs(weighted - truth) < 0.5 * abs(plain - truth)


@pytest.mark.parametrize("size", [2, 5, 8])
def test_bias_of_the_baseline(size):
    """Closed form against enumeration: E[p̂|kept] − p and given a success or a failure, and the tail of p̂ − p.

    It is odd around ½, positive below and negative above, and smaller in larger groups. The advantages
    themselves average to 0 over the rows of kept groups.
    """
    outcomes = kept_groups(size)
    advantages, _ = dr_grpo(outcomes.ravel(), np.arange(len(outcomes)).repeat(size))
    means = (outcomes.ravel() - np.asarray(advantages)).reshape(outcomes.shape)[:, 0]  # the baselines
    for p in (0.05, 0.1, 0.3, 0.5, 0.7, 0.95):
        chance = chances(outcomes, p)
        bias = float(baseline_bias(jnp.float32(p), size))
        assert bias == pytest.approx(chance @ means - p, abs=1e-6)
        assert bias == pytest.approx(-float(baseline_bias(jnp.float32(1 - p), size)), abs=1e-6)
        assert np.sign(round(bias, 6)) == np.sign(0.5 - p) and (
            abs(bias) >= abs(float(baseline_bias(jnp.float32(p), size + 1))) - 1e-7
        )
        assert np.sum(chance * np.asarray(advantages).reshape(outcomes.shape).mean(1)) == pytest.approx(
            0, abs=1e-6
        )
        by_outcome = [chance * np.mean(outcomes == r, axis=1) for r in (1, 0)]
        given_success, given_failure = (weight @ means / weight.sum() for weight in by_outcome)
        others = (size - 1) * (p - p ** (size - 1)) / (1 - p ** (size - 1)) if size > 2 else 0
        assert given_success == pytest.approx((1 + others) / size, rel=1e-5)
        assert given_failure == pytest.approx((size - 1) * p / (size * (1 - (1 - p) ** (size - 1))), rel=1e-5)
        for margin in (0.01, 0.15):
            counts = range(math.floor(size * (p + margin)) + 1, size)
            tail = sum(math.comb(size, k) * p**k * (1 - p) ** (size - k) for k in counts)
            wanted = tail / (1 - (1 - p) ** size - p**size)
            assert np.sum(chance[means - p > margin]) == pytest.approx(wanted, abs=1e-6)
        if p < 1 / size:  # one success is already too many
            assert np.all(means > p)


def test_bias_by_hand():
    """G = 2: kept groups have p̂ = ½, so the bias is ½ − p; the paper's numbers for G = 8."""
    np.testing.assert_allclose(baseline_bias(jnp.array([0.1, 0.5, 0.8]), 2), [0.4, 0, -0.3], atol=1e-7)
    np.testing.assert_allclose(baseline_bias(jnp.array([0.1, 0.3]), 8), [0.0756, 0.0183], atol=5e-5)
    np.testing.assert_allclose(baseline_bias(jnp.float32(1e-6), 8), 1 / 8, rtol=1e-4)
    with pytest.raises(ValueError, match="group_size=1"):
        baseline_bias(jnp.float32(0.5), 1)


def test_weights_correct_within_an_interval():
    """λ·c is nearer the true advantage than a exactly for |λ·c − A| < |a − A|; the paper's 1.3 not always is.

    With A = r − p, a = E[Â|kept, r], λ·c = E[Â·Φ|kept, r] and the anchor at p itself, 1.3 brings successes at
    p ≤ 0.35 and failures at p ≥ 0.65 nearer, the prompts' rare outcomes, and nothing else.
    """
    outcomes = kept_groups(8)
    rewards, group = outcomes.ravel(), np.arange(254).repeat(8)
    advantages, _ = dr_grpo(rewards, group)
    weigh = jax.jit(
        lambda anchor, scale: ha_dw_weights(advantages, rewards, group, anchor=anchor, weight_scale=scale)[0]
    )
    better = {1: [], 0: []}
    for p in np.arange(1, 20) / 20:
        for r in (1, 0):
            chance = np.repeat(chances(outcomes, p), 8) * (rewards == r)
            chance /= chance.sum()
            plain, (c, *scaled) = (
                chance @ advantages,
                [chance @ (advantages * weigh(p, scale)) for scale in (1.0, 1.1, 1.3, 1.5)],
            )
            error = abs(plain - (r - p))
            for scale, weighted in zip((1.1, 1.3, 1.5), scaled):
                is_inside = abs(scale * c - (r - p)) < error
                assert is_inside == (abs(weighted - (r - p)) < error)
            if abs(scaled[1] - (r - p)) < error:
                better[r].append(round(p, 2))
    assert better[1] == [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35]
    assert better[0] == [0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]


def test_weighted_advantages_do_not_add_up_to_zero():
    """Group 3 has A = ¾ and three times −¼, hard: up·¾ − down·¾ = ¾·2·sinh ¼ with λ = 1 and the anchor ½."""
    advantages, _ = dr_grpo(REWARDS[:4], GROUP[:4])
    weights, _ = ha_dw_weights(advantages, REWARDS[:4], GROUP[:4], anchor=0.5, weight_scale=1.0)
    assert float(jnp.sum(weights * advantages)) == pytest.approx(1.5 * math.sinh(0.25), rel=1e-5)


def run(accuracies, **options):
    """Beliefs after each batch, by one jitted update."""
    update = jax.jit(lambda state, y: ha_dw_update(state, y, **options))
    state, beliefs = ha_dw_init(3), []
    for y in accuracies:
        state = update(state, y)
        beliefs.append(float(state.belief))
    return state, beliefs


def test_window_is_a_moving_mean():
    _, beliefs = run([0.5, 0.25, 0.75, 1.0, 0.0], form="window")
    np.testing.assert_allclose(beliefs, [0.5, 0.375, 0.5, 2 / 3, 1.75 / 3], rtol=1e-6)
    state = ha_dw_init(1)
    for y in (0.3, 0.9):
        state = ha_dw_update(state, y, form="window")
        assert float(state.belief) == pytest.approx(y)


def test_filter_against_numpy():
    """C ← C + η(y − C), η = clip(2σ, 0.01, 1) of the last three beliefs; the first batch sets C."""
    accuracies, history, expected = [0.5, 0.9, 0.1, 0.8, 0.8, 0.2, 0.6], [], []
    for y in accuracies:
        prior = history[-1] if history else y
        gain = np.clip(2 * np.std(history[-3:]) if history else 0, 0.01, 1)
        history.append(prior + gain * (y - prior))
        expected.append(history[-1])
    _, beliefs = run(accuracies, form="filter", gain=2.0)
    np.testing.assert_allclose(beliefs, expected, rtol=1e-5)
    assert len({round(b, 6) for b in beliefs}) == len(beliefs)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    accuracies=st.lists(st.floats(0, 1), min_size=1, max_size=12),
    form=st.sampled_from(["filter", "window"]),
)
def test_beliefs_stay_among_the_observations(accuracies, form):
    _, beliefs = run(accuracies, form=form, gain=50.0)
    assert min(accuracies) - 1e-6 <= min(beliefs) and max(beliefs) <= max(accuracies) + 1e-6


@pytest.mark.parametrize("form", ["filter", "window"])
def test_warm_up_and_batches_without_rows(form):
    """Before the first batch the anchor is that batch's accuracy; a NaN accuracy changes nothing at all."""
    state = ha_dw_init(3)
    assert float(ha_dw_anchor(state, 0.75)) == 0.75
    jax.tree.map(np.testing.assert_array_equal, ha_dw_update(state, jnp.nan, form=form), state)
    state = ha_dw_update(state, 0.75, form=form)
    assert float(ha_dw_anchor(state, 0.5)) == float(state.belief) == 0.75
    jax.tree.map(np.testing.assert_array_equal, ha_dw_update(state, jnp.nan, form=form), state)
    assert int(state.seen) == 1


def test_a_still_filter_moves_again_by_the_least_gain():
    state, _ = run([0.5] * 5)
    assert float(ha_dw_update(state, 1.0).belief) == pytest.approx(0.505)
    assert float(ha_dw_update(state, 1.0, min_gain=0.0).belief) == 0.5


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="form 'kalman'; one of filter, window"):
        ha_dw_update(ha_dw_init(), 0.5, form="kalman")
    with pytest.raises(ValueError, match="size=0"):
        ha_dw_init(0)
    with pytest.raises(ValueError, match=r"advantages \(2,\), rewards \(10,\)"):
        ha_dw_weights(jnp.zeros(2), REWARDS, GROUP, anchor=0.5)
