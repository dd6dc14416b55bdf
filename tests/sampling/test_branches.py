"""Branches in lock-step: the combination's properties, and the decoder against whole forward passes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import params as params_lib
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.sampling import autoregressive, branches
from jaxrl_llm.sampling.autoregressive import prepare
from jaxrl_llm.sampling.branches import Branches, combine, contrast_weights, generate, guidance_weights
from jaxrl_llm.sampling.logits import Sampling, sampling_params
from jaxrl_llm.sampling.rules import forbid, forbid_rule

V = 150
SMALL = ModelConfig(
    vocab_size=V,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
)
OTHER = dataclasses.replace(
    SMALL,
    hidden_size=16,
    num_heads=2,
    num_kv_heads=1,
    num_layers=2,
    window=4,
    layer_kinds=("local", "global"),
    logit_softcap=10.0,
)


def make_params(cfg, seed=0):
    params = params_lib.init(jax.random.key(seed), transformer.param_specs(cfg))
    return params | {"embed": params["embed"] * 20}


PARAMS = {SMALL: make_params(SMALL), OTHER: make_params(OTHER, 1)}


def make_logits(branches, rows=6, size=40, seed=0):
    return 3 * jax.random.normal(jax.random.key(seed), (branches, rows, size))


# --- the combination


def test_weights_by_hand():
    assert contrast_weights(2, 0.5).tolist() == [1, 2, -0.5]
    assert contrast_weights(2, 0.5, form="code").tolist() == [0, 2, -0.5]
    assert contrast_weights(2, 0, form="code").tolist() == [1, 2, 0]  # the negative path is off
    assert guidance_weights([3, 1]).tolist() == [1, 3, 1]
    assert guidance_weights([3, 1], normalise=True).tolist() == pytest.approx([0.2, 0.6, 0.2])
    logits = jnp.array([[[1.0, 2.0, 0.0]], [[4.0, 0.0, 0.0]], [[0.0, 2.0, 8.0]]])
    np.testing.assert_allclose(combine(logits, contrast_weights(2, 0.5)), [[9, 1, -4]])
    # e^(1 - 2) = 0.37 and e^(0 - 2) = 0.14 of the most plausible
    np.testing.assert_allclose(combine(logits, contrast_weights(2, 0.5), 0.3), [[9, 1, -np.inf]])
    np.testing.assert_allclose(combine(logits, contrast_weights(2, 0.5), 0.4), [[-np.inf, 1, -np.inf]])


def test_no_contrast_is_the_original_bit_for_bit():
    logits = make_logits(3)
    assert np.array_equal(combine(logits, contrast_weights(0, 0)), logits[0])
    assert np.array_equal(combine(logits, guidance_weights([0, 0], normalise=True)), logits[0])


def test_beta_cuts_by_the_original():
    logits = make_logits(3)
    for beta, kept in ((0.0, 40), (1.0, 1)):
        assert np.isfinite(combine(logits, contrast_weights(1, 1), beta)).sum(axis=1).tolist() == [kept] * 6
    beta = jnp.linspace(0.01, 0.9, 6)
    probs = jax.nn.softmax(logits[0])
    plausible = probs >= beta[:, None] * probs.max(axis=1, keepdims=True)
    assert np.array_equal(np.isfinite(combine(logits, contrast_weights(1, 1), beta)), plausible)


@pytest.mark.parametrize("form", ["paper", "code"])
def test_constants_on_any_branch_change_nothing(form):
    logits, weights = make_logits(3), contrast_weights(2.2, 0.4, form=form)
    shifted = logits + jnp.array([7.0, -3.0, 11.0])[:, None, None]
    a, b = (jax.nn.softmax(combine(x, weights, 0.1)) for x in (logits, shifted))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_equal_branches_scale_the_original():
    """V_pos = V_neg = V: logits (1 + α - γ) l, the same argmax while that is above 0."""
    logits = jnp.broadcast_to(make_logits(1), (3, 6, 40))
    out = combine(logits, contrast_weights(1.0, 0.4))
    np.testing.assert_allclose(out, 1.6 * logits[0], rtol=1e-5)
    assert np.array_equal(out.argmax(axis=1), logits[0].argmax(axis=1))


def test_without_positive_it_is_vcd_up_to_scale():
    """l - γ n = (1 - γ) [(1 + a) l - a n] with a = γ / (1 - γ)."""
    logits, gamma = make_logits(2), 0.4
    a = gamma / (1 - gamma)
    contrast = combine(jnp.stack([logits[0], logits[0], logits[1]]), contrast_weights(0, gamma))
    vcd = combine(logits, jnp.array([1 + a, -a]))
    np.testing.assert_allclose(contrast, (1 - gamma) * vcd, atol=1e-5)


def test_guidance_is_the_product_of_distributions():
    """π ∝ π_base π_r^α; normalised it is that with all weights over 1 + α, and π_r in the limit."""
    logits = make_logits(2)
    base, reward = (np.asarray(jax.nn.softmax(x), np.float64) for x in logits)
    for alpha, normalise in ((1.0, False), (0.5, True), (1e4, True)):
        power = 1 / (1 + alpha) if normalise else 1.0
        expected = (base * reward**alpha) ** power if alpha < 100 else reward
        expected /= expected.sum(axis=1, keepdims=True)
        got = jax.nn.softmax(combine(logits, guidance_weights([alpha], normalise=normalise)))
        np.testing.assert_allclose(got, expected, atol=1e-5 if alpha < 100 else 1e-3)


# --- the decoder

CONTEXTS = [
    [[5, 6, 7], [9, 8, 7, 6, 5], [1], [2, 3]],
    [[5, 6], [9, 9, 9, 9, 9, 9, 9], [4, 1], [2, 3]],
    [[7], [9, 8], [100, 101, 102], [2, 3]],
]
ROWS = 4
KEY = jax.random.key(3)
NEVER = tuple(range(V, V + 20))
SAMPLING = Sampling(
    temperature=jnp.array([0.0, 1.0, 0.7, 1.3]),
    top_p=jnp.array([1.0, 1.0, 0.9, 1.0]),
    top_k=jnp.zeros(ROWS, jnp.int32),
    min_p=jnp.zeros(ROWS),
)


def run(models, weights, *, new=12, contexts=CONTEXTS, **options):
    """`models`: (config, numbers of contexts) in order."""
    return generate(
        [Branches(prepare(PARAMS[cfg], cfg), cfg, [contexts[i] for i in which]) for cfg, which in models],
        np.broadcast_to(np.reshape(weights, (len(weights), -1)), (len(weights), ROWS)),
        max_new_tokens=new,
        **{"sampling": SAMPLING, "key": KEY, "uids": np.arange(ROWS), "stop_ids": NEVER} | options,
    )


forward = jax.jit(
    lambda params, tokens, cfg: transformer.logits(params, transformer.forward(params, tokens, cfg), cfg),
    static_argnames="cfg",
)


def by_whole_passes(chunk, models, contexts=CONTEXTS):
    """Logits f64[B, S, C, V] before each token of a chunk, without any cache: each row read whole."""
    tokens, out = np.asarray(chunk.tokens), []
    new = tokens.shape[1]
    for cfg, which in models:
        for branch in which:
            batch = np.zeros((ROWS, 32), np.int32)
            for row, ids in enumerate(contexts[branch]):
                batch[row, : len(ids) + new] = [*ids, *tokens[row]]
            logits = np.asarray(forward(PARAMS[cfg], batch, cfg), np.float64)
            at = [slice(len(ids) - 1, len(ids) - 1 + new) for ids in contexts[branch]]
            out.append([logits[row, s] for row, s in enumerate(at)])
    return np.array(out)


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(
    ("models", "weights", "beta"),
    [
        ([(SMALL, (0, 1, 2))], contrast_weights(1.0, 0.5), 0.05),
        ([(SMALL, (0, 1)), (OTHER, (2,))], guidance_weights([-0.3, 1.5], normalise=True), 0.0),
    ],
    ids=["contrast", "guidance"],
)
def test_decoder_against_whole_forward_passes(models, weights, beta):
    """Every token was drawn from the combination of what the branches say when read whole, and says so."""
    chunk = run(models, weights, beta=beta)
    assert chunk.counts.tolist() == [12] * ROWS
    logits = by_whole_passes(chunk, models)
    w = np.asarray(weights, np.float64).reshape(len(logits), -1, 1, 1)
    combined = (w * logits).sum(axis=0)
    first = logits[0]
    if beta:
        combined = np.where(first >= first.max(axis=-1, keepdims=True) + np.log(beta), combined, -np.inf)
    tokens = np.asarray(chunk.tokens)
    for row in range(ROWS):
        t = float(SAMPLING.temperature[row])
        raw = log_softmax(first[row])
        for i, token in enumerate(tokens[row]):
            assert abs(float(chunk.raw_logp[row, i]) - raw[i, token]) < 1e-5
            if t == 0:
                assert combined[row, i, token] >= combined[row, i].max() - 1e-5
                continue
            logp = log_softmax(combined[row, i] / t)
            if (top_p := float(SAMPLING.top_p[row])) < 1:
                order = np.argsort(-logp)
                cut = order[np.cumsum(np.exp(logp[order])) - np.exp(logp[order]) >= top_p]
                logp[cut] = -np.inf
                logp -= np.log(np.exp(logp).sum())
            assert abs(float(chunk.behaviour_logp[row, i]) - logp[token]) < 2e-5
            tempered = log_softmax(first[row, i] / t)[token]
            assert abs(float(chunk.log_kept[row, i]) - (tempered - logp[token])) < 2e-5
    assert len(np.unique(tokens)) > 5


def test_one_branch_is_ordinary_sampling():
    """The same tokens as `autoregressive.generate` for the same key and uids, stop tokens included."""
    contexts = CONTEXTS[0]
    tokens = np.zeros((ROWS, 8), np.int32)
    for row, ids in zip(tokens, contexts):
        row[: len(ids)] = ids
    lengths = np.array([len(ids) for ids in contexts], np.int32)
    stop = tuple(range(80, 100))
    t = autoregressive.generate(
        prepare(PARAMS[SMALL], SMALL),
        SMALL,
        tokens,
        lengths,
        num_generations=1,
        max_new_tokens=12,
        sampling=SAMPLING,
        key=KEY,
        uids=np.arange(ROWS),
        stop_ids=stop,
    )
    plain = run([(SMALL, (0,))], np.ones(1), stop_ids=stop)
    # two further branches of weight 0 don't disturb it
    extra = run([(SMALL, (0, 1)), (OTHER, (2,))], np.array([1.0, 0.0, 0.0]), stop_ids=stop)
    for chunk in (plain, extra):
        for row, n in enumerate(lengths):
            new = np.asarray(t.tokens)[row, n : int(t.lengths[row])]
            assert chunk.tokens[row, : int(chunk.counts[row])].tolist() == new.tolist()
            assert bool(chunk.stopped[row]) == bool(t.finished[row])
            for name in ("behaviour_logp", "raw_logp", "log_kept"):
                expected = np.asarray(getattr(t, name))[row, n : n + len(new)]
                np.testing.assert_allclose(getattr(chunk, name)[row, : len(new)], expected, atol=1e-5)
    assert bool(plain.stopped.any())


def test_a_row_does_not_depend_on_its_neighbours():
    models, weights = [(SMALL, (0, 1, 2))], contrast_weights(1.0, 0.5)
    order = np.array([2, 0, 3, 1])
    first = run(models, weights)
    second = run(
        models,
        weights,
        contexts=[[branch[i] for i in order] for branch in CONTEXTS],
        uids=order,
        sampling=jax.tree.map(lambda x: x[order], SAMPLING),
    )
    for a, b in zip(first, second):
        assert np.array_equal(np.asarray(a)[order], b)


def test_rules_apply_to_the_combination():
    models, weights = [(SMALL, (0, 1, 2))], contrast_weights(1.0, 0.5)
    drawn = np.unique(run(models, weights).tokens[:2])
    states = [(forbid(drawn, V),), (forbid(drawn, V),), (forbid([], V),), (forbid([], V),)]
    ruled = run(models, weights, rules=(forbid_rule(V),), states=states)
    assert not set(drawn.tolist()) & set(np.unique(ruled.tokens[:2]).tolist())
    assert np.array_equal(ruled.tokens[2:], run(models, weights).tokens[2:])


def test_nothing_is_traced_twice_for_other_weights_and_lengths():
    models = [(SMALL, (0, 1, 2))]
    run(models, contrast_weights(1.0, 0.5))
    before = branches.decode._cache_size()
    run(models, contrast_weights(2.0, 0.1), beta=0.4, contexts=[[[1] * (i + 1)] * ROWS for i in range(3)])
    assert branches.decode._cache_size() == before


def test_a_row_that_goes_wrong_fails_alone():
    """A weight of infinity on one row: NaN there and nowhere else."""
    models = [(SMALL, (0, 1, 2))]
    weights = np.tile(contrast_weights(1.0, 0.5)[:, None], (1, ROWS))
    good = run(models, weights)
    weights[1, 2] = np.inf
    bad = run(models, weights)
    assert bad.failed.tolist() == [False, False, True, False] and bad.counts.tolist() == [12, 12, 0, 12]
    assert np.array_equal(np.asarray(bad.tokens)[[0, 1, 3]], np.asarray(good.tokens)[[0, 1, 3]])


def test_bad_input():
    models = [(SMALL, (0, 1, 2))]
    with pytest.raises(ValueError, match="unknown form 'x'"):
        contrast_weights(1, 1, form="x")
    with pytest.raises(ValueError, match="must be above 0 to normalise"):
        guidance_weights([-1], normalise=True)
    for options, message in (
        ({"weights": np.ones(2)}, "not for 3 branches"),
        ({"beta": 1.5}, "beta=1.5 must be in"),
        ({"new": 0}, "max_new_tokens=0"),
        ({"sampling": sampling_params(3)}, "sampling parameters"),
        ({"contexts": [*CONTEXTS[:2], CONTEXTS[2][:3]]}, "a branch has 3 contexts and another 4"),
        ({"contexts": [*CONTEXTS[:2], [[1], [], [1], [1]]]}, "an empty context"),
        ({"contexts": [*CONTEXTS[:2], [[1], [V], [1], [1]]]}, "token id 150 is outside"),
        ({"states": [()] * 3}, "states must be one for each"),
    ):
        with pytest.raises(ValueError, match=message):
            run(models, **{"weights": contrast_weights(1, 1)} | options)
    with pytest.raises(ValueError, match="vocabularies of 150 and 151"):
        generate(
            [Branches({}, cfg, CONTEXTS[:1]) for cfg in (SMALL, dataclasses.replace(SMALL, vocab_size=151))],
            np.ones(2),
            max_new_tokens=2,
            sampling=SAMPLING,
            key=KEY,
            uids=np.arange(ROWS),
        )
