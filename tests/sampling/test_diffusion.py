"""Decoding by unmasking where the truth is known: enumerated corpora, closed forms, and properties."""

import itertools

import diffusion_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_denoiser import LENGTHS, MASK, PARAMS, PLAIN, PROMPTS, VOCAB, head, states

from jaxrl_llm.models import denoiser as model
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.params import init
from jaxrl_llm.sampling import enumerated
from jaxrl_llm.sampling.diffusion import decode
from jaxrl_llm.sampling.diffusion_options import Method, grid_shares, settings
from jaxrl_llm.sampling.diffusion_state import Denoiser, of_model, to_trajectories

KEY = jax.random.key(1)


def fill(corpus, method, batch, *, prompts=None, uids=None, **values):
    """Responses of an enumerated corpus, as numpy."""
    prompts = np.zeros((batch, 0), np.int32) if prompts is None else prompts
    out = decode(
        enumerated.denoiser(corpus.vocab_size),
        corpus.params,
        prompts,
        np.full(batch, prompts.shape[1]),
        method,
        settings(method, batch, **values),
        key=KEY,
        uids=jnp.arange(batch) if uids is None else uids,
    )
    return jax.tree.map(np.asarray, out)


def fill_tiny(method, count=4, denoiser=PLAIN, params=PARAMS, rows=None, lexical=None, **values):
    rows = np.arange(count) % 4 if rows is None else np.asarray(rows)
    out = decode(
        denoiser,
        params,
        PROMPTS[rows],
        LENGTHS[rows],
        method,
        settings(method, len(rows), **values),
        key=KEY,
        uids=jnp.asarray(rows),
        lexical=lexical,
    )
    return jax.tree.map(np.asarray, out)


FOCORE = {"guidance": "high_information", "detector": "early"}


@pytest.mark.parametrize(
    ("copied", "options", "flips"),
    [
        (False, FOCORE, True),
        (False, {"guidance": "prompt"}, False),
        (True, FOCORE, False),
        (True, {"negative_prompt": "mask", **FOCORE}, True),
    ],
    ids=["focore", "cfg", "focore-copied", "focore-without-prompt"],
)
def test_focore_flips_the_answer_exactly_above_the_analytic_weight(copied, options, flips):
    """Eight prompts at four weights each: none, just below the prompt's own w*, just above, and far above."""
    corpus = enumerated.key_corpus(copied=copied)
    analytic = np.array([enumerated.flip_weight(k, copied=copied) for k in range(8)])
    weights = np.stack([0 * analytic, analytic - 1e-3, analytic + 1e-3, analytic + 5], axis=1)
    prompts = np.repeat(np.arange(8), 4)[:, None]
    out = fill(corpus, Method(6, **options), 32, prompts=prompts, guidance_weight=weights.reshape(-1))
    assert np.all(out.tokens[:, 0] == np.array(enumerated.KEYS)[prompts[:, 0]])
    right = out.tokens[:, -1] == np.array(enumerated.ANSWERS)[out.tokens[:, 0]]
    assert right.reshape(8, 4).tolist() == [[False, False, flips, flips]] * 8
    assert np.all((out.tokens[:, -1] == 0) | right)
    assert np.all(out.steps == 6) and np.all(out.commit_step[:, 0] == 0)
    every, after_first = np.full(24, 12), np.full(24, 11)  # FoCore has nothing to hide in the first round
    nfe = out.nfe.reshape(8, 4)
    assert np.all(nfe[:, 0] == 6)
    assert np.all(nfe[:, 1:].ravel() == (every if options["guidance"] == "prompt" else after_first))


def test_flip_weights_of_the_specification():
    weights = sorted(round(enumerated.flip_weight(k), 2) for k in range(8))
    assert weights == [0.72] * 6 + [0.78, 1.09]


def small_corpus():
    """Two tokens out of three, and a third that depends on both."""
    rng = np.random.default_rng(0)
    sequences = np.array(list(itertools.product(range(3), repeat=3)), np.int32)
    return enumerated.Corpus(sequences, rng.dirichlet(np.full(27, 0.7)), 3)


