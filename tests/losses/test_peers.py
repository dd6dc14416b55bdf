"""PRP and SGT: exact expectations on a bandit, and which rows are learnt from."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import grpo
from jaxrl_llm.losses import aggregate, finalize, policy_objective, ppo_clip, prp, rescue_weights, sgt

NAN = float("nan")
UNCLIPPED = partial(ppo_clip, epsilon=float("inf"))


def random_rows(n=6, t=5, seed=0):
    """logp, old_logp, peer_logp f32[n, t], advantages [n, 1] and mask [n, t]."""
    rng = np.random.default_rng(seed)
    logps = -rng.uniform(0, 1, (3, n, t)).astype(np.float32)
    return *logps, rng.normal(size=(n, 1)).astype(np.float32), rng.random((n, t)) > 0.3


# PRP


def test_prp_without_peers_is_the_surrogate_bit_for_bit():
    logp, old_logp, _, a, mask = random_rows()
    options = {"is_own": jnp.ones(6, bool), "peer_logp": jnp.full((6, 5), NAN)}

    def result(surrogate):
        loss = lambda x: surrogate(x, old_logp, a, mask)  # noqa: E731
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(loss(x)[0]))))
        return jax.jit(loss)(logp)[0], gradient(logp)

    jax.tree.map(np.testing.assert_array_equal, result(partial(prp, **options)), result(ppo_clip))


def test_prp_of_peers_like_the_learner_is_grpo_with_a_larger_group():
    """Peers who are the old policy, advantages over the pool: as if the learner had written all six rows."""
    logp, old_logp, _, _, mask = random_rows()
    is_own = jnp.array([True, False] * 3)
    a = grpo(jnp.array([0.0, 1, 1, 0, 0, 1]), jnp.zeros(6, int))[0][:, None]
    loss, _ = prp(logp, jnp.where(is_own[:, None], old_logp, NAN), a, mask, is_own=is_own, peer_logp=old_logp)
    np.testing.assert_array_equal(loss, ppo_clip(logp, old_logp, a, mask)[0])


def test_prp_ratios_by_hand():
    """π = 0.6 of an own row from π_old = 0.5, of peers' rows from 0.2 (clipped at 1.2) and 0.8; A = 1, 1, −2.

    The option takes 0.5 for all rows: every ratio 1.2.
    """
    logp, old_logp = (jnp.log(jnp.full((3, 1), p)) for p in (0.6, 0.5))
    peer_logp, a = jnp.log(jnp.array([[NAN], [0.2], [0.8]])), jnp.array([[1.0], [1], [-2]])
    arrays, is_own = (logp, old_logp, a, logp < 0), jnp.array([True, False, False])
    loss, metrics = prp(*arrays, is_own=is_own, peer_logp=peer_logp, surrogate=UNCLIPPED)
    np.testing.assert_allclose(loss, [[-1.2], [-3], [1.5]], rtol=1e-5)
    loss, _ = prp(*arrays, is_own=is_own, peer_logp=peer_logp, surrogate=partial(ppo_clip, epsilon=0.5))
    np.testing.assert_allclose(loss, [[-1.2], [-1.5], [1.5]], rtol=1e-5)
    numbers = finalize(metrics)
    assert numbers["peer/ratio/mean"] == pytest.approx((3 + 0.75) / 2)
    assert numbers["peer/effective_sample_size"] == pytest.approx(3.75**2 / (2 * (9 + 0.75**2)))
    loss, _ = prp(*arrays, is_own=is_own, peer_logp=None, surrogate=UNCLIPPED)
    np.testing.assert_allclose(loss, [[-1.2], [-1.2], [2.4]], rtol=1e-5)


def test_nothing_flows_to_the_peer():
    """Nor to the old policy or the advantages."""
    logp, old_logp, peer_logp, a, mask = random_rows()
    is_own = jnp.arange(6) < 3

    def total(old_logp, peer_logp, a):
        return jnp.sum(prp(logp, old_logp, a, mask, is_own=is_own, peer_logp=peer_logp)[0])

    for gradient in jax.grad(total, (0, 1, 2))(old_logp, peer_logp, a):
        assert not np.any(gradient)


LOGITS, PEER, REWARDS = np.random.default_rng(3).normal(size=(3, 5))  # a bandit with five arms


def bandit(error=0.0):
    """Σ_y q(y)·(gradient by the logits of −loss(y)), and Σ_y q(y)·its square; one row per arm."""
    q, rewards, mask = jax.nn.softmax(PEER), jnp.asarray(REWARDS)[:, None], jnp.ones((5, 1), bool)

    def losses(logits):
        logp = jax.nn.log_softmax(logits)[:, None]
        peer_logp = (jnp.log(q) - error)[:, None]
        return -prp(
            logp, logp, rewards, mask, is_own=jnp.zeros(5, bool), peer_logp=peer_logp, surrogate=UNCLIPPED
        )[0][:, 0]

    each = jax.jacrev(losses)(jnp.asarray(LOGITS))
    return q @ each, q @ jnp.sum(each**2, axis=1)


def test_prp_is_unbiased_where_the_peers_log_probs_are_exact():
    """Expectation Σ π·R·s under the peer's own draws, s = ∇log π; the second moment is E_π[ρR²|s|²]."""
    with jax.enable_x64(True):
        pi, q = jax.nn.softmax(LOGITS), jax.nn.softmax(PEER)
        s = jnp.eye(5) - pi
        mean, square = bandit()
        np.testing.assert_allclose(mean, (pi * REWARDS) @ s, rtol=1e-12)
        np.testing.assert_allclose(square, (pi * (pi / q) * REWARDS**2) @ jnp.sum(s**2, axis=1), rtol=1e-12)
        bound = np.max(REWARDS**2) * np.max(np.sum(s**2, axis=1))
        assert square <= bound * np.sum(pi**2 / q)  # a²b²·(1 + χ²(π‖q))


