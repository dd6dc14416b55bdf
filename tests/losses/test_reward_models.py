"""Reward models: the weighted loss of several objectives, and R2M's group entropy and pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import losses
from jaxrl_llm.losses import arm, finalize

uniarm = jax.jit(losses.uniarm)
group_reward_entropy = jax.jit(losses.group_reward_entropy)
extreme_rows = jax.jit(losses.extreme_rows)
r2m = jax.jit(losses.r2m, static_argnames="alpha")

ONE = jnp.array([True])


def sigma(x):
    return 1 / (1 + np.exp(-x))


# UniARM


def test_uniarm_by_hand():
    """βΔ = ½·2·ln 3 = ln 3, z = (1, −1, 1), p = (½, ¼, ¼), λ = 2: m = ½, and −ln σ(±ln 3) = ln(4/3), ln 4.

    ½·ln(4/3) + ¼·ln 4 + ¼·ln(4/3) + 2·½·ln(4/3) = 1.75·0.287682 + 0.25·1.386294 = 0.850017
    """
    difference, z, p = jnp.array([2 * np.log(3)]), jnp.array([[1, -1, 1]]), jnp.array([0.5, 0.25, 0.25])
    loss, metrics = uniarm(difference, jnp.zeros(1), z, p, ONE, beta=0.5, global_weight=2.0)
    np.testing.assert_allclose(loss, [0.850017], rtol=1e-6)
    assert finalize(metrics) == pytest.approx({"rewards/accuracies": 1, "rewards/margins": np.log(3)})
    by_row, _ = uniarm(difference, jnp.zeros(1), z, p[None], ONE, beta=0.5, global_weight=2.0)
    np.testing.assert_array_equal(by_row, loss)


def random_objectives(seed=0, n=8, k=3):
    rng = np.random.default_rng(seed)
    first, second = -rng.uniform(0, 3, (2, n))
    return first, second, rng.choice([-1.0, 1.0], (n, k)), rng.dirichlet(np.ones(k), n)


def test_closed_form_gradient_of_uniarm():
    """Of Δ: −β·Σ p_i·z_i·σ(−z_i·βΔ) − λ·β·m·σ(−sign(m)·βΔ); neither labels nor weights get one."""
    with jax.enable_x64(True):
        arrays = random_objectives()
        first, second, z, p = arrays

        def total(*x):
            return jnp.sum(uniarm(*x, jnp.ones(8, bool), beta=0.7, global_weight=0.5)[0])

        gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(*arrays)
        x, m = 0.7 * (first - second), np.sum(p * z, axis=1)
        wanted = -0.7 * np.sum(p * z * sigma(-z * x[:, None]), axis=1) - 0.35 * m * sigma(-np.sign(m) * x)
        np.testing.assert_allclose(gradients[:2], [wanted, -wanted], rtol=1e-12)
        assert np.all(gradients[2] == 0) and np.all(gradients[3] == 0)


def test_objectives_in_full_agreement_leave_nothing_to_weigh():
    first, second, z, p = random_objectives()
    z[:] = z[:, :1]
    loss, _ = uniarm(first, second, z, p, jnp.ones(8, bool))
    for other in (np.full((8, 3), 1 / 3), np.tile([0.0, 1.0, 0.0], (8, 1))):
        np.testing.assert_allclose(uniarm(first, second, z, other, jnp.ones(8, bool))[0], loss, rtol=1e-6)


def test_balanced_objectives_have_no_global_term():
    """z = ±1 at ½ each: the loss does not depend on λ, and no pair counts in the metrics."""
    first, second, _, _ = random_objectives()
    z, p, mask = np.tile([1.0, -1.0], (8, 1)), np.array([0.5, 0.5]), jnp.ones(8, bool)
    without, metrics = uniarm(first, second, z, p, mask, global_weight=0.0)
    np.testing.assert_array_equal(uniarm(first, second, z, p, mask, global_weight=9.0)[0], without)
    assert finalize(metrics) == {}


def test_naming_the_answers_the_other_way_round_changes_nothing():
    first, second, z, p = random_objectives()
    mask = jnp.ones(8, bool)
    one, other = uniarm(first, second, z, p, mask), uniarm(second, first, -z, p, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, other)


def test_an_objective_without_a_label_adds_a_constant():
    first, second, z, p = random_objectives()
    z[:, 2] = 0
    mask = jnp.ones(8, bool)
    with_it = uniarm(first, second, z, p, mask)[0]
    without = uniarm(first, second, z[:, :2], p[:, :2], mask)[0]
    np.testing.assert_allclose(with_it - without, p[:, 2] * np.log(2), rtol=1e-5)


def test_the_preferred_answer_rises():
    """z = 1 prefers the first answer: its gradient is negative, the second one's positive."""
    zero = jnp.zeros(1)
    gradient = jax.jit(jax.grad(lambda a, b, z: uniarm(a, b, z, jnp.ones(1), ONE)[0][0], argnums=(0, 1)))
    for z in (1.0, -1.0):
        of_first, of_second = gradient(zero, zero, jnp.array([[z]]))
        assert of_first[0] * z < 0 < of_second[0] * z