def test_the_enumerated_denoiser_is_conditional_probability():
    corpus = small_corpus()
    denoiser = enumerated.denoiser(3)
    for given in ((3, 3, 3), (1, 3, 3), (3, 2, 0), (2, 1, 0)):
        tokens = jnp.array([given])
        logits = denoiser.states(corpus.params, tokens, jnp.array([3]), jnp.array([[0, 1, 2]]))
        fits = np.all((np.array(given) == 3) | (corpus.sequences == given), axis=1)
        for i in range(3):
            p = [corpus.probs[fits & (corpus.sequences[:, i] == v)].sum() for v in range(3)]
            expected = np.array([*p, 0]) / corpus.probs[fits].sum()
            np.testing.assert_allclose(np.exp(logits[0, i]), expected, atol=1e-6)
    elsewhere = enumerated.Corpus(np.array([[0, 1], [2, 2]], np.int32), np.array([0.5, 0.5]), 3)
    unseen = denoiser.states(elsewhere.params, jnp.array([[1, 3]]), jnp.array([2]), jnp.array([[1]]))
    np.testing.assert_allclose(np.exp(unseen)[0, 0], [1 / 3, 1 / 3, 1 / 3, 0], atol=1e-6)
    with pytest.raises(ValueError, match="sum to 1"):
        enumerated.Corpus(np.zeros((2, 1), np.int32), np.array([0.5, 0.4]), 1)


def chi_square(counts, probs):
    """Standard scores of Pearson's statistic, by its mean and variance."""
    expected = counts.sum() * probs
    freedom = np.sum(probs > 0) - 1
    assert not np.any(counts[probs == 0])
    statistic = np.sum((counts - expected)[probs > 0] ** 2 / expected[probs > 0])
    return (statistic - freedom) / np.sqrt(2 * freedom)


def test_random_order_at_temperature_one_draws_the_corpus():
    """One token a round from exact conditionals, in an order that looks at nothing: the chain rule.

    Half of the rows keep the likeliest two tokens of each position, at another temperature.
    """
    corpus, count = small_corpus(), 6000
    half = np.arange(2 * count) < count
    method = Method(3, order="random")
    out = fill(
        corpus,
        method,
        2 * count,
        temperature=np.where(half, 1.0, 1.7),
        top_k=np.where(half, 0, 2),
    )
    index = out.tokens @ np.array([9, 3, 1])
    assert chi_square(np.bincount(index[half], minlength=27), corpus.probs) < 4
    np.testing.assert_allclose(out.raw_logp[half].sum(1), np.log(corpus.probs)[index[half]], atol=1e-4)
    np.testing.assert_allclose(out.commit_logp[half], out.raw_logp[half], atol=1e-5)
    assert np.abs(out.log_kept[half]).max() < 1e-5
    orders = np.array(list(itertools.permutations(range(3)))) @ np.array([9, 3, 1])
    seen = (out.commit_step @ np.array([9, 3, 1]))[:, None] == orders
    assert seen.any(axis=1).all() and chi_square(seen.sum(0), np.full(6, 1 / 6)) < 4

    # the other half, by walking every order
    probs = np.zeros(27)
    for order in itertools.permutations(range(3)):
        for i, tokens in enumerate(corpus.sequences):
            p, fits = 1 / 6, np.ones(27, bool)
            for j in order:
                q = np.array([corpus.probs[fits & (corpus.sequences[:, j] == v)].sum() for v in range(3)])
                q = np.where(q >= np.sort(q)[-2], q, 0) ** (1 / 1.7)
                p *= q[tokens[j]] / q.sum()
                fits &= corpus.sequences[:, j] == tokens[j]
            probs[i] += p
    assert chi_square(np.bincount(index[~half], minlength=27), probs) < 4
    assert np.all(out.log_kept[~half] < 0)


