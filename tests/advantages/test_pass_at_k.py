"""Advantages of the best of k, against enumeration of every subset."""

from functools import partial
from itertools import combinations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import ADVANTAGES, grpo, grpo_pass_at_k, pass_at_k_training
from jaxrl_llm.losses import finalize

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def enumerated(right, k):
    """Every k-subset's advantage among all k-subsets, and each row's mean over the subsets it is in."""
    sets = list(combinations(range(len(right)), k))
    reward = np.array([max(right[i] for i in s) for s in sets], float)
    if not sets or reward.std() == 0:
        return np.zeros(len(right)), reward.mean() if sets else None
    advantage = (reward - reward.mean()) / reward.std()
    return np.array([advantage[[i in s for s in sets]].mean() for i in range(len(right))]), reward.mean()


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_analytic_form_is_the_mean_over_all_subsets(k):
    """Groups of 1 to 6 rows with every number of right ones, all in one batch; k rows or fewer give 0."""
    groups = [[1] * c + [0] * (n - c) for n in range(1, 7) for c in range(n + 1)]
    rewards = np.concatenate(groups).astype(np.float32)
    group = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    wanted = [enumerated(g, k) for g in groups]
    shuffle = np.random.default_rng(0).permutation(len(rewards))
    got, metrics = pass_at_k_training(rewards[shuffle], group[shuffle], k=k)
    close(got, np.concatenate([a for a, _ in wanted])[shuffle])
    assert np.all(np.asarray(got)[np.bincount(group)[group[shuffle]] <= k] == 0)
    numbers = finalize(metrics)
    assert numbers["pass_at_k"] == pytest.approx(np.mean([p for _, p in wanted if p is not None]), rel=1e-5)
    assert numbers["small_groups"] == pytest.approx(np.mean([len(g) < k for g in groups]))


def test_one_try_is_grpo():
    """With the population's standard deviation √(p(1−p))."""
    rewards, group = jnp.array([1.0, 0, 0, 1, 1, 0, 1, 1]), jnp.array([3, 3, 3, 8, 8, 8, 8, 5])
    close(pass_at_k_training(rewards, group, k=1)[0], grpo(rewards, group, epsilon=0.0, ddof=0)[0])


def test_more_tries_turn_to_harder_prompts():
    """The number of right rows of eight whose group is pushed most (Σ|A| = 2n⁺A⁺ = 2n⁺√((1−P)/P)).

    k = 1: 4, by symmetry. k = 2: 3, of 1−P = 21, 15, 10, 6 in 28 and Σ|A| = 3.5, 4.3, 4.5, 4.2. k = 4: 2, of
    1−P = 35, 15, 5, 1 in 70 and Σ|A| = 2, 2.1, 1.7, 1. Fewer than k wrong rows: every set of k is right.
    """
    right = np.arange(9)
    rewards, group = (np.arange(8) < right[:, None]).ravel(), np.repeat(right, 8)
    for k, most in {1: 4, 2: 3, 4: 2}.items():
        size = np.abs(pass_at_k_training(rewards, group, k=k)[0]).reshape(9, 8).sum(1)
        assert np.argmax(size) == most
        assert np.all((size == 0) == ((right == 0) | (8 - right < k)))


def test_right_is_what_exceeds_the_threshold():
    rewards, group = jnp.array([0.2, 0.3, 0.9, jnp.nan, -jnp.inf, 5.0]), jnp.zeros(6, int)
    valid = jnp.arange(6) < 5
    got, metrics = pass_at_k_training(rewards, group, valid, k=2, threshold=0.25)
    wanted, _ = enumerated([0, 1, 1], 2)
    close(got[:3], wanted)
    assert np.all(got[3:] == 0) and finalize(metrics)["nonfinite_rewards"] == 2 / 5
    assert finalize(metrics)["reward"] == pytest.approx(1.4 / 3)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_the_best_row_gets_what_it_adds(scale):
    """max over the group less max over the others, for ragged groups with ties and single rows."""
    rng = np.random.default_rng(1)
    group = rng.permutation(np.repeat([5, -2, 7, 1, 9], [1, 2, 4, 6, 3]))
    rewards = rng.integers(0, 4, len(group)).astype(np.float32) + (group == 1) * rng.random(len(group))
    rewards = rewards.astype(np.float32)
    rewards[np.flatnonzero(group == 9)] = 2, 2, 1  # two best rows: none adds anything
    wanted = np.zeros(len(group))
    for i, g in enumerate(group):
        rows, others = rewards[group == g], rewards[(group == g) & (np.arange(len(group)) != i)]
        if len(others):
            std = rows.std(ddof=1) + 0.25 if scale == "group" else 1
            wanted[i] = (rows.max() - others.max()) / std
    got, metrics = grpo_pass_at_k(rewards, group, scale=scale, epsilon=0.25)
    close(got, wanted)
    assert np.count_nonzero(got) >= 2 and np.all(np.asarray(got)[(group == 5) | (group == 9)] == 0)
    assert finalize(metrics) == pytest.approx({"reward": rewards.mean(), "nonfinite_rewards": 0})


def test_the_best_row_that_does_not_count():
    rewards, group = jnp.array([jnp.inf, 9.0, 4.0, 2.0, jnp.nan]), jnp.zeros(5, int)
    got, metrics = grpo_pass_at_k(rewards, group, jnp.array([True, False, True, True, True]), scale="none")
    assert got.tolist() == [0, 0, 2, 0, 0] and finalize(metrics)["nonfinite_rewards"] == 0.5


def test_by_name():
    rewards, group = jnp.array([1.0, 0, 0, 1]), jnp.zeros(4, int)
    close(ADVANTAGES["pass_at_k"](rewards, group, k=2)[0], enumerated([1, 0, 0, 1], 2)[0])
    assert np.all(ADVANTAGES["grpo_pass_at_k"](rewards, group)[0] == 0)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="k=0 tries"):
        pass_at_k_training(jnp.zeros(3), jnp.zeros(3, int), k=0)
    with pytest.raises(ValueError, match="scale 'batch'; one of group, none"):
        grpo_pass_at_k(jnp.zeros(3), jnp.zeros(3, int), scale="batch")
    with pytest.raises(ValueError, match=r"group \(2,\)"):
        pass_at_k_training(jnp.zeros(3), jnp.zeros(2, int), k=1)
