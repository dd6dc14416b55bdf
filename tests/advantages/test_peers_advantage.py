"""XGRPO by enumeration of a bandit; capabilities against a loop, and when HACPO's baseline is unbiased."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.advantages import (
    capability,
    capability_init,
    capability_ratios,
    capability_update,
    group_advantage,
    grpo,
    hacpo,
    xgrpo,
)

PI, PEER = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.1, 0.8])
VALUE = np.array([0.0, 1.0, 0.25])
OUTCOMES = np.array(list(itertools.product(range(3), repeat=3)))  # two own draws, one of the peer
GROUP = np.arange(27).repeat(3)
IS_PEER = np.tile([False, False, True], 27)


def mean_gradient(advantages):
    """E[½ Σ_own A_i·∇log π(a_i)] by the logits, over all 27 outcomes."""
    chance = PI[OUTCOMES[:, 0]] * PI[OUTCOMES[:, 1]] * PEER[OUTCOMES[:, 2]]
    score = np.eye(3)[OUTCOMES[:, :2]] - PI
    return np.einsum("o,oi,oiz->z", chance, np.asarray(advantages).reshape(27, 3)[:, :2], score) / 2


def test_peers_change_the_scale_and_not_the_direction():
    """(1 − 1/(G + G′)) = 2/3 of the gradient of E[r], where GRPO without std has 1 − 1/G = 1/2 of it."""
    rewards = VALUE[OUTCOMES].ravel().astype(np.float32)
    exact = PI * (VALUE - PI @ VALUE)
    pooled, _ = xgrpo(rewards, GROUP, is_peer=IS_PEER, scale="none")
    np.testing.assert_allclose(mean_gradient(pooled), 2 / 3 * exact, atol=1e-7)
    own, _ = group_advantage(rewards, GROUP, ~IS_PEER, scale="none")
    np.testing.assert_allclose(mean_gradient(own), 1 / 2 * exact, atol=1e-7)


def test_a_prompt_without_own_success():
    """Two failures beside one peer success: mean ⅓, std √⅓, so −1/√3 each; the mean gradient is 0."""
    rewards = np.where(IS_PEER, 1.0, 0.0)
    got, _ = xgrpo(rewards, GROUP, is_peer=IS_PEER, epsilon=0.0)
    np.testing.assert_allclose(got, np.where(IS_PEER, 0, -(3**-0.5)), rtol=1e-6)
    np.testing.assert_allclose(mean_gradient(got), 0, atol=1e-7)
    assert np.all(xgrpo(rewards, GROUP, ~IS_PEER, is_peer=IS_PEER)[0] == 0)  # without the peer


@pytest.mark.parametrize("is_peer", [None, jnp.zeros(81, bool)])
def test_without_peers_it_is_grpo(is_peer):
    rewards = np.random.default_rng(0).random(81).astype(np.float32)
    np.testing.assert_array_equal(xgrpo(rewards, GROUP, is_peer=is_peer)[0], grpo(rewards, GROUP)[0])


update = jax.jit(capability_update)
mean_rewards = st.one_of(st.floats(0, 1, width=32, allow_subnormal=False), st.just(float("nan")))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(batches=st.lists(st.tuples(mean_rewards, mean_rewards, mean_rewards), max_size=9))
def test_capability_is_the_mean_of_the_last_batches(batches):
    """Against a loop, for three agents and a window of four; a NaN leaves an agent as it is."""
    state = capability_init(3, window=4)
    for batch in batches:
        state = update(state, jnp.array(batch))
    seen = [[y for y in agent if y == y][-4:] for agent in zip(*batches)] or [[]] * 3
    wanted = [max(np.mean(agent), 1e-8) if agent else 1 for agent in seen]
    np.testing.assert_allclose(capability(state), wanted, rtol=1e-5)
    ratios = np.asarray(capability_ratios(state))
    for k, j in np.ndindex(3, 3):
        known = seen[k] and seen[j]
        w = np.clip(wanted[k] / wanted[j], 0.1, 10) if known else 1
        np.testing.assert_allclose(ratios[k, j], w, rtol=1e-5)
    assert np.all(np.diag(ratios) == 1)


def test_warm_up():
    """With warmup = 2 all ratios are 1 until the third batch; then ¾ and ¼ are 3 and ⅓."""
    state = capability_init(2)
    for batch in range(3):
        np.testing.assert_array_equal(capability_ratios(state, warmup=2), np.ones((2, 2)))
        state = capability_update(state, jnp.array([0.75, 0.25]))
        assert float(capability_ratios(state)[0, 1]) == 3, batch
    np.testing.assert_allclose(capability_ratios(state, warmup=2), [[1, 3], [1 / 3, 1]], rtol=1e-6)


def test_bounds_and_scale():
    """0.9/0.01 = 90 is cut to 10, its inverse to 0.1; agents of 0 are equal; scale has no effect."""
    state = capability_update(capability_init(2), jnp.array([0.9, 0.01]))
    np.testing.assert_allclose(capability_ratios(state), [[1, 10], [0.1, 1]], rtol=1e-6)
    np.testing.assert_allclose(capability_ratios(state, low=1e-3, high=1e3)[0, 1], 90, rtol=1e-5)
    none = capability_update(capability_init(2), jnp.zeros(2))
    np.testing.assert_array_equal(capability_ratios(none), np.ones((2, 2)))
    scaled = capability_update(capability_init(2), 64 * jnp.array([0.9, 0.01]))
    np.testing.assert_array_equal(capability_ratios(scaled, high=1e3), capability_ratios(state, high=1e3))


# Agent 0 has 0.5 or 0.9, so 0.7 on average, on both prompts. Agent 1 has 0.35 on average on the first,
# half of agent 0's, and 0.7 on the second, as much. No group has equal rewards.
AGENT = np.array([0, 0, 1, 1])
REWARD = {0: [(0.5, 0.9), (0.3, 0.4)], 1: [(0.5, 0.9), (0.6, 0.8)]}


def mean_baseline(prompt, learner, means):
    """E[μ̂] of the learner over all 16 equally likely outcomes of two rows per agent."""
    state = capability_update(capability_init(2), jnp.array(means))
    weight = np.tile(np.asarray(capability_ratios(state))[learner, AGENT], 16)
    rows = [REWARD[prompt][agent] for agent in AGENT]
    rewards = np.array(list(itertools.product(*rows))).ravel().astype(np.float32)
    group = np.arange(16).repeat(4)
    advantages, _ = group_advantage(rewards, group, scale="none", sample_weight=weight)
    baselines = (rewards - np.asarray(advantages)).reshape(16, 4)
    np.testing.assert_allclose(baselines, baselines[:, :1].repeat(4, 1), rtol=1e-5)  # one for the group
    return baselines.mean()


def test_hacpo_baseline_is_unbiased_where_capability_ratios_hold_per_prompt():
    """Capabilities 0.7 and 0.35: ω = 2 and ½. On the first prompt each learner's baseline is its own mean."""
    means = [0.7, 0.35]
    np.testing.assert_allclose(mean_baseline(0, 0, means), 0.7, rtol=1e-6)
    np.testing.assert_allclose(mean_baseline(0, 1, means), 0.35, rtol=1e-6)
    # on the second the ratio is 1: ½·(0.7 + 2·0.7) and ½·(½·0.7 + 0.7)
    np.testing.assert_allclose(mean_baseline(1, 0, means), 1.05, rtol=1e-6)
    np.testing.assert_allclose(mean_baseline(1, 1, means), 0.525, rtol=1e-6)
    np.testing.assert_allclose(mean_baseline(1, 0, [0.7, 0.7]), 0.7, rtol=1e-6)