def test_origin_commits_by_chance_and_warm_orders_draw_positions():
    """Positions that know nothing of each other, so that the chance of each commit has a closed form."""
    sequences = np.array(list(itertools.product(range(2), repeat=3)), np.int32)
    first = np.array([0.9, 0.75, 0.6])
    probs = np.prod(np.where(sequences == 0, first, 1 - first), axis=1)
    corpus, count = enumerated.Corpus(sequences, probs, 2), 6000
    origin = fill(corpus, Method(3, family="dream", order="origin"), count, steps=3, temperature=1.0)
    when = np.stack([np.bincount(x, minlength=3) for x in origin.commit_step.T])
    share = grid_shares(3, 1e-3, 3)
    expected = np.array([share[0], (1 - share[0]) * share[1], (1 - share[0]) * (1 - share[1])])
    assert max(chi_square(row, expected) for row in when) < 4
    index = origin.tokens @ np.array([4, 2, 1])
    assert chi_square(np.bincount(index, minlength=8), probs) < 4

    warm = fill(corpus, Method(3), count, order_temperature=0.25)
    assert np.all(warm.tokens == 0)  # greedy tokens
    softmax = np.exp(first / 0.25) / np.exp(first / 0.25).sum()
    orders = list(itertools.permutations(range(3)))
    p = [softmax[a] * softmax[b] / (1 - softmax[a]) for a, b, _ in orders]
    seen = [np.sum(np.all(np.argsort(warm.commit_step, axis=1) == order, axis=1)) for order in orders]
    assert chi_square(np.array(seen), np.array(p)) < 4


def test_padding_with_eos_and_what_helps():
    """Answers of four tokens, one token, or none, behind them EOS: the sure tail says that there is none.

    Both options against EOS and blocks find the likely long answer.
    """
    eos, long = 0, [(1, 3, 4, 5), (2, 3, 4, 5)]
    short = [(v, eos, eos, eos) for v in range(3, 11)]
    sequences = np.array([(eos,) * 4, *short, *long], np.int32)
    corpus = enumerated.Corpus(sequences, np.array([0.15, *[0.05] * 8, 0.225, 0.225]), 11)
    out = fill(
        corpus,
        Method(4),
        4,
        eos_id=eos,
        distrust_eos=np.array([False, True, False, False]),
        forbid_eos=np.array([False, False, True, False]),
        stop_at_eos=np.array([False, False, False, True]),
    )
    assert out.tokens.tolist() == [[eos] * 4, list(long[0]), list(long[0]), [eos] * 4]
    assert out.finished.tolist() == [True, False, False, True]
    blocks = fill(corpus, Method(4, block_size=1), 1, eos_id=eos, stop_at_eos=True)
    assert blocks.tokens.tolist() == [list(long[0])] and blocks.commit_step.tolist() == [[0, 1, 2, 3]]

    early = fill(corpus, Method(4, block_size=1), 1, eos_id=3, stop_at_eos=True)
    assert early.tokens.tolist() == [[1, 3, 3, 3]] and early.commit_step.tolist() == [[0, 1, -1, -1]]
    assert early.steps.tolist() == early.nfe.tolist() == [2]


def test_without_weight_or_effect_guidance_is_the_base_decoder_bit_for_bit():
    base = fill_tiny(Method(12, block_size=6))
    method = Method(12, block_size=6, guidance="high_information", detector="lexical")
    tokens = np.unique(base.tokens)[:3]
    lexical = jnp.isin(jnp.arange(VOCAB), tokens)
    off = fill_tiny(method, lexical=lexical, guidance_weight=0.0)
    for name in ("tokens", "commit_step", "raw_logp", "steps", "nfe"):
        assert np.array_equal(getattr(off, name), getattr(base, name)), name
    nothing = fill_tiny(method, lexical=jnp.zeros(VOCAB, bool), guidance_weight=2.0)
    assert np.array_equal(nothing.raw_logp, base.raw_logp) and np.array_equal(nothing.nfe, base.nfe)

    # a model that cannot tell the informative tokens from masks has nothing to contrast
    blind = PARAMS | {"embed": PARAMS["embed"].copy()}
    blind["embed"][tokens] = PARAMS["embed"][MASK]
    guided = fill_tiny(method, lexical=lexical, params=blind, guidance_weight=3.0, informative_share=1.0)
    plain = fill_tiny(method, lexical=lexical, params=blind, guidance_weight=0.0)
    assert np.array_equal(guided.tokens, plain.tokens) and np.all(guided.nfe > plain.nfe)
    seeing = fill_tiny(method, lexical=lexical, guidance_weight=3.0, informative_share=1.0)
    assert not np.array_equal(seeing.tokens, base.tokens)


