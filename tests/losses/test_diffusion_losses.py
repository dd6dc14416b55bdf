"""Losses of masked diffusion against a corpus whose every probability is known."""

import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm import losses
from jaxrl_llm.losses import diffusion as d
from jaxrl_llm.losses import diffusion_policy as policy
from jaxrl_llm.sampling import diffusion_options, enumerated
from jaxrl_llm.sampling.diffusion import decode
from jaxrl_llm.sampling.diffusion_options import Method
from jaxrl_llm.sampling.diffusion_state import to_trajectories

VOCAB, SIZE = 3, 4  # a prompt of one token, then a response of four
MASK = VOCAB
EVERY = np.array(list(itertools.product(range(VOCAB), repeat=1 + SIZE)), np.int32)
rng = np.random.default_rng(0)
CORPUS = enumerated.Corpus(EVERY, rng.dirichlet(np.full(len(EVERY), 0.3)), VOCAB)
TOKENS = jnp.asarray(EVERY[rng.choice(len(EVERY), 5, p=CORPUS.probs)])
RESPONSE = jnp.broadcast_to(jnp.arange(1 + SIZE) > 0, TOKENS.shape)
PROMPT = ~RESPONSE
KEYS = jax.random.split(jax.random.key(0), len(TOKENS))
SUBSETS = np.array(list(itertools.product((False, True), repeat=SIZE)))[1:]


def model(corpus=CORPUS, *, params=None, sharpness=1.0):
    """A corpus as the model of a loss. Other than sharp as it is, its conditionals contradict each other."""
    params = corpus.params if params is None else params

    def logp(noisy, tokens):
        columns = jnp.broadcast_to(jnp.arange(noisy.shape[1]), noisy.shape)
        lengths = jnp.full(len(noisy), noisy.shape[1])
        logits = enumerated.denoiser(corpus.vocab_size).states(params, noisy, lengths, columns)
        distribution = jax.nn.log_softmax(sharpness * logits[..., : corpus.vocab_size])
        return jnp.take_along_axis(distribution, tokens[..., None], axis=-1)[..., 0]

    return logp


def truth(tokens, corpus=CORPUS, *, prompt=1):
    """ln p(response | prompt), from the table."""
    rows = np.asarray(tokens)
    same = corpus.sequences[None] == rows[:, None]
    given_prompt = same[..., :prompt].all(-1) @ corpus.probs
    return np.log(same.all(-1) @ corpus.probs) - np.log(given_prompt)


def all_masks(tokens):
    """Every way to mask the responses, weighted so that a mean over draws is the exact expectation.

    Of n tokens k are masked, k uniform and the subset too: p(S) = 1/(n·C(n, k)), and the weight is n/k.
    """
    k = SUBSETS.sum(1)
    chance = np.array([1 / (SIZE * math.comb(SIZE, size)) for size in k])
    weight = len(SUBSETS) * chance * SIZE / k
    hidden = np.pad(SUBSETS, ((0, 0), (1, 0)))[:, None]
    hidden = np.broadcast_to(hidden, (len(SUBSETS), *tokens.shape))
    return d.Draws(hidden, hidden, np.broadcast_to(weight[:, None], (len(SUBSETS), len(tokens))))


# --- bounds


def bounds(logp, beta=1.5):
    """Exact ELBO and EUBO of each response."""
    draws = all_masks(TOKENS)
    values = d.logp_of_draws(logp, TOKENS, draws.hidden, MASK)
    return d.lower_bound(values, draws).sum(1), d.upper_bound(values, draws, beta=beta).sum(1)


@pytest.mark.parametrize("beta", [1.0, 1.5, 4.0])
def test_bounds_enclose_the_truth(beta):
    """Of consistent conditionals the ELBO is exact (every order's chain rule gives ln p) and the EUBO above.

    The mean over tokens, which SPG's code reports as a bound, is far above both.
    """
    low, high = jax.jit(lambda: bounds(model(), beta))()
    np.testing.assert_allclose(low, truth(TOKENS), rtol=1e-5)
    assert np.all(high > truth(TOKENS) + 0.05)
    assert np.all(low / SIZE > truth(TOKENS) + 0.5)