def test_a_stronger_learner_has_a_higher_baseline():
    rewards, group = jnp.array([1.0, 0.0, 1.0, 0.0]), jnp.zeros(4, int)
    plain, _ = grpo(rewards, group)
    ratios = capability_ratios(capability_update(capability_init(2), jnp.array([0.8, 0.4])))
    strong, weak = (hacpo(rewards, group, sample_weight=ratios[k, AGENT])[0] for k in (0, 1))
    assert np.all(strong < plain) and np.all(plain < weak)


def test_one_agent_is_grpo():
    state = capability_update(capability_init(1), jnp.array([0.3]))
    rewards, group = jnp.array([0.2, 0.9, 0.4, 0.3]), jnp.array([0, 0, 1, 1])
    weight = capability_ratios(state)[0, jnp.zeros(4, int)]
    np.testing.assert_array_equal(hacpo(rewards, group, sample_weight=weight)[0], grpo(rewards, group)[0])


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"is_peer \(2,\)"):
        xgrpo(jnp.zeros(3), jnp.zeros(3, int), is_peer=jnp.zeros(2, bool))
    with pytest.raises(ValueError, match="agents=0"):
        capability_init(0)
    with pytest.raises(ValueError, match=r"mean_rewards \(3,\)"):
        capability_update(capability_init(2), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"low=1\.5"):
        capability_ratios(capability_init(2), low=1.5)