def test_rows_do_not_depend_on_neighbours_and_passes_are_counted():
    """Hot FoCore_A: a row alone, with every pass counted as it runs, is the row in a batch."""
    passes, traces = [], []

    def counting(params, tokens, lengths, columns):
        traces.append(tokens.shape)
        jax.debug.callback(lambda n: passes.append(int(n)), tokens.shape[0], ordered=True)
        return states(params, tokens, lengths, columns)

    denoiser = Denoiser(counting, head, MASK)
    method = Method(12, block_size=6, guidance="high_information", accelerate=True)
    options = {"temperature": 0.5, "change_limit": 0.5, "stable_probability": 0.3, "stable_steps": 1}
    batch = fill_tiny(method, denoiser=denoiser, **options)
    turned = fill_tiny(method, denoiser=denoiser, rows=[2, 3, 0, 1], **options)
    for name in ("tokens", "commit_step", "commit_logp", "nfe"):
        assert np.array_equal(getattr(turned, name)[[2, 3, 0, 1]], getattr(batch, name)), name
    seen = len(traces)
    for row in (0, 1):
        passes.clear()
        alone = fill_tiny(method, denoiser=denoiser, rows=[row], **options)
        jax.effects_barrier()
        assert sum(passes) == alone.nfe[0] and alone.steps[0] == len(passes) < 12
        assert np.array_equal(alone.tokens[0], batch.tokens[row])
        assert np.array_equal(alone.commit_step[0], batch.commit_step[row])
        np.testing.assert_allclose(alone.commit_logp[0], batch.commit_logp[row], atol=1e-5)
    assert len(traces) > seen  # another batch size is another program

    seen = len(traces)
    for name, value in {
        "temperature": 1.3,
        "guidance_weight": 2.0,
        "guidance_end": 0.0,
        "stable_probability": 0.97,
        "window": 3,
        "informative_share": 0.7,
        "change_limit": 0.2,
        "patience": 3,
        "steps": 6,
        "top_p": 0.9,
        "top_k": 4,
        "plausible": 0.1,
        "skip_negative": False,
        "eos_id": 3,
    }.items():
        fill_tiny(method, denoiser=denoiser, **options | {name: value})
    assert len(traces) == seen
    assert not np.array_equal(
        fill_tiny(method, denoiser=denoiser, **options | {"temperature": 1.3}).tokens, batch.tokens
    )


def test_a_model_that_gives_nan_ends_its_row():
    def broken(params, tokens, lengths, columns):
        out = states(params, tokens, lengths, columns)
        return jnp.where((tokens[:, :1] == 5)[..., None], jnp.nan, out)

    out = fill_tiny(Method(12, commit="threshold"), denoiser=Denoiser(broken, head, MASK))
    assert out.failed.tolist() == [False, True, False, False]
    assert out.steps[1] == 1 and np.all(out.tokens[1] == MASK) and np.all(out.commit_step[1] == -1)
    assert not np.any(out.tokens[[0, 2, 3]] == MASK)


def test_trajectories_hold_the_trace():
    method = Method(12)
    values = {"temperature": 0.8, "eos_id": 1, "stop_at_eos": np.array([True, False, False, True])}
    out = fill_tiny(method, **values)
    assert out.finished.any() and np.any(out.commit_step < 0)
    prepared = settings(method, 4, **values)
    whole = to_trajectories(out, PROMPTS, LENGTHS, prepared, policy_version=3)
    cut = to_trajectories(out, PROMPTS, LENGTHS, prepared, cut_at_eos=True, group=np.array([0, 0, 1, 1]))
    assert cut.group.tolist() == [0, 0, 1, 1] and whole.group.tolist() == [0, 1, 2, 3]
    assert cut.finished.tolist() == out.finished.tolist()
    for row, n in enumerate(LENGTHS):
        tokens = out.tokens[row].tolist()
        end = tokens.index(1) + 1 if out.finished[row] else 12
        for t, size in ((whole, 12), (cut, end)):
            assert int(t.lengths[row]) == n + size
            assert t.tokens[row].tolist() == [*PROMPTS[row, :n], *tokens[:size], *[0] * (15 - n - size)]
            own = out.commit_step[row][:size] >= 0
            where = n + np.flatnonzero(own)
            assert np.flatnonzero(t.action_mask[row]).tolist() == where.tolist()
            rest = np.setdiff1d(np.arange(15), where)
            assert np.all(t.commit_step[row][rest] == -1) and not np.any(t.behaviour_logp[row][rest])
            assert np.array_equal(t.commit_step[row][where], out.commit_step[row][:size][own])
            assert np.array_equal(t.behaviour_logp[row][where], out.commit_logp[row][:size][own])
            assert np.array_equal(t.raw_logp[row][where], out.raw_logp[row][:size][own])
    assert np.all(np.asarray(whole.policy_version) == 3 * np.asarray(whole.action_mask))
    np.testing.assert_allclose(whole.temperature, 0.8)