def test_bounds_of_a_model_that_contradicts_itself():
    """Truth is then what decoding in a random order gives: the mean over orders of products."""
    logp = jax.jit(model(sharpness=0.6))
    at = {}
    for subset in SUBSETS:
        hidden = np.concatenate([[False], subset])
        at[tuple(np.flatnonzero(subset))] = np.asarray(logp(jnp.where(hidden, MASK, TOKENS), TOKENS))[:, 1:]
    orders = [
        np.exp(sum(at[tuple(sorted(order[i:]))][:, order[i]] for i in range(SIZE)))
        for order in itertools.permutations(range(SIZE))
    ]
    random_order = np.log(np.mean(orders, axis=0))
    low, high = bounds(logp, beta=float(SIZE))
    assert np.all(low < random_order - 1e-4)
    assert np.all(high > random_order + 1e-4)


def test_gradients_of_bound_and_trace_are_those_of_the_likelihood():
    """∂ ln p(x | prompt) / ∂ ln p(s) = [s = x] − p(s | prompt), whichever way it is computed."""
    steps = jnp.asarray([[-1, 2, 0, 3, 1]] * len(TOKENS))

    def elbo(params):
        return jnp.sum(bounds(model(params=params))[0])

    def traced(params):
        out = policy.trace_logp(
            model(params=params), TOKENS, RESPONSE, steps, KEYS, mask_id=MASK, num_steps=4
        )
        return jnp.sum(out.logp)

    expected = np.zeros(len(EVERY))
    for row in np.asarray(TOKENS):
        same_prompt = EVERY[:, 0] == row[0]
        expected += (row == EVERY).all(1) - same_prompt * CORPUS.probs / CORPUS.probs[same_prompt].sum()
    for estimate in (elbo, traced):
        gradient = jax.jit(jax.grad(estimate))(CORPUS.params | {"sequences": EVERY.astype(np.float32)})
        np.testing.assert_allclose(gradient["logp"], expected, atol=2e-5)


def test_upper_bound_is_the_formula_and_survives_unscored_tokens():
    """Against numpy; a token that no draw scored is 0, with gradient 0, whatever its log-prob."""
    logp = rng.uniform(-3, 0, (5, 2, 3)).astype(np.float32)
    scored = rng.random((5, 2, 3)) > 0.4
    scored[:, 1, 2] = False
    logp[~scored] = np.nan
    draws = d.Draws(scored, scored, rng.uniform(1, 3, (5, 2)).astype(np.float32))
    value, back = jax.vjp(lambda x: d.upper_bound(x, draws, beta=2.0), logp)
    powers = np.where(scored, draws.weight[..., None] * np.exp(2 * np.nan_to_num(logp)), 0)
    expected = np.log(np.maximum(powers.mean(0), 1e-30)) / 2
    expected[1, 2] = 0
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    share = powers / np.maximum(powers.sum(0), 1e-30)  # each draw's part of the mean
    np.testing.assert_allclose(back(jnp.ones((2, 3)))[0], share, rtol=1e-5, atol=1e-7)
    low = d.lower_bound(logp, draws)
    np.testing.assert_allclose(
        low, (draws.weight[..., None] * np.where(scored, np.nan_to_num(logp), 0)).mean(0), rtol=1e-5
    )


# --- random masks

jitted_masks = jax.jit(d.draw_masks, static_argnums=2, static_argnames="block_size")


