"""GDPO and HIAN: several rewards that do not drown one another, against numpy and by their properties."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.advantages import (
    batch_statistics,
    discounted_returns,
    gdpo,
    gdpo_scores,
    grpo,
    hian,
    merge_statistics,
    turns_to_tokens,
    usable_scores,
)
from jaxrl_llm.losses import finalize

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)

GROUP = np.array([3, -7, 3, 3, -7, 40, 3, -7])
LENGTHS = np.array([5, 1, 2, 8, 3, 1, 4, 2])


def z_of(x, where, epsilon):
    """Standardised over `where`, 0 elsewhere and where nothing differs; NaN counts nowhere."""
    where = where & np.isfinite(x)
    if not where.any() or np.ptp(x[where]) == 0:
        return np.zeros_like(x)
    return np.where(where, (x - x[where].mean()) / (x[where].std(ddof=1) + epsilon), 0)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_gdpo_against_numpy(lengths):
    """Over rows as in TRL, over tokens as in verl; one function does not apply to row 2, none to row 4."""
    rewards = np.random.default_rng(0).normal(size=(8, 3)) * [1, 100, 0.01]
    rewards[2, 1], rewards[4] = np.nan, np.nan
    weights = np.array([1.0, 0.5, 2.0])
    z = np.stack([sum(z_of(r, g == GROUP, 1e-4) for g in set(GROUP)) for r in rewards.T], 1)
    s, usable = z @ weights, np.arange(8) != 4
    seen = np.repeat(s[usable], 1 if lengths is None else lengths[usable])
    wanted = np.where(usable & (GROUP != 40), (s - seen.mean()) / (seen.std(ddof=1) + 1e-4), 0)
    got, metrics = gdpo(rewards, GROUP, weights=weights, lengths=lengths, epsilon=1e-4)
    close(got, wanted)
    assert finalize(metrics) == pytest.approx({"nonfinite_rewards": 4 / 24, "frac_reward_zero_std": 1 / 3})


def test_gdpo_in_pieces():
    rewards = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)
    whole, _ = gdpo(rewards, GROUP, lengths=LENGTHS)
    pieces = [np.isin(GROUP, groups) for groups in ([3], [-7, 40])]
    shares = [
        batch_statistics(gdpo_scores(rewards, GROUP, p)[0], usable_scores(rewards, p), weight=LENGTHS)
        for p in pieces
    ]
    for piece in pieces:
        part, _ = gdpo(rewards, GROUP, piece, statistics=merge_statistics(*shares))
        close(part, np.where(piece, whole, 0))


def test_gdpo_hears_the_quiet_reward():
    """The second reward is a thousandth of the first: in the sum of rewards its effect is a thousandth, under
    GDPO any scale and offset of either reward gives the same."""
    rewards = np.random.default_rng(2).normal(size=(8, 2)).astype(np.float32)
    changed = rewards * np.float32([1000, 1]) + np.float32([5, -3])
    close(gdpo(rewards, GROUP, epsilon=0.0)[0], gdpo(changed, GROUP, epsilon=0.0)[0])
    merged, loud_alone = grpo(changed.sum(1), GROUP)[0], grpo(changed[:, 0], GROUP)[0]
    np.testing.assert_allclose(merged, loud_alone, atol=0.01)
    assert np.max(np.abs(gdpo(changed, GROUP)[0] - loud_alone)) > 0.3


def test_gdpo_tells_apart_what_the_sum_does_not():
    """Rewards (1, 0), (0, 1), (0, 0) in one group, (2, 0), (0, 0), (0, 0) in another, and so on: rows whose
    rewards have the same sum get the same from GRPO, not from GDPO where one reward is rarer."""
    rewards = np.array([[1, 0], [0, 1], [0, 1], [0, 0]], np.float32)
    group = np.zeros(4, int)
    merged, _ = grpo(rewards.sum(1), group)
    apart, _ = gdpo(rewards, group)
    assert merged[0] == merged[1] and apart[0] > apart[1] > apart[3]


def test_gdpo_of_one_reward_in_one_group_is_grpo():
    """Its z has mean 0 and standard deviation 1 already."""
    rewards = np.random.default_rng(3).normal(size=(8, 1)).astype(np.float32)
    close(
        gdpo(rewards, np.zeros(8, int), epsilon=0.0)[0], grpo(rewards[:, 0], np.zeros(8, int), epsilon=0.0)[0]
    )


# HIAN: dialogues of 1 to 4 turns, in float64 so that a change of scale shows nothing but itself.
N, K = 8, 4
TURNS = np.arange(K) < np.array([4, 2, 3, 1, 4, 2, 3, 3])[:, None]


def dialogues(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=N), rng.normal(size=(N, K))


def exact(*arrays, **options):
    """HIAN without an epsilon, in float64."""
    with jax.enable_x64(True):
        return np.asarray(compiled(tuple(({"epsilon": 0.0} | options).items()))(*arrays)[0])


@cache
def compiled(options):
    return jax.jit(partial(hian, **dict(options)))


@pytest.mark.parametrize("scope", ["group", "position", "batch"])
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_hian_against_numpy(scope, gamma):
    rewards, turn_rewards = dialogues(0)
    g = np.zeros((N, K))
    for k in reversed(range(K)):
        g[:, k] = np.where(TURNS[:, k], turn_rewards[:, k] + gamma * (g[:, k + 1] if k + 1 < K else 0), 0)
    rows, place = GROUP[:, None] + np.zeros((1, K)), np.arange(K) + np.zeros((N, 1))
    session, turn = np.zeros(N), np.zeros((N, K))
    for name in set(GROUP):
        session += z_of(rewards, name == GROUP, 0.1)
        for k in range(K) if scope == "position" else [None]:
            here = TURNS & (rows == name) & ((place == k) if scope == "position" else True)
            turn += z_of(g, here, 0.1)
    if scope == "batch":
        turn = z_of(g, TURNS, 0.1)
    wanted = np.where(TURNS, 2 * session[:, None] + 0.5 * turn, 0)
    options = {"gamma": gamma, "scope": scope, "session_weight": 2.0, "turn_weight": 0.5, "epsilon": 0.1}
    np.testing.assert_allclose(exact(rewards, turn_rewards, TURNS, GROUP, **options), wanted, atol=1e-12)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(a=st.floats(0.01, 100), b=st.floats(-50, 50), c=st.floats(0.01, 100), d=st.floats(-50, 50))
@pytest.mark.parametrize("scope", ["group", "position", "batch"])
def test_hian_does_not_care_for_scales(scope, a, b, c, d):
    """R → aR + b and r → cr + d change nothing; GRPO on R + Σr does change."""
    rewards, turn_rewards = dialogues(1)
    plain = exact(rewards, turn_rewards, TURNS, GROUP, scope=scope)
    np.testing.assert_allclose(
        exact(a * rewards + b, c * turn_rewards + d, TURNS, GROUP, scope=scope), plain, atol=1e-9
    )


def test_merged_grpo_does_care():
    rewards, turn_rewards = dialogues(1)
    sums = np.where(TURNS, turn_rewards, 0).sum(1)
    one, other = (grpo(scale * rewards + sums, GROUP)[0] for scale in (1, 10))
    assert np.max(np.abs(one - other)) > 0.1


def test_hian_keeps_both_horizons_whatever_their_scales():
    """A turn signal uncorrelated with the session's: its share of the variance is w_T²/(w_S² + w_T²) for a
    session ×1 and ×1000; in the merged reward it is Var(Σr)/Var(R + Σr), 1/2 and 1e-6."""
    session = np.array([1.0, 1, -1, -1])
    turn = np.array([1.0, -1, 1, -1])[:, None]
    one_turn, group = np.ones((4, 1), bool), np.zeros(4, int)
    for scale in (1, 1000):
        for w_s, w_t in ((1.0, 1.0), (2.0, 0.5)):
            arrays = scale * session, turn, one_turn, group
            fused = exact(*arrays, session_weight=w_s, turn_weight=w_t)
            part = exact(*arrays, session_weight=0.0, turn_weight=w_t)
            assert part.var() / fused.var() == pytest.approx(w_t**2 / (w_s**2 + w_t**2), rel=1e-9)
        merged = scale * session + turn[:, 0]
        assert turn.var() / merged.var() == pytest.approx(1 / (1 + scale**2))


def test_hian_without_one_horizon():
    """σ_S = 0: the turn term alone. w_T = 0, or turn rewards all equal: GRPO on R, at every turn."""
    rewards, turn_rewards = dialogues(2)
    np.testing.assert_array_equal(
        exact(np.full(N, 0.7), turn_rewards, TURNS, GROUP),
        exact(rewards, turn_rewards, TURNS, GROUP, session_weight=0.0),
    )
    with jax.enable_x64(True):
        outcome = np.asarray(grpo(rewards, GROUP, epsilon=0.0)[0])[:, None] * TURNS
    np.testing.assert_allclose(
        exact(rewards, turn_rewards, TURNS, GROUP, turn_weight=0.0), outcome, atol=1e-12
    )
    np.testing.assert_allclose(exact(rewards, 0 * turn_rewards + 0.7, TURNS, GROUP), outcome, atol=1e-12)


def test_group_means_are_zero():
    rewards, turn_rewards = dialogues(3)
    session = exact(rewards, turn_rewards, TURNS, GROUP, turn_weight=0.0)[:, 0]
    turn = exact(rewards, turn_rewards, TURNS, GROUP, session_weight=0.0, gamma=0.9)
    for name in set(GROUP):
        assert abs(session[name == GROUP].mean()) < 1e-12
        assert abs(turn[name == GROUP].sum()) < 1e-12


def test_turns_of_one_dialogue_may_differ_in_sign():
    """The better dialogue of two repeats itself in its second turn: ±√½ for the session, and among turns
    1, −1, 0, 0 (mean 0, std √(2/3)) ±1.22 for it."""
    got = exact(np.array([5.0, 1]), np.array([[1.0, -1], [0, 0]]), np.ones((2, 2), bool), np.zeros(2, int))
    np.testing.assert_allclose(
        got, [[0.5**0.5 + 1.5**0.5, 0.5**0.5 - 1.5**0.5], [-(0.5**0.5)] * 2], rtol=1e-12
    )
    tokens = turns_to_tokens(got, np.array([[0, 0, 1], [0, 1, 1]]), np.ones((2, 3), bool))
    assert np.sign(tokens).tolist() == [[1, 1, -1], [-1, -1, -1]]


def test_padding_is_no_turn():
    """More columns of padding, whatever is in them; a dialogue without a turn has a session still."""
    rewards, turn_rewards = dialogues(4)
    wider = np.concatenate([np.where(TURNS, turn_rewards, np.nan), np.full((N, 3), np.inf)], 1)
    for scope in ("group", "position", "batch"):
        plain = exact(rewards, turn_rewards, TURNS, GROUP, scope=scope, gamma=0.5)
        padded = exact(rewards, wider, np.pad(TURNS, ((0, 0), (0, 3))), GROUP, scope=scope, gamma=0.5)
        np.testing.assert_allclose(padded, np.pad(plain, ((0, 0), (0, 3))), atol=1e-12)
    silent = TURNS & (np.arange(N) != 0)[:, None]
    got = exact(rewards, turn_rewards, silent, GROUP, turn_weight=0.0)
    np.testing.assert_allclose(got[2, 0], exact(rewards, turn_rewards, TURNS, GROUP, turn_weight=0.0)[2, 0])


def test_dialogues_without_a_number_are_left_out():
    rewards, turn_rewards = (x.astype(np.float32) for x in dialogues(5))
    wanted, _ = hian(
        rewards, turn_rewards, TURNS, GROUP, (np.arange(N) != 2) & (np.arange(N) != 4), gamma=0.5
    )
    rewards[2], turn_rewards[4, 3] = np.nan, -np.inf
    got, metrics = hian(rewards, turn_rewards, TURNS, GROUP, gamma=0.5)
    np.testing.assert_array_equal(got, wanted)
    assert np.all(got[2] == 0) and np.all(got[4] == 0) and finalize(metrics)["nonfinite_rewards"] == 2 / 8


def test_whitening_at_the_end():
    """Mean 0 and standard deviation 1 over the batch's turns."""
    seen = exact(*dialogues(6), TURNS, GROUP, whitened=True)[TURNS]
    plain = exact(*dialogues(6), TURNS, GROUP)[TURNS]
    close(seen, (plain - plain.mean()) / plain.std(ddof=1))