def test_prp_is_biased_by_errors_of_alignment():
    """ρ·e^δ for ρ adds E_π[(e^δ − 1)·R·s]."""
    with jax.enable_x64(True):
        delta = jnp.array([0.3, -0.2, 0.1, 0.0, -0.5])
        pi = jax.nn.softmax(LOGITS)
        bias = bandit(delta)[0] - bandit()[0]
        np.testing.assert_allclose(bias, (pi * jnp.expm1(delta) * REWARDS) @ (jnp.eye(5) - pi), rtol=1e-12)


# SGT

KEY = jax.random.key(0)


def test_rescue_fires_where_all_own_rows_fail_and_a_peer_succeeds():
    """Prompts, interleaved: 0 own 0 0, peers 0 1; 1 own 0 1, peer 1; 2 own 0, peer 0; 3 own 0.5, peer 1;
    4 no own row; 5 no peer. Chosen: the success of 0 (two own rows) and that of 3 (one)."""
    group = np.array([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1, 0])
    is_own = np.array([1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0], bool)
    rewards = np.array([0, 0, 0, 0.5, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1, 1.0])
    weights, metrics = rescue_weights(rewards, group * 7 - 3, is_own, key=KEY)
    assert np.flatnonzero(weights).tolist() == [9, 14]
    assert weights[jnp.array([9, 14])].tolist() == [1, 2]
    # all own rows fail in 0, 2, 3 and 5 of the five prompts with own rows
    assert finalize(metrics) == pytest.approx({"sgt/failed": 4 / 5, "sgt/rescued": 2 / 4})


def test_rescue_leaves_out_rows_that_do_not_count():
    """An own success that is invalid, an own NaN and a peer's infinity do not count: one own row fails."""
    rewards, is_own = jnp.array([0.0, 1, NAN, jnp.inf, 1]), jnp.array([True, True, True, False, False])
    valid = jnp.array([True, False, True, True, True])
    assert rescue_weights(rewards, jnp.zeros(5, int), is_own, valid, key=KEY)[0].tolist() == [0, 0, 0, 0, 1]
    weights, _ = rescue_weights(rewards, jnp.zeros(5, int), is_own, valid.at[0].set(False), key=KEY)
    assert not np.any(weights)  # no own row left that fails


def test_rescue_threshold_is_an_option():
    rewards, is_own = jnp.array([0.3, 0.6]), jnp.array([True, False])
    for success, fires in {0.5: True, 0.7: False, 0.3: False}.items():
        weights, _ = rescue_weights(rewards, jnp.zeros(2, int), is_own, key=KEY, success=success)
        assert bool(weights[1] > 0) == fires


def test_rescue_draws_one_success_at_random():
    """Three successes of one prompt in 3000 draws: always one row, each 1000 times but for 4 deviations."""
    rewards, is_own = jnp.array([0.0, 1, 0, 1, 1]), jnp.arange(5) == 0
    draw = jax.vmap(lambda key: rescue_weights(rewards, jnp.zeros(5, int), is_own, key=key)[0])
    weights = np.asarray(draw(jax.random.split(KEY, 3000)))
    assert np.all(np.sum(weights, axis=1) == 1) and not np.any(weights[:, [0, 2]])
    np.testing.assert_allclose(np.sum(weights, axis=0)[[1, 3, 4]], 1000, atol=4 * (3000 * 2 / 9) ** 0.5)


