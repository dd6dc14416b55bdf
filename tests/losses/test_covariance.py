"""Which tokens Clip-Cov and KL-Cov choose, and what they do to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import rows_of

from jaxrl_llm.losses import (
    clip_cov,
    clip_cov_tokens,
    covariance_means,
    kl_cov,
    kl_cov_tokens,
    ppo_clip,
    token_covariance,
)

MASK = jnp.array([[True, True, False], [True, False, True]])


def covariance_of(logp, advantages, mask):
    return token_covariance(logp, advantages, mask, *covariance_means(logp, advantages, mask))


def random_arrays(n=8, t=16, seed=0):
    """logp, advantages of rows, and a mask with an empty row."""
    rng = np.random.default_rng(seed)
    mask = rng.random((n, t)) > 0.3
    mask[1] = False
    logp, a = -3 * rng.random((n, t)), rng.normal(size=(n, 1))
    return jnp.asarray(logp, jnp.float32), jnp.asarray(a, jnp.float32), jnp.asarray(mask)


def test_covariance_by_hand():
    """Tokens −1, −2, −3, −2 with A = 3, 3, −1, −1: means −2 and 1."""
    logp = jnp.array([[-1.0, -2.0, jnp.nan], [-3.0, jnp.inf, -2.0]])
    assert [float(x) for x in covariance_means(logp, jnp.array([[3.0], [-1.0]]), MASK)] == [-2, 1]
    covariance = covariance_of(logp, jnp.array([[3.0], [-1.0]]), MASK)
    assert covariance.tolist() == [[2, 0, 0], [2, 0, 0]]


def test_covariance_is_numpys():
    logp, a, mask = random_arrays()
    tokens = np.asarray(mask)
    pair = np.asarray(logp)[tokens], np.broadcast_to(a, mask.shape)[tokens]
    covariance = np.asarray(covariance_of(logp, a, mask))
    assert covariance.sum() / tokens.sum() == pytest.approx(np.cov(*pair, ddof=0)[0, 1], rel=1e-4)
    assert np.all(covariance[~tokens] == 0)


def test_covariance_is_the_first_order_loss_of_entropy():
    """Along the natural gradient, logits + η·A: −dH/dη is the covariance of log π and A under π."""
    rng = np.random.default_rng(3)
    logits, a = jnp.asarray(rng.normal(size=(2, 7)), jnp.float32)

    def entropy(eta):
        logp = jax.nn.log_softmax(logits + eta * a)
        return -jnp.sum(jnp.exp(logp) * logp)

    logp = jax.nn.log_softmax(logits)
    p = jnp.exp(logp)
    tokens = token_covariance(logp[None], a[None], jnp.ones((1, 7), bool), jnp.sum(p * logp), jnp.sum(p * a))
    np.testing.assert_allclose(-jax.grad(entropy)(0.0), jnp.sum(p * tokens[0]), rtol=1e-4)


def test_nothing_to_choose_from():
    x, mask = jnp.zeros((2, 3)), jnp.zeros((2, 3), bool)
    assert [float(m) for m in covariance_means(x, x, mask)] == [0, 0]
    assert not np.any(kl_cov_tokens(x, x, mask))
    assert not np.any(clip_cov_tokens(x, x, x, mask, jax.random.key(0)))
    assert kl_cov_tokens(x[:0], x[:0], mask[:0]).shape == (0, 3)


@pytest.mark.parametrize("share, count", [(2e-4, 1), (0.05, None), (0.5, None), (1.0, None)])
def test_kl_cov_chooses_the_largest(share, count):
    logp, a, mask = random_arrays()
    count = count or int(share * int(mask.sum()))
    chosen = np.asarray(kl_cov_tokens(logp, a, mask, share=share))
    covariance = np.asarray(covariance_of(logp, a, mask))
    assert chosen.sum() == count and not np.any(chosen & ~np.asarray(mask))
    left = np.asarray(mask) & ~chosen
    assert not left.any() or covariance[chosen].min() >= covariance[left].max()


@pytest.mark.parametrize("rows, count", [(49, 1), (50, 1), (100, 2), (149, 2), (150, 3)])
def test_the_number_chosen_is_not_lost_to_rounding(rows, count):
    """2e-4 of 100 tokens a row: at least 1, and 1, 2 and 3 at 5000, 10 000 and 15 000 tokens."""
    logp = jnp.linspace(-1, 0, rows * 100).reshape(rows, 100)
    assert int(kl_cov_tokens(logp, logp, jnp.ones(logp.shape, bool)).sum()) == count


def test_masked_garbage_is_not_chosen():
    logp, a, mask = random_arrays()
    dirty = jnp.where(mask, logp, jnp.nan), jnp.where(mask, a, jnp.inf), mask
    np.testing.assert_array_equal(kl_cov_tokens(logp, a, mask), kl_cov_tokens(*dirty))
    key = jax.random.key(1)
    options = {"lower": 0.1, "share": 0.2}
    clean = clip_cov_tokens(logp, logp, a, mask, key, **options)
    np.testing.assert_array_equal(clean, clip_cov_tokens(dirty[0], dirty[0], dirty[1], mask, key, **options))


def candidates(logp, old_logp, a, mask, lower, upper):
    """Of ε = 0.2, in numpy."""
    covariance, r = np.asarray(covariance_of(logp, a, mask)), np.exp(np.asarray(logp - old_logp))
    is_clipped = ((r > 1.2) & (np.asarray(a) > 0)) | ((r < 0.8) & (np.asarray(a) < 0))
    return np.asarray(mask) & (covariance > lower) & (covariance < upper) & ~is_clipped, is_clipped


def test_clip_cov_draws_from_unclipped_tokens_of_high_covariance():
    logp, a, mask = random_arrays()
    old_logp = logp + jnp.asarray(np.random.default_rng(5).normal(size=logp.shape), jnp.float32)
    allowed, is_clipped = candidates(logp, old_logp, a, mask, 0.2, 1.0)
    assert np.any(is_clipped & np.asarray(mask)) and 5 < allowed.sum() < mask.sum()
    choose = jax.jit(
        lambda key, share: clip_cov_tokens(logp, old_logp, a, mask, key, share=share, lower=0.2, upper=1.0),
        static_argnums=1,
    )
    keys = jax.random.split(jax.random.key(0), 5)
    count = int(0.05 * int(mask.sum()))
    assert 1 < count < allowed.sum()
    draws = [np.asarray(choose(key, 0.05)) for key in keys]
    for draw in draws:
        assert draw.sum() == count and not np.any(draw & ~allowed)
    np.testing.assert_array_equal(draws[0], choose(keys[0], 0.05))
    assert any(np.any(draws[0] != draw) for draw in draws[1:])
    np.testing.assert_array_equal(choose(keys[0], 1.0), allowed)  # fewer than their share: all


def test_clip_cov_draws_evenly():
    """2 of 6 tokens: each in a third of 3000 draws, give or take 5 standard errors of 0.0086."""
    logp, a, _ = random_arrays(2, 4)
    mask = jnp.array([[True, True, False, True], [True, False, True, True]])
    options = {"share": 0.4, "lower": -99.0, "upper": 99.0}
    draw = jax.vmap(lambda key: clip_cov_tokens(logp, logp, a, mask, key, **options))
    chosen = np.asarray(draw(jax.random.split(jax.random.key(7), 3000)))
    assert np.all(chosen.sum((1, 2)) == 2)
    np.testing.assert_allclose(chosen.mean(0), np.where(mask, 1 / 3, 0), atol=0.043)


def test_clip_cov_is_ppo_but_for_the_chosen():
    ratios = [[0.5, 1.1, 2.0, np.nan]]
    a, chosen = [[1.0] * 4], np.array([[False, True, False, True]])
    loss, gradient, metrics = rows_of(ratios, a, lambda *x, **k: clip_cov(*x, chosen, **k), epsilon=0.25)
    ppo_loss, ppo_gradient, ppo_metrics = rows_of(ratios, a, ppo_clip, epsilon=0.25)
    np.testing.assert_array_equal(loss, np.where(chosen, 0, ppo_loss))
    np.testing.assert_array_equal(gradient, np.where(chosen, 0, ppo_gradient))
    assert metrics == ppo_metrics | {"clip_ratio/covariance_mean": pytest.approx(1 / 3)}


def test_kl_cov_pulls_the_chosen_back():
    """−A·r without a clip; the chosen ones +½·|ln r|: gradient ½ above r = 1, −½ below, 0 at 1."""
    ratios = [[0.5, 1.0, 2.0, 2.0]]
    chosen = np.array([[True, True, True, False]])
    loss, gradient, metrics = rows_of(ratios, [[1.0] * 4], lambda *x: kl_cov(*x, chosen, coefficient=0.5))
    half = np.log(2) / 2
    np.testing.assert_allclose(loss, [[-0.5 + half, -1, -2 + half, -2]], rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.5 - 0.5, -1, -2 + 0.5, -2]], rtol=1e-6)
    assert metrics == {"kl_cov/chosen_mean": 0.75, "clamped_ratio": 0}


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_a_bad_share_is_named(share):
    x = jnp.zeros((1, 2))
    with pytest.raises(ValueError, match=f"share={share}"):
        kl_cov_tokens(x, x, x == 0, share=share)
    with pytest.raises(ValueError, match=f"share={share}"):
        clip_cov_tokens(x, x, x, x == 0, jax.random.key(0), share=share)


def test_bad_shapes_are_named():
    x = jnp.zeros((2, 2))
    for loss in (clip_cov, kl_cov):
        with pytest.raises(ValueError, match=r"chosen \(2, 1\)"):
            loss(x, x, x, x == 0, x[:, :1] == 0)
    with pytest.raises(ValueError, match=r"advantages\[:, None\]"):
        kl_cov_tokens(x, x[0], x == 0)
    with pytest.raises(ValueError, match=r"logp \(2, 1\), mask \(2, 2\)"):
        kl_cov_tokens(x[:, :1], x, x == 0)