def test_batch_statistics_from_outside():
    arrays = (*(jnp.array(x) for x in dialogues(8)), TURNS, GROUP)
    given = batch_statistics(discounted_returns(arrays[1], TURNS, gamma=0.0), TURNS)
    whole, _ = hian(*arrays, scope="batch")
    piece, _ = hian(*arrays, GROUP == 3, scope="batch", turn_statistics=given)
    close(piece, np.where((GROUP == 3)[:, None], whole, 0))


def test_errors_name_what_is_wrong():
    arrays = (*dialogues(7), TURNS)
    with pytest.raises(ValueError, match="scope 'turn'; one of group, position, batch"):
        hian(*arrays, GROUP, scope="turn")
    with pytest.raises(ValueError, match=r"turn_rewards \(8, 4\), turn_mask \(8, 3\)"):
        hian(*arrays[:2], TURNS[:, :3], GROUP)
    with pytest.raises(ValueError, match=r"rewards \(8,\), group \(2,\)"):
        hian(*arrays, GROUP[:2])
    with pytest.raises(ValueError, match=r"rewards \(8,\) must be \[N, M\]"):
        gdpo(jnp.zeros(8), GROUP)
    with pytest.raises(ValueError, match=r"weights \(3,\) must be \(2,\)"):
        gdpo(jnp.zeros((8, 2)), GROUP, weights=[1, 2, 3])