# R2M

GROUP = np.array([4, 9, 4, 9, 4, 7, 4, 2, 2])
REWARDS = np.array([0.3, 1.0, -0.7, 2.5, 0.9, 5.0, -1.1, 3.0, 3.0])


def entropy_of(rewards):
    """By numpy, of one group."""
    z = (rewards - rewards.mean()) / np.sqrt(rewards.var(ddof=min(1, len(rewards) - 1)) + 1e-12)
    p = np.exp(z) / np.exp(z).sum()
    return -np.sum(p * np.log(p))


def test_entropy_of_ragged_groups_with_rows_left_out():
    """Groups of 4, 2, 1 and two equal rewards, in any order; rows that do not count may hold anything."""
    rewards = np.append(REWARDS, [np.nan, 1e9])
    group, valid = np.append(GROUP, [4, 8]), np.arange(11) < 9
    entropy, metrics = group_reward_entropy(rewards, group, valid)
    wanted = {g: entropy_of(REWARDS[g == GROUP]) for g in (2, 4, 7, 9)}
    np.testing.assert_allclose(entropy, [wanted[g] for g in GROUP] + [0, 0], rtol=1e-5, atol=1e-7)
    mean = sum(wanted.values()) / 4
    assert finalize(metrics)["reward_entropy"] == pytest.approx(mean, rel=1e-5)
    order = np.random.default_rng(0).permutation(9)
    np.testing.assert_allclose(
        group_reward_entropy(REWARDS[order], GROUP[order])[0], entropy[:9][order], rtol=1e-6
    )


def test_closed_form_gradient_of_the_entropy():
    """dH/dr = (c − mean c − z·(c·z)/(K−1))/s with c = dH/dz = −p·(log p + H)."""
    with jax.enable_x64(True):
        r = np.random.default_rng(1).normal(0, 3, 6)
        gradient = jax.jit(jax.grad(lambda x: group_reward_entropy(x, np.zeros(6, int), epsilon=0.0)[0][0]))(
            r
        )
        s = r.std(ddof=1)
        z = (r - r.mean()) / s
        p = np.exp(z) / np.exp(z).sum()
        c = -p * (np.log(p) + entropy_of(r))
        np.testing.assert_allclose(gradient, (c - c.mean() - z * (c @ z) / 5) / s, rtol=1e-9, atol=1e-12)


@jax.jit
@jax.value_and_grad
def _entropy_and_gradient(rewards):
    return group_reward_entropy(rewards, jnp.zeros(rewards.shape, int))[0][0]


def entropy_and_gradient(rewards):
    """Of one group, in float32."""
    return _entropy_and_gradient(np.asarray(rewards, np.float32))


def test_entropy_is_invariant_and_bounded():
    rng = np.random.default_rng(2)
    for k in (3, 8):
        r = rng.normal(size=k)
        entropy, _ = entropy_and_gradient(r)
        assert 0 < entropy < np.log(k)
        for a, b in ((2.5, 0.0), (0.01, 3.0), (100.0, -7.0)):
            np.testing.assert_allclose(entropy_and_gradient(a * r + b)[0], entropy, rtol=1e-4)


def test_one_reward_far_from_the_rest():
    """The outlier of K has z = (K−1)/√K: about √K, which no softmax may overflow on."""
    k = 20_000
    entropy, gradient = entropy_and_gradient(np.eye(1, k)[0] * 1e6)
    assert 0 <= entropy < 1e-3 and np.all(np.isfinite(gradient))