def test_rescue_probability():
    """Over all outcomes of two own and two peers' rows: (1−p)²·(1 − (1−p')²)."""
    p, peer_p = 0.3, 0.6
    outcomes = np.array(list(product([0.0, 1.0], repeat=4)))
    success = np.array([p, p, peer_p, peer_p])
    probability = np.prod(np.where(outcomes == 1, success, 1 - success), axis=1)
    is_own = jnp.array([True, True, False, False])
    fires = jax.vmap(lambda r: jnp.any(rescue_weights(r, jnp.zeros(4, int), is_own, key=KEY)[0] > 0))
    assert probability @ np.asarray(fires(outcomes)) == pytest.approx((1 - p) ** 2 * (1 - (1 - peer_p) ** 2))


def test_sgt_beside_the_surrogate_is_a_mean_over_prompts():
    """Prompt 0: three own failures, a peer's success of two tokens. Prompt 1: own rewards 1, 0, 0, peer's 1.

    Sum over rows of the token means, over the six own rows: mean over prompts of (mean over own rows of
    GRPO + 0.1·NLL/length).
    """
    logp, _, _, _, mask = random_rows(8)
    mask[3] = [True, False, True, False, False]
    group, is_own = jnp.array([0, 0, 0, 0, 1, 1, 1, 1]), jnp.array([True, True, True, False] * 2)
    rewards = jnp.array([0.0, 0, 0, 1, 1, 0, 0, 1])
    a = grpo(rewards, group, is_own)[0][:, None]  # 0 at peers' rows
    weight, _ = rescue_weights(rewards, group, is_own, key=KEY)
    assert weight.tolist() == [0, 0, 0, 3, 0, 0, 0, 0]
    surrogate, _ = ppo_clip(logp, logp, a, mask)
    extra, metrics = sgt(logp, mask, rescue_weight=weight)
    total = aggregate(surrogate + 0.1 * extra, mask, "seq_mean_token_mean").sum / 6

    grpo_means = np.array([-float(a[i, 0]) * mask[i].any() for i in range(8)])
    nll = -(logp[3, 0] + logp[3, 2]) / 2
    wanted = ((grpo_means[:3].mean() + 0.1 * nll) + grpo_means[4:7].mean()) / 2
    assert float(total) == pytest.approx(wanted, rel=1e-5)
    assert finalize(metrics)["sgt/nll"] == pytest.approx(nll, rel=1e-6)


def test_sgt_reaches_the_chosen_rows_alone():
    """−weight at each of its tokens, even where the policy gives them next to nothing; others are not read.

    Without peers, and so without a weight, there is no loss at all.
    """
    logp = jnp.array([[-50.0, -90.0], [NAN, NAN]])
    mask, weight = jnp.ones((2, 2), bool), jnp.array([4.0, 0.0])
    gradient = jax.grad(lambda x: jnp.sum(sgt(x, mask, rescue_weight=weight)[0]))(logp)
    assert gradient.tolist() == [[-4, -4], [0, 0]]
    loss, metrics = sgt(logp, mask, rescue_weight=0 * weight)
    assert not np.any(loss) and finalize(metrics) == {}


def test_both_in_one_objective():
    """The arrays they need beyond a surrogate's are passed to the objective by name."""
    logp, old_logp, peer_logp, a, mask = random_rows()
    peers = {"is_own": jnp.arange(6) < 3, "peer_logp": peer_logp}
    weight = jnp.array([0.0, 0, 0, 3, 0, 0])
    objective = policy_objective(surrogate=prp, auxiliary={sgt: 0.1}, aggregation="seq_mean_token_mean")
    total, metrics = objective(logp, old_logp, a, mask, **peers, rescue_weight=weight)
    loss = prp(logp, old_logp, a, mask, **peers)[0] + 0.1 * sgt(logp, mask, rescue_weight=weight)[0]
    np.testing.assert_allclose(total, aggregate(loss, mask, "seq_mean_token_mean"), rtol=1e-6)
    assert metrics.keys() >= {"sgt/nll", "peer/effective_sample_size", "clamped_ratio"}


def test_shapes_are_named():
    x, rows = jnp.zeros((2, 3)), jnp.zeros(2)
    with pytest.raises(ValueError, match=r"is_own \(2, 1\), rows \(2,\)"):
        prp(x, x, x, x == 0, is_own=rows[:, None] == 0, peer_logp=x)
    with pytest.raises(ValueError, match=r"old_logp \(2, 3\), peer_logp \(2,\)"):
        prp(x, x, x, x == 0, is_own=rows == 0, peer_logp=rows)
    with pytest.raises(ValueError, match=r"rescue_weight \(3,\), rows \(2,\)"):
        sgt(x, x == 0, rescue_weight=jnp.zeros(3))
    with pytest.raises(ValueError, match=r"group \(3,\)"):
        rescue_weights(rows, jnp.zeros(3, int), rows == 0, key=KEY)