def test_draws_are_uniform_in_number_and_subset():
    """k is spread exactly evenly over 1..n, subsets of a size are equally frequent, the weight is n/k."""
    lengths = np.array([4, 3, 1, 0])
    mask = np.arange(6) < lengths[:, None]
    count = 2400
    draws = jitted_masks(jax.random.split(jax.random.key(1), 4), jnp.asarray(mask), count)
    scored, weight = np.asarray(draws.scored), np.asarray(draws.weight)
    assert np.array_equal(draws.hidden, scored) and not np.any(scored & ~mask)
    for row, n in enumerate(lengths):
        k = scored[:, row].sum(1)
        np.testing.assert_allclose(weight[:, row], n / np.maximum(k, 1), rtol=1e-6)
        for size in range(1, n + 1):
            assert abs((k == size).sum() - count / n) <= 1
            found = Counter(map(tuple, scored[k == size, row, :n]))
            assert len(found) == math.comb(n, size)
            expected = count / n / len(found)
            assert sum((x - expected) ** 2 / expected for x in found.values()) < 30  # at most 5 degrees


def test_draws_in_blocks():
    """Earlier blocks are clean, later ones hidden; the weight is n/k of the block times their number."""
    mask = jnp.asarray(np.arange(8) < np.array([7, 3])[:, None]) & (jnp.arange(8) > 0)  # 6 and 2 tokens
    draws = jitted_masks(jax.random.split(jax.random.key(2), 2), mask, 12, block_size=4)
    hidden, scored, weight = (np.asarray(x) for x in draws)
    blocks = np.array([[9, 0, 0, 0, 0, 1, 1, 9], [9, 0, 0, 9, 9, 9, 9, 9]])
    for row, total in ((0, 2), (1, 1)):
        drawn = [set(blocks[row, scored[k, row]]) for k in range(12)]
        assert all(len(x) == 1 for x in drawn)
        drawn = np.array([x.pop() for x in drawn])
        assert all((drawn == b).sum() == 12 // total for b in range(total))
        for k, block in enumerate(drawn):
            later = (blocks[row] > block) & (blocks[row] < 9)
            np.testing.assert_array_equal(hidden[k, row], scored[k, row] | later)
            n = (blocks[row] == block).sum()
            assert weight[k, row] == pytest.approx(total * n / scored[k, row].sum())


@pytest.mark.parametrize("block_size", [None, 2, 3])
def test_likelihood_of_a_response_by_sampling(block_size):
    """4,000 draws of consistent conditionals come within 5 standard errors of ln p, in blocks too."""
    logp = model()
    draws = jitted_masks(KEYS, RESPONSE, 4000, block_size=block_size)
    values = jax.jit(lambda hidden: d.logp_of_draws(logp, TOKENS, hidden, MASK))(draws.hidden)
    terms = np.asarray(draws.weight) * np.where(draws.scored, values, 0).sum(-1)
    error = terms.std(0) / math.sqrt(len(terms))
    assert np.all(np.abs(terms.mean(0) - truth(TOKENS)) < 5 * error)
    if block_size is None:
        few = jax.jit(lambda k: d.likelihood_bound(logp, TOKENS, RESPONSE, k, mask_id=MASK, num_draws=64))
        assert np.all(np.abs(few(KEYS) - truth(TOKENS)) < 40 * error)


SEGMENTS = st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=3, max_size=3)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(sizes=SEGMENTS, seed=st.integers(0, 2**31))
def test_noise_of_packed_examples(sizes, seed):
    """One probability for each example, a whole stratum apart; prompts, padding and clean tokens stay."""
    segment_ids, mask = np.zeros((3, 15), np.int32), np.zeros((3, 15), bool)
    for row, lengths in enumerate(sizes):
        ids = np.repeat(np.arange(len(lengths)) + 1, lengths)
        segment_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = np.arange(len(ids)) > np.searchsorted(ids, ids)  # all but each first token
    tokens = np.random.default_rng(seed).integers(0, 9, (3, 15))
    noisy = packed_noise(jax.random.key(seed), tokens, mask, segment_ids)
    is_masked, rate = np.asarray(noisy.masked), np.asarray(noisy.rate)
    assert not np.any(is_masked & ~mask)
    np.testing.assert_array_equal(noisy.tokens, np.where(is_masked, 99, tokens))
    assert np.all(rate[~mask] == 1)
    count = sum(map(len, sizes))
    rates = []
    for row, segment in itertools.product(range(3), range(1, 4)):
        own = rate[row][mask[row] & (segment_ids[row] == segment)]
        assert np.ptp(own) == 0 if own.size else True
        rates += [own[0]] if own.size else [None]
    of_examples = [
        r for (row, s), r in zip(itertools.product(range(3), range(3)), rates) if s < len(sizes[row])
    ]
    places = [(r - 1e-3) / (1 - 1e-3) - i / count for i, r in enumerate(of_examples) if r is not None]
    offsets = np.mod(np.array(places) + 1e-5, 1)
    np.testing.assert_allclose(offsets, offsets[0] if len(offsets) else 0, atol=1e-5)