def test_two_rewards_have_a_constant_entropy():
    """z = ±1/√2 whatever they are: p = σ(±√2) = 0.804430, 0.195570: H = 0.494200."""
    for rewards in ([0.0, 1.0], [5.0, -3.0], [0.1, 0.2]):
        entropy, gradient = entropy_and_gradient(rewards)
        np.testing.assert_allclose(entropy, 0.494200, rtol=1e-5)
        np.testing.assert_allclose(gradient, 0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_equal_rewards_have_the_largest_entropy_and_no_gradient(k):
    entropy, gradient = entropy_and_gradient([0.7] * k)
    np.testing.assert_allclose(entropy, np.log(k), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_descending_the_entropy_sets_the_best_apart():
    r = jnp.array([0.0, 0.2, 0.5, 1.0])
    _, gradient = entropy_and_gradient(r)
    moved = r - 0.1 * gradient
    assert np.argmax(moved) == 3

    def gap(x):
        return (x[3] - jnp.mean(x[:3])) / jnp.std(x)

    assert gap(moved) > gap(r)


def test_pairs_are_the_extremes_of_their_group():
    """Group 4: rows 4 (0.9) and 6 (−1.1); 9: rows 3 and 1; one row and equal rows are no pairs."""
    high, low, is_pair = extreme_rows(REWARDS, GROUP)
    assert is_pair.tolist() == [True] * 5 + [False, True, False, False]
    assert high[is_pair].tolist() == [4, 3, 4, 3, 4, 4] and low[is_pair].tolist() == [6, 1, 6, 1, 6, 6]
    valid = np.arange(9) != 6  # then row 2 (−0.7) is group 4's lowest
    high, low, is_pair = extreme_rows(REWARDS, GROUP, valid)
    assert low[np.array([0, 2, 4])].tolist() == [2, 2, 2] and not is_pair[6]


def test_r2m_by_hand():
    """Labels choose rows 2 and 0 of three; rewards (1, 0, 1 + ln 3) there: −ln σ(ln 3) = ln(4/3). α = 0.25.

    Their entropy is 0.75·ln(4/3) less than the loss, and both rows and metrics say so.
    """
    rewards = jnp.array([1.0, 0.0, 1 + np.log(3)])
    loss, metrics = r2m(rewards, jnp.array([-5.0, 0.0, 5.0]), jnp.zeros(3, int), alpha=0.25)
    entropy = entropy_of(np.array(rewards, np.float64))
    np.testing.assert_allclose(loss, [0.75 * np.log(4 / 3) + 0.25 * entropy] * 3, rtol=1e-6)
    assert finalize(metrics) == pytest.approx(
        {"rewards/accuracies": 1, "rewards/margins": np.log(3), "reward_entropy": entropy}, rel=1e-6
    )


def test_labels_choose_and_rewards_learn():
    """α = 0: the labels' best row rises and their worst falls, by σ(−(r_w − r_l)); labels get no gradient."""
    rewards, labels = jnp.array([2.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 2.0])

    def total(r, labels):
        return r2m(r, labels, jnp.zeros(3, int), alpha=0.0)[0][0]

    gradient, of_labels = jax.jit(jax.grad(total, argnums=(0, 1)))(rewards, labels)
    np.testing.assert_allclose(gradient, [sigma(2), 0, -sigma(2)], rtol=1e-6)
    assert np.all(of_labels == 0)
    _, metrics = r2m(rewards, labels, jnp.zeros(3, int))
    assert finalize(metrics)["rewards/accuracies"] == 0


def test_r2ms_metrics_count_groups_and_not_rows():
    """Three rows with a margin of 5, two with −1: (5 − 1)/2."""
    rewards, labels = jnp.array([5.0, 0.0, 1.0, 0.0, 1.0]), jnp.array([2.0, 0.0, 1.0, 1.0, 0.0])
    _, metrics = r2m(rewards, labels, jnp.array([0, 0, 0, 1, 1]))
    metrics = finalize(metrics)
    assert metrics["rewards/margins"] == 2 and metrics["rewards/accuracies"] == 0.5


def test_a_group_of_equal_labels_has_the_entropy_alone():
    """Three equal labels, a single row, and α = 0: nothing to learn; with α = 1, ln 3 of equal rewards."""
    group = np.array([0, 0, 0, 1])
    rewards, labels = jnp.ones(4), jnp.full(4, 2.0)
    loss, metrics = r2m(rewards, labels, group, alpha=0.0)
    assert np.all(loss == 0) and "rewards/margins" not in finalize(metrics)
    loss, _ = r2m(rewards, labels, group, alpha=1.0)
    np.testing.assert_allclose(loss, [np.log(3)] * 3 + [0], rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda r: jnp.sum(r2m(r, labels, group)[0])))(rewards)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_bad_arguments_are_named():
    x, mask = jnp.zeros(3), jnp.ones(3, bool)
    with pytest.raises(ValueError, match=r"alpha=1\.5"):
        r2m(x, x, jnp.zeros(3, int), alpha=1.5)
    with pytest.raises(ValueError, match=r"group \(2,\)"):
        group_reward_entropy(x, jnp.zeros(2, int))
    with pytest.raises(ValueError, match=r"rewards \(2,\)"):
        r2m(x, x[:2], jnp.zeros(3, int))
    with pytest.raises(ValueError, match=r"preferences \(3,\)"):
        uniarm(x, x, x, x, mask)
    with pytest.raises(ValueError, match=r"weights \(3,\)"):
        uniarm(x, x, jnp.ones((3, 2)), x, mask)
    with pytest.raises(ValueError, match="shapes differ"):
        arm(x, x[:2], mask)
