"""GAE, returns and what is made of them, against textbook loops over the policy's own tokens."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.advantages import (
    at_last_token,
    batch_statistics,
    discounted_returns,
    gae,
    merge_statistics,
    reinforce_plus_plus,
    reinforce_plus_plus_returns,
    remax,
    turn_level_gae,
    turns_to_tokens,
    usable_tokens,
)
from jaxrl_llm.losses import finalize

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
jitted_gae = jax.jit(gae)


def random_tokens(seed, n=3, t=7):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, n, t)).astype(np.float32)
    return rewards, values, rng.random((n, t)) > 0.35


def textbook(rewards, values, gamma, lam):
    """A of one sequence without holes: Σ_l (γλ)^l δ_{t+l}, every sum by itself."""
    following = np.append(values[1:], 0)
    delta = rewards + gamma * following - values
    steps = np.arange(len(rewards))
    return np.array([np.sum((gamma * lam) ** (steps[t:] - t) * delta[t:]) for t in steps])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_holes_are_no_time(seed, gamma, lam):
    """Each row is what GAE makes of its own tokens alone, whatever stands between them."""
    rewards, values, mask = random_tokens(seed)
    advantages, returns = jitted_gae(rewards, values, mask, gamma=gamma, lam=lam)
    for i, row in enumerate(mask):
        wanted = textbook(rewards[i][row], values[i][row], gamma, lam)
        close(advantages[i][row], wanted)
        close(returns[i][row], wanted + values[i][row])
    assert np.all(np.asarray(advantages)[~mask] == 0) and np.all(np.asarray(returns)[~mask] == 0)


def test_the_ends_of_lambda():
    """λ = 1: the return less the value. λ = 0: r + γ·V' − V, V' of the next token of the policy's."""
    rewards, values, mask = random_tokens(1)
    masked_values = np.where(mask, values, 0)
    whole, _ = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    close(whole, discounted_returns(rewards, mask, gamma=0.9) - masked_values)
    step, _ = gae(rewards[:1], values[:1], np.array([[1, 0, 0, 1, 1, 0, 0]], bool), gamma=0.5, lam=0.0)
    r, v = rewards[0], values[0]
    close(step[0], [r[0] + 0.5 * v[3] - v[0], 0, 0, r[3] + 0.5 * v[4] - v[3], r[4] - v[4], 0, 0])


def test_undiscounted_outcome_is_the_same_everywhere():
    _, _, mask = random_tokens(2)
    outcome = np.array([1.0, -2.0, 0.5])
    token_rewards = at_last_token(outcome, mask)
    assert np.count_nonzero(token_rewards) == 3
    close(discounted_returns(token_rewards, mask), outcome[:, None] * mask)
    for i, row in enumerate(np.asarray(token_rewards)):
        assert row[np.flatnonzero(mask[i])[-1]] == outcome[i]


def test_rows_without_tokens_and_without_numbers():
    rewards, values, mask = random_tokens(3)
    mask[0] = False
    rewards[1, np.flatnonzero(mask[1])[-1]] = np.inf
    rewards[2, np.flatnonzero(~mask[2])[0]] = np.nan  # between the policy's tokens: nobody's reward
    advantages, returns = gae(rewards, values, mask)
    assert np.all(advantages[:2] == 0) and np.all(returns[:2] == 0)
    assert np.all(np.isfinite(advantages[2])) and np.any(advantages[2] != 0)
    assert usable_tokens(rewards, mask).tolist() == (mask & [[True], [False], [True]]).tolist()


def test_turns_are_moments():
    """γ = ½, λ = ½ on turns 0, 1 and 3 (2 is the tool's): δ = 1 + ½·4 − 2, 0 + ½·2 − 4, 6 − 2 = 1, −3, 4;
    A_3 = 4, A_1 = −3 + ¼·4 = −2, A_0 = 1 + ¼·(−2) = ½; returns A + V."""
    rewards, values = jnp.array([[1.0, 0, jnp.nan, 6]]), jnp.array([[2.0, 4, jnp.nan, 2]])
    turn_mask, turn = jnp.array([[True, True, False, True]]), jnp.array([[0, 0, 1, 2, 1, 3, 9]])
    mask = jnp.array([[True, True, True, True, False, True, True]])
    advantages, returns = turn_level_gae(rewards, values, turn_mask, turn, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0.5, 0.5, -2, 0, 0, 4, 0]]
    assert returns.tolist() == [[2.5, 2, 0, 6]]