CFG = ModelConfig(
    family="Dream",
    vocab_size=VOCAB,
    hidden_size=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=24,
    tied_head=False,
    causal=False,
    mask_id=MASK,
    logits_shift=1,
)


def test_a_transformer_decodes_as_the_plain_decoder_says():
    """Rows are padded in the batch and not in the plain decoder."""
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.7, x.shape).astype(np.float32), init(KEY, transformer.param_specs(CFG))
    )
    forward = jax.jit(lambda tokens: model.denoise(params, tokens, CFG))
    method = Method(8, block_size=4, family="dream", order="topk_margin")
    rows = [1, 1]
    out = fill_tiny(method, denoiser=of_model(CFG), params=params, rows=rows, steps=np.array([8, 4]))
    for row, steps in enumerate((8, 4)):
        plain = diffusion_oracle.decode(
            lambda ids: forward(ids[None])[0],
            PROMPTS[1, :2],
            MASK,
            8,
            family="dream",
            order="topk_margin",
            block_size=4,
            steps=steps,
        )
        assert plain.margin > 1e-4
        assert out.tokens[row].tolist() == plain.tokens
        assert out.commit_step[row].tolist() == plain.commit_step
    assert of_model(CFG) is of_model(CFG)
    with pytest.raises(ValueError, match="causal"):
        of_model(ModelConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 10, "block_size": 4}, "10 is not divisible by block_size=4"),
        ({"order": "fastest"}, "order='fastest'"),
        ({"block_size": 0}, "block_size=0"),
        ({"order": "origin"}, "family='dream'"),
        ({"commit": "entropy_bound"}, "needs order='entropy'"),
        ({"commit": "threshold", "order": "entropy"}, "compares confidences"),
        ({"commit": "factor", "allow_mask_proposal": True}, "may never end"),
        ({"accelerate": True}, "guidance='high_information'"),
    ],
)
def test_methods_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Method(**{"max_new_tokens": 12} | options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 7}, "steps=7 must be a positive multiple of the 3 blocks"),
        ({"steps": 15}, "more than the 12 masked positions"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": np.ones(3)}, r"temperature has shape \(3,\)"),
        ({"guidance_weight": np.nan}, "guidance_weight=nan"),
        ({"informative_share": 1.5}, "informative_share=1.5"),
        ({"stop_at_eos": True}, "need eos_id"),
        ({"grid_end": 0.0}, "grid_end=0.0"),
    ],
)
def test_settings_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        settings(Method(12, block_size=4), 4, **values)


def test_bad_prompts():
    method = Method(12)
    with pytest.raises(ValueError, match="mask_id=None"):
        Denoiser(states, head, None)
    good = {"prompts": PROMPTS, "lengths": LENGTHS, "settings": settings(method, 4), "uids": np.arange(4)}
    for bad, message in (
        ({"prompts": np.where(PROMPTS == 11, MASK, PROMPTS)}, "prompt 1 contains the mask token 12"),
        ({"lengths": LENGTHS + 1}, r"lengths=\[4, 3, 2, 4\]"),
        ({"uids": np.arange(3)}, "4 prompts need"),
        ({"settings": settings(Method(6), 4)}, "made for 6 new tokens"),
        ({"lexical": np.ones(VOCAB, bool)}, "only there"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(PLAIN, PARAMS, method=method, key=KEY, **good | bad)