packed_noise = jax.jit(
    lambda key, tokens, mask, ids: d.add_noise(key, tokens, mask, mask_id=99, segment_ids=ids)
)


def test_number_of_masked_tokens_follows_the_rate():
    """Rows of 400 tokens: 5 standard deviations of a binomial; rates half, and a row apart, cover (0, 1]."""
    tokens = jnp.zeros((16, 400), jnp.int32)
    noisy = d.add_noise(jax.random.key(3), tokens, tokens == 0, mask_id=9)
    rate = np.asarray(noisy.rate)[:, 0]
    error = np.sqrt(400 * rate * (1 - rate))
    assert np.all(np.abs(np.asarray(noisy.masked).sum(1) - 400 * rate) < 5 * error + 1)
    np.testing.assert_allclose(np.diff(np.sort(rate)), 0.999 / 16, rtol=1e-4)
    assert 1e-3 <= rate.min() < 0.999 / 16 + 1e-3


# --- the training loss


def test_weighted_cross_entropy_is_the_negative_log_likelihood():
    """Expectation over all masks and t, in closed form −ln p(x): a polynomial in t, so 3 nodes are exact."""
    logp = model()
    hidden = np.pad(SUBSETS, ((0, 0), (1, 0)))[:, None] & np.ones((1, len(TOKENS), 1), bool)
    values = d.logp_of_draws(logp, TOKENS, jnp.asarray(hidden), MASK)
    nodes, quadrature = np.polynomial.legendre.leggauss(3)
    total = 0.0
    for t, w in zip((nodes + 1) / 2, quadrature / 2):
        for subset, mask, value in zip(SUBSETS, hidden, values):
            loss, metrics = losses.masked_cross_entropy(value, mask, jnp.full(TOKENS.shape, t), RESPONSE)
            chance = t ** subset.sum() * (1 - t) ** (~subset).sum()
            total += w * chance * np.asarray(loss).sum(1)
            assert losses.finalize(metrics)["masked_ratio"] == pytest.approx(subset.mean())
    np.testing.assert_allclose(total, -truth(TOKENS), rtol=1e-5)


def test_example_mean():
    """Against a loop over examples, one of which has no token that counts."""
    segment_ids = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 2, 3, 0, 0]])
    mask = np.array([[0, 1, 0, 1, 1, 1], [1, 0, 0, 1, 1, 0]], bool)
    loss = np.where(mask, rng.normal(size=mask.shape), np.nan)
    own = [
        (r, s) for r, s in itertools.product(range(2), range(1, 4)) if np.any(mask[r] & (segment_ids[r] == s))
    ]
    means = [loss[r, mask[r] & (segment_ids[r] == s)].mean() for r, s in own]
    total = losses.example_mean(loss, mask, segment_ids)
    np.testing.assert_allclose([total.sum, total.weight], [sum(means), len(means)], rtol=1e-6)


# --- estimates for policy gradients