def test_a_turn_per_token_is_gae():
    rewards, values, mask = random_tokens(4)
    turn = np.broadcast_to(np.arange(7), (3, 7))
    got = turn_level_gae(rewards, values, mask, turn, mask, gamma=0.9, lam=0.7)
    for a, b in zip(got, gae(rewards, values, mask, gamma=0.9, lam=0.7)):
        np.testing.assert_array_equal(a, b)


def test_remax():
    """1 − ¼, 0 − ½; without a greedy reward, without a reward, and a row that does not count."""
    rewards = jnp.array([1.0, 0.0, 1.0, jnp.nan, 7.0])
    greedy = jnp.array([0.25, 0.5, jnp.inf, 0.0, 2.0])
    got, metrics = remax(rewards, greedy, jnp.arange(5) < 4)
    assert got.tolist() == [0.75, -0.5, 0, 0, 0]
    assert finalize(metrics) == {"reward": 0.5, "greedy_reward": 0.375, "nonfinite_rewards": 0.5}


def penalised(rewards, kl, mask, beta, gamma):
    """G of every token of the policy's, by one sum each, in the rows' order."""
    out = []
    for r, k, row in zip(rewards, kl, mask):
        r = (r - beta * k)[row]
        out += [sum(gamma**j * x for j, x in enumerate(r[t:])) for t in range(len(r))]
    return np.array(out)


def test_reinforce_plus_plus_against_numpy():
    """Whitened over tokens, and a tool's tokens do not end a return."""
    rewards, kl, mask = random_tokens(5)
    got, metrics = reinforce_plus_plus(rewards, kl, mask, beta=0.5, gamma=0.8, epsilon=0.1)
    g = penalised(rewards, kl, mask, 0.5, 0.8)
    close(np.asarray(got)[mask], (g - g.mean()) / (g.std(ddof=1) + 0.1))
    assert np.all(np.asarray(got)[~mask] == 0) and finalize(metrics)["nonfinite_rewards"] == 0


def test_reinforce_plus_plus_leaves_rows_out():
    """A row with a NaN in the reward or the penalty: the others are whitened among themselves."""
    rewards, kl, mask = random_tokens(6)
    mask[:, 0] = True
    alone, _ = reinforce_plus_plus(rewards[1:2], kl[1:2], mask[1:2], beta=0.5)
    rewards[0, 0], kl[2, 0] = np.nan, -np.inf
    got, metrics = reinforce_plus_plus(rewards, kl, mask, beta=0.5)
    close(got[1:2], alone)
    assert np.all(got[0] == 0) and np.all(got[2] == 0)
    assert finalize(metrics)["nonfinite_rewards"] == pytest.approx(2 / 3)


def test_reinforce_plus_plus_in_pieces():
    rewards, kl, mask = random_tokens(7)
    whole, _ = reinforce_plus_plus(rewards, kl, mask, beta=0.5)
    cut = [tuple(x[rows] for x in (rewards, kl, mask)) for rows in (slice(0, 1), slice(1, 3))]
    pieces = [batch_statistics(*reinforce_plus_plus_returns(*piece, beta=0.5)) for piece in cut]
    given = merge_statistics(*pieces)
    parts = [reinforce_plus_plus(*piece, beta=0.5, statistics=given)[0] for piece in cut]
    close(np.concatenate(parts), whole)


def test_errors_name_what_is_wrong():
    x, mask = jnp.zeros((2, 3)), jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match=r"rewards \(2, 3\), values \(2, 2\)"):
        gae(x, x[:, :2], mask)
    with pytest.raises(ValueError, match=r"rewards \(3,\) must be \(2,\)"):
        at_last_token(jnp.zeros(3), mask)
    with pytest.raises(ValueError, match=r"per_turn \(3, 2\) must be \(2, number of turns\)"):
        turns_to_tokens(jnp.zeros((3, 2)), jnp.zeros((2, 3), int), mask)
    with pytest.raises(ValueError, match=r"turn \(2, 2\), mask \(2, 3\)"):
        turns_to_tokens(jnp.zeros((2, 2)), jnp.zeros((2, 2), int), mask)
    with pytest.raises(ValueError, match=r"greedy_rewards \(3,\)"):
        remax(jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"kl \(2,\)"):
        reinforce_plus_plus(x, jnp.zeros(2), mask, beta=0.1)
