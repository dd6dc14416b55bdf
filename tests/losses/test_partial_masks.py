"""UniGRPO's estimate, a random part of the response masked, against the corpus of test_diffusion_losses."""

import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_diffusion_losses import CORPUS, EVERY, KEYS, MASK, PROMPT, RESPONSE, SIZE, TOKENS, model, truth

from jaxrl_llm import losses

jitted = jax.jit(lambda tokens, mask, keys, shares: estimate(model(), tokens, mask, keys, shares))


def estimate(logp, tokens, mask, keys, shares):
    return losses.partial_logp(logp, tokens, mask, keys, mask_id=MASK, shares=shares)


def test_all_masked_is_the_mean_of_the_full_mask():
    """At the largest share; of one token at any share, and then that is diffu-GRPO's with a whole prompt."""
    full = losses.full_mask_logp(model(), TOKENS, RESPONSE, PROMPT, KEYS, mask_id=MASK, prompt_rate=0.0)
    out = jitted(TOKENS, RESPONSE, KEYS, jnp.full(len(TOKENS), 1 - 1e-7))
    mean = np.asarray(full)[:, 1:].mean(1, keepdims=True)
    np.testing.assert_allclose(out, np.where(RESPONSE, mean, 0), rtol=1e-5)
    last = jnp.broadcast_to(jnp.arange(1 + SIZE) == SIZE, TOKENS.shape)
    for share in (0.0, 0.5, 1.0):
        one = jitted(TOKENS, last, KEYS, jnp.full(len(TOKENS), share))
        full = losses.full_mask_logp(model(), TOKENS, last, ~last, KEYS, mask_id=MASK, prompt_rate=0.0)
        np.testing.assert_array_equal(one, full)
        np.testing.assert_allclose(one[:, -1], truth(TOKENS, prompt=SIZE), rtol=1e-5)


def test_one_masked_is_a_conditional_of_all_others():
    """At the smallest share: of a token drawn at random, from the table."""
    out = jitted(TOKENS, RESPONSE, KEYS, jnp.zeros(len(TOKENS)))
    for row, value in zip(np.asarray(TOKENS), np.asarray(out)):
        whole = CORPUS.probs[(row == EVERY).all(1)][0]
        same = [np.delete(row == EVERY, j, axis=1).all(1) for j in range(1, 1 + SIZE)]
        assert np.ptp(value[1:]) == 0 and value[0] == 0
        assert np.min(np.abs(np.log([whole / CORPUS.probs[s].sum() for s in same]) - value[1])) < 1e-5


def test_what_is_masked():
    """k = 1 + floor(share·n) tokens, every subset alike; never the prompt; rows without a token are 0."""
    copies, shown = 600, []
    lengths = np.array([4, 3, 0])
    mask = np.tile((np.arange(5) > 0) & (np.arange(5) <= lengths[:, None]), (copies, 1))
    shares = np.repeat(np.float32([0.3, 0.5, 0.99] * (copies // 3)), 3)

    def logp(noisy, tokens):
        shown.append(noisy == MASK)
        return jnp.full(tokens.shape, -1.0)

    keys = jax.random.split(jax.random.key(1), len(mask))
    out = estimate(logp, jnp.zeros(mask.shape, jnp.int32), jnp.asarray(mask), keys, jnp.asarray(shares))
    np.testing.assert_array_equal(out, -mask.astype(np.float32))
    hidden = np.asarray(shown[0])
    assert not np.any(hidden & ~mask)
    n = mask.sum(1)
    np.testing.assert_array_equal(hidden.sum(1), np.where(n, 1 + np.floor(shares * n), 0))
    for length, share in itertools.product((4, 3), (0.3, 0.5)):
        found = Counter(map(tuple, hidden[(n == length) & (shares == np.float32(share))]))
        assert len(found) == math.comb(length, 1 + int(share * length))
        expected = copies / 3 / len(found)
        assert sum((x - expected) ** 2 / expected for x in found.values()) < 30  # at most 5 degrees


def test_sums_are_draws_of_the_likelihood():
    """Of consistent conditionals the mean of n·e is ln p: within 5 standard errors, k evenly spread."""
    copies = 800
    tokens, mask = jnp.repeat(TOKENS, copies, axis=0), jnp.repeat(RESPONSE, copies, axis=0)
    shares = jnp.tile((jnp.arange(copies) + 0.5) / copies, len(TOKENS))
    out = jitted(tokens, mask, jax.random.split(jax.random.key(2), len(tokens)), shares)
    sums = np.asarray(out).sum(1).reshape(len(TOKENS), copies)
    assert np.all(np.abs(sums.mean(1) - truth(TOKENS)) < 5 * sums.std(1) / math.sqrt(copies))


def test_shares_are_spread_over_the_iterations():
    """A row's are 1/n apart whatever its start, which is uniform; without shares each key draws its own."""
    shares = np.asarray(losses.spread_shares(jax.random.split(jax.random.key(3), 2000), 4))
    assert shares.shape == (4, 2000) and np.all((shares >= 0) & (shares < 1))
    np.testing.assert_allclose(np.diff(np.sort(shares, axis=0), axis=0), 0.25, atol=1e-6)
    counts = np.bincount((shares[0] * 10).astype(int), minlength=10)
    assert np.sum((counts - 200) ** 2 / 200) < 30  # 9 degrees
    many = jax.random.split(jax.random.key(4), 400)
    tokens, mask = jnp.repeat(TOKENS[:1], 400, axis=0), jnp.repeat(RESPONSE[:1], 400, axis=0)
    seen = []
    estimate(lambda noisy, x: seen.append(noisy == MASK) or jnp.zeros(x.shape), tokens, mask, many, None)
    sizes = np.bincount(np.asarray(seen[0]).sum(1), minlength=SIZE + 1)
    assert sizes[0] == 0 and np.sum((sizes[1:] - 100) ** 2 / 100) < 20  # 3 degrees


def test_the_ratio_is_that_of_the_averages():
    """A clipped surrogate and k3 see one ratio per row; at ratio 1 the gradient is the estimate's own."""
    shares = jnp.asarray([0.1, 0.3, 0.5, 0.7, 0.9])
    advantages = jnp.asarray(np.random.default_rng(0).normal(size=(len(TOKENS), 1)), jnp.float32)
    objective = losses.policy_objective(aggregation="seq_mean_token_mean", auxiliary={"k3": 0.5})
    start = CORPUS.params["logp"]

    def of(values):
        return estimate(model(params=CORPUS.params | {"logp": values}), TOKENS, RESPONSE, KEYS, shares)

    old = of(start)

    def clipped(values):
        total, _ = objective(of(values), old, advantages, RESPONSE, ref_logp=old)
        return total.sum / total.weight

    def plain(values):
        return -jnp.mean(advantages[:, 0] * of(values)[:, 1])

    loss, gradient = jax.jit(jax.value_and_grad(clipped))(start)
    np.testing.assert_allclose(loss, -advantages.mean(), rtol=1e-5)
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(plain))(start), atol=1e-6)

    moved = start + jnp.asarray(np.random.default_rng(1).normal(size=start.shape) * 0.3, jnp.float32)
    d = np.asarray(of(moved) - old)[:, 1]
    a, r = np.asarray(advantages)[:, 0], np.exp(d)
    expected = -np.minimum(a * r, a * np.clip(r, 0.8, 1.2)) + 0.5 * (np.exp(-d) + d - 1)
    assert np.any(np.abs(r - 1) > 0.2)
    np.testing.assert_allclose(clipped(moved), expected.mean(), rtol=1e-4)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        estimate(model(), TOKENS, RESPONSE[:2], KEYS, None)