def test_responses_of_one_token():
    """Full mask, SPG's bounds, likelihood bound and trace are ln p; the coupled one is (1 + 1/q)/2 · ln p."""
    logp, tokens = model(), jnp.tile(TOKENS, (4, 1))
    mask = jnp.broadcast_to(jnp.arange(1 + SIZE) == SIZE, tokens.shape)
    keys = jax.random.split(jax.random.key(5), len(tokens))
    exact = truth(tokens, prompt=SIZE)
    step = jnp.where(mask, 0, -1)

    @jax.jit
    def estimates(keys):
        arrays, plain = (logp, tokens, mask, ~mask, keys), {"mask_id": MASK, "prompt_rate": 0.0}
        traced = policy.trace_logp(logp, tokens, mask, step, keys, mask_id=MASK, num_steps=2, sampled_steps=1)
        return (
            policy.full_mask_logp(*arrays, **plain),
            *policy.spg_bounds(*arrays, **plain, num_draws=3, beta=2.0),
            traced.logp,
            traced.logp * traced.weight,
            policy.coupled_logp(logp, tokens, mask, keys, mask_id=MASK, low=0.4, high=0.4),
            d.likelihood_bound(logp, tokens, mask, keys, mask_id=MASK, num_draws=1),
        )

    *equal, coupled, likelihood = estimates(keys)
    for estimate in equal:
        np.testing.assert_allclose(estimate[:, -1], exact, rtol=1e-5)
        assert np.all(np.asarray(estimate)[:, :-1] == 0)
    np.testing.assert_allclose(likelihood, exact, rtol=1e-5)
    factors = {round(float(x), 4) for x in coupled[:, -1] / exact}
    assert factors == {round((1 + 1 / 0.4) / 2, 4), round((1 + 1 / 0.6) / 2, 4)}


def test_the_full_mask_takes_tokens_for_independent():
    """Each token's marginal given the prompt, or given nothing where the prompt is hidden."""
    for rate, first in ((0.0, 1), (1.0, 0)):
        out = policy.full_mask_logp(model(), TOKENS, RESPONSE, PROMPT, KEYS, mask_id=MASK, prompt_rate=rate)
        for row, estimate in zip(np.asarray(TOKENS), out):
            agrees = (EVERY[:, :first] == row[:first]).all(1)
            weights = np.where(agrees, CORPUS.probs, 0)
            marginal = [(weights * (EVERY[:, j] == row[j])).sum() / weights.sum() for j in range(1, 1 + SIZE)]
            np.testing.assert_allclose(estimate[1:], np.log(marginal), rtol=1e-5)


def test_coupled_masks_score_every_token_once_in_the_other_ones_context():
    """What the model is shown: all masked, a part of the response, and the rest of it; t in [low, high]."""
    shown = []

    def logp(noisy, tokens):
        jax.debug.callback(lambda x: shown.append(np.asarray(x) == MASK), noisy, ordered=True)
        return jnp.full(tokens.shape, -1.0)

    out = np.asarray(policy.coupled_logp(logp, TOKENS, RESPONSE, KEYS, mask_id=MASK))
    jax.effects_barrier()
    full, first, other = shown
    np.testing.assert_array_equal(full, RESPONSE)
    np.testing.assert_array_equal(first ^ other, RESPONSE)
    assert not np.any(first & other)
    for row, in_first in zip(out, first):  # (1 + 1/q) / 2 with q = t or 1 − t
        inverse = -2 * row[1:] - 1
        t = np.where(in_first[1:], 1 / inverse, 1 - 1 / inverse)
        assert np.ptp(t) < 1e-5 and 0.2 <= t[0] <= 0.8


def test_spg_weighs_bounds_by_the_sign():
    """−A·lower, or −A·mixture below 0; the gradient goes where the bound is."""
    lower, upper = rng.uniform(-3, -2, (3, 2)), rng.uniform(-2, -1, (3, 2))
    advantages = np.array([[2.0], [-1.0], [0.0]])
    mask = np.array([[True, True], [True, False], [True, True]])
    loss, metrics = losses.spg(lower, upper, advantages, mask, upper_share=0.25)
    expected = np.array([-2 * lower[0], [0.25 * upper[1, 0] + 0.75 * lower[1, 0], 0], [0, 0]])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(losses.finalize(metrics)["bound_gap"], (upper - lower)[mask].mean(), rtol=1e-5)
    down, up = jax.grad(lambda *x: losses.spg(*x, advantages, mask, upper_share=0.25)[0].sum(), (0, 1))(
        jnp.asarray(lower), jnp.asarray(upper)
    )
    np.testing.assert_allclose(down, [[-2, -2], [0.75, 0], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(up, [[0, 0], [0.25, 0], [0, 0]], atol=1e-6)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
def test_the_trace_is_the_chain_rule(order):
    """One token a step, in a given order: the sum is ln p, and each term a conditional from the table."""
    step = jnp.asarray([[-1, *np.argsort(order)]] * len(TOKENS))
    out = policy.trace_logp(model(), TOKENS, RESPONSE, step, KEYS, mask_id=MASK, num_steps=SIZE)
    np.testing.assert_allclose(out.logp.sum(1), truth(TOKENS), rtol=1e-5)
    np.testing.assert_array_equal(out.weight, RESPONSE)
    last = 1 + order[-1]  # given all others
    for row, estimate in zip(np.asarray(TOKENS), out.logp):
        others = np.delete(row == EVERY, last, axis=1).all(1)
        exact = CORPUS.probs[(row == EVERY).all(1)] / CORPUS.probs[others].sum()
        np.testing.assert_allclose(estimate[last], np.log(exact[0]), rtol=1e-4, atol=1e-5)


def test_sampled_steps_are_unbiased_over_all_subsets():
    """Two of a row's 3 steps (and of 2, where that is all): each subset has the same chance; weight S/K."""
    step = np.array([[-1, 2, 0, 0, 1]] * 64 + [[-1, 1, 0, 1, 0]])
    tokens = jnp.tile(TOKENS[:1], (65, 1))
    mask = step >= 0
    keys = jax.random.split(jax.random.key(7), 65)
    options = {"mask_id": MASK, "num_steps": 4}
    whole = policy.trace_logp(model(), tokens, mask, step, keys, **options)
    part = policy.trace_logp(model(), tokens, mask, step, keys, sampled_steps=2, **options)
    drawn = np.asarray(part.weight) > 0
    np.testing.assert_allclose(part.logp, np.where(drawn, whole.logp, 0), rtol=1e-5)
    np.testing.assert_allclose(part.weight[:64], np.where(drawn[:64], 1.5, 0))
    np.testing.assert_array_equal(part.weight[64], mask[64])
    sums = {}
    for row in range(64):
        subset = frozenset(step[row, drawn[row]])
        sums[subset] = float((part.weight[row] * part.logp[row]).sum())
    assert set(sums) == {frozenset(x) for x in itertools.combinations(range(3), 2)}
    np.testing.assert_allclose(np.mean(list(sums.values())), whole.logp[0].sum(), rtol=1e-5)


def test_the_trace_of_a_decoded_response_is_what_the_decoder_recorded():
    """Drawn in random order two tokens a step: the trace gives the decoder's own log-probs again."""
    method = Method(SIZE, order="random")
    numbers = diffusion_options.settings(method, len(TOKENS), steps=2, temperature=1.0)
    prompts, lengths = TOKENS[:, :1], jnp.ones(len(TOKENS), jnp.int32)
    key, uids = jax.random.key(1), jnp.arange(len(TOKENS))
    denoiser = enumerated.denoiser(VOCAB)
    decoded = decode(denoiser, CORPUS.params, prompts, lengths, method, numbers, key=key, uids=uids)
    t = to_trajectories(decoded, prompts, lengths, numbers)
    assert np.all(decoded.steps == 2)
    out = policy.trace_logp(
        model(), t.tokens, t.action_mask, t.commit_step, KEYS, mask_id=MASK, num_steps=SIZE
    )
    np.testing.assert_allclose(out.logp, t.raw_logp, atol=1e-5)
    np.testing.assert_allclose(out.logp - t.log_kept, t.behaviour_logp, atol=1e-5)


def test_tokens_that_were_never_committed_were_masks():
    """An EOS put behind the end (step −1) is hidden throughout; a step out of range is NaN."""
    step = jnp.asarray([[-1, 1, 0, -1, -1]] * len(TOKENS))
    out = policy.trace_logp(model(), TOKENS, step >= 0, step, KEYS, mask_id=MASK, num_steps=2)
    for row, estimate in zip(np.asarray(TOKENS), out.logp):
        has = [CORPUS.probs[(EVERY[:, list(at)] == row[list(at)]).all(1)].sum() for at in ((0, 1, 2), (0,))]
        np.testing.assert_allclose(estimate.sum(), np.log(has[0] / has[1]), rtol=1e-4, atol=1e-5)
    late = policy.trace_logp(model(), TOKENS, step >= 0, step, KEYS, mask_id=MASK, num_steps=1)
    np.testing.assert_array_equal(np.isnan(late.logp), step == 1)


def test_equal_keys_give_a_ratio_of_one():
    """The old policy scored with the same keys: nothing is clipped, and the gradient is REINFORCE's."""
    objective = losses.policy_objective(surrogate="ppo_clip", aggregation="token_mean")
    advantages = jnp.asarray(rng.normal(size=(len(TOKENS), 1)), jnp.float32)
    for estimate in (
        lambda logp: policy.full_mask_logp(logp, TOKENS, RESPONSE, PROMPT, KEYS, mask_id=MASK),
        lambda logp: policy.coupled_logp(logp, TOKENS, RESPONSE, KEYS, mask_id=MASK),
    ):
        old = estimate(model())

        def clipped(values, old=old, estimate=estimate):
            new = estimate(model(params=CORPUS.params | {"logp": values}))
            total, metrics = objective(new, old, advantages, RESPONSE)
            return total.sum / total.weight, metrics

        def plain(values, estimate=estimate):
            new = estimate(model(params=CORPUS.params | {"logp": values}))
            return -jnp.sum(advantages * new) / RESPONSE.sum()

        start = CORPUS.params["logp"]
        (loss, metrics), gradient = jax.jit(jax.value_and_grad(clipped, has_aux=True))(start)
        np.testing.assert_allclose(loss, -advantages.mean(), rtol=1e-4)
        assert losses.finalize(metrics)["clip_ratio/region_mean"] == 0
        np.testing.assert_allclose(gradient, jax.jit(jax.grad(plain))(start), atol=1e-5)


def test_options_out_of_range_are_refused():
    logp = model()
    draws = all_masks(TOKENS)
    for call, message in (
        (lambda: d.add_noise(KEYS[0], TOKENS, RESPONSE, mask_id=MASK, least=0.0), "least=0.0"),
        (lambda: d.add_noise(KEYS[0], TOKENS, RESPONSE[:2], mask_id=MASK), "shapes differ"),
        (lambda: d.draw_masks(KEYS, RESPONSE, 0), "count=0"),
        (lambda: d.upper_bound(draws.hidden * 0.0, draws, beta=0.5), "beta=0.5"),
        (
            lambda: policy.full_mask_logp(
                logp, TOKENS, RESPONSE, PROMPT, KEYS, mask_id=MASK, prompt_rate=1.5
            ),
            "prompt_rate=1.5",
        ),
        (lambda: policy.coupled_logp(logp, TOKENS, RESPONSE, KEYS, mask_id=MASK, high=1.0), "high=1.0"),
        (
            lambda: policy.trace_logp(
                logp, TOKENS, RESPONSE, TOKENS, KEYS, mask_id=MASK, num_steps=2, sampled_steps=3
            ),
            "sampled_steps=3",
        ),
        (
            lambda: losses.spg(TOKENS, TOKENS, jnp.ones((5, 1)), RESPONSE, upper_share=-0.1),
            "upper_share=-0.1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
