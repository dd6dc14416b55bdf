"""Decoding rules: their formulas, that off is off, and what is recorded of tokens drawn under them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.models import params as params_lib
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.scoring import score
from jaxrl_llm.rollouts.engine import Engine
from jaxrl_llm.rollouts.requests import Request
from jaxrl_llm.sampling.autoregressive import prepare
from jaxrl_llm.sampling.logits import sample, sampling_params
from jaxrl_llm.sampling.rules import (
    bias,
    bias_rule,
    forbid,
    forbid_rule,
    force,
    force_rule,
    min_tokens,
    min_tokens_rule,
    penalties,
    penalty_rule,
)

V = 150
EOS = (3, 4)
TINY = ModelConfig(
    vocab_size=V,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
)
RULES = (penalty_rule(V), forbid_rule(V), force_rule(4), min_tokens_rule(EOS))


def stack(*rows):
    """States of single rows as the state of a batch."""
    return jax.tree.map(lambda *xs: jnp.stack([jnp.asarray(x) for x in xs]), *rows)


def after(rule, state, tokens):
    """The state after `tokens` of its only row."""
    for token in tokens:
        state = rule.advance(state, jnp.array([token]), jnp.array([True]))
    return state


# --- formulas


def test_repetition_penalty_by_hand():
    """transformers: 'score < 0: score · penalty, else score / penalty', over context and new tokens."""
    rule = penalty_rule(5)
    state = after(rule, stack(penalties([0, 1], 5, repetition=2.0)), [2])
    out = rule.apply(state, jnp.array([[3.0, -1.0, 4.0, 5.0, -2.0]]))
    assert out.tolist() == [[1.5, -2.0, 2.0, 5.0, -2.0]]


def test_presence_and_frequency_by_hand():
    """OpenAI: mu[j] - c[j] · frequency - float(c[j] > 0) · presence, where c counts what was written."""
    rule = penalty_rule(4)
    state = after(rule, stack(penalties([3], 4, presence=0.5, frequency=0.25)), [1, 1, 2])
    out = rule.apply(state, jnp.array([[1.0, 1.0, 1.0, 1.0]]))
    assert out.tolist() == [[1.0, 0.0, 0.25, 1.0]]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=8),
    st.lists(st.integers(0, 6), max_size=8),
    st.floats(0.5, 3),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.integers(0, 2**31),
)
def test_penalties_equal_a_loop_in_numpy(context, written, r, p, f, seed):
    logits = np.random.default_rng(seed).normal(size=7) * 5
    expected = logits.copy()
    for v in {*context, *written}:
        expected[v] = expected[v] / r if expected[v] > 0 else expected[v] * r
    for v in set(written):
        expected[v] -= p + f * written.count(v)
    rule = penalty_rule(7)
    state = after(rule, stack(penalties(context, 7, repetition=r, presence=p, frequency=f)), written)
    np.testing.assert_allclose(rule.apply(state, jnp.float32(logits)[None])[0], expected, atol=2e-5)


def test_forbidden_and_forced_and_min_tokens():
    logits = jnp.arange(6.0)[None]
    rule = forbid_rule(6)
    assert rule.apply(stack(forbid([5, 1], 6)), logits).tolist() == [[0, -np.inf, 2, 3, 4, -np.inf]]
    rule = force_rule(3)
    state = stack(force([2, 0], 3, 6))
    allowed = []
    for _ in range(3):
        allowed.append(np.flatnonzero(np.isfinite(rule.apply(state, logits)[0])).tolist())
        state = after(rule, state, [2])
    assert allowed == [[2], [0], [0, 1, 2, 3, 4, 5]]
    rule = min_tokens_rule((0, 4))
    state = stack(min_tokens(2))
    for _ in range(2):
        assert rule.apply(state, logits).tolist() == [[-np.inf, 1, 2, 3, -np.inf, 5]]
        state = after(rule, state, [1])
    assert rule.apply(state, logits).tolist() == logits.tolist()


def test_bias_by_hand():
    """Rows have their own; a token of many is as good as one of few."""
    rule = bias_rule(3)
    state = stack(bias({0: 1.5, 3: -2.0}, 3, 4), bias({}, 3, 4), bias({3: 0.25}, 3, 4))
    out = rule.apply(rule.advance(state, jnp.zeros(3, jnp.int32), jnp.ones(3, bool)), jnp.ones((3, 4)))
    assert out.tolist() == [[2.5, 1, 1, -1], [1, 1, 1, 1], [1, 1, 1, 1.25]]


@pytest.mark.parametrize("index", range(len(RULES) + 1))
def test_off_changes_no_bit_beside_a_row_that_is_on(index):
    """Whatever has been written, and in one batch with a row whose rule is on; dead rows don't move on."""
    rule = (*RULES, bias_rule(2))[index]
    on = [
        penalties([1], V, repetition=1.7, presence=0.3, frequency=1.0),
        forbid([1], V),
        force([1, 2], 4, V),
        min_tokens(1),
        bias({0: 1.0}, 2, V),
    ][index]
    off = jax.tree.map(lambda x: x[0], rule.init(1))
    state = stack(off, on)
    rng = np.random.default_rng(index)
    logits = jnp.asarray(rng.normal(size=(2, V)).astype(np.float32) * 10).at[0, :3].set([0.0, -0.0, -1e30])
    for token in (1, 1, 7):
        out = rule.apply(state, logits)
        assert np.array_equal(np.asarray(out[0]).view(np.int32), np.asarray(logits[0]).view(np.int32))
        frozen = rule.advance(state, jnp.array([token, token]), jnp.array([True, False]))
        assert np.array_equal(rule.apply(frozen, logits)[1], out[1])
        state = frozen
    assert not np.array_equal(out[1], logits[1])


# --- what is recorded


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("top_k", [0, 3])
def test_log_kept_is_what_the_models_log_prob_lacks(temperature, top_k):
    """By enumeration: for a mask the log of the mass it left; for every rule, model minus behaviour."""
    rows = 32
    model = 3 * jax.random.normal(jax.random.key(0), (rows, 12))
    ruled = model.at[: rows // 2, ::2].set(-jnp.inf).at[rows // 2 :].multiply(0.5)
    uniform = (jnp.arange(rows) + 0.5) / rows
    drawn = sample(ruled, sampling_params(rows, temperature=temperature, top_k=top_k), uniform, model)
    for row in range(rows):
        token = int(drawn.token[row])
        full = np.exp(np.asarray(model[row], np.float64) / temperature)
        weights = np.exp(np.asarray(ruled[row], np.float64) / temperature)
        if top_k:
            weights = np.where(weights >= np.sort(weights)[-top_k], weights, 0)
        assert weights[token] > 0
        behaviour = np.log(weights[token] / weights.sum())
        assert abs(float(drawn.behaviour_logp[row]) - behaviour) < 1e-5
        by_model = np.log(full[token] / full.sum())
        assert abs(float(drawn.log_kept[row]) - (by_model - behaviour)) < 1e-5
        if row < rows // 2:
            assert abs(float(drawn.log_kept[row]) - np.log(full[weights > 0].sum() / full.sum())) < 1e-5
        raw = float(jax.nn.log_softmax(model[row])[token])
        assert abs(float(drawn.raw_logp[row]) - raw) < 1e-5


# --- in the engine


def make_params():
    params = params_lib.init(jax.random.key(0), transformer.param_specs(TINY))
    return params | {"embed": params["embed"] * 20}


def make_engine(rules=RULES):
    return Engine(
        prepare(make_params(), TINY),
        TINY,
        slots=4,
        max_length=64,
        key=jax.random.key(5),
        stop_ids=EOS,
        block=8,
        rules=rules,
    )


CONTEXTS = [[5, 6, 7], [9, 8, 7, 6], [1, 2], [20]]


def states(context, *, repetition=1.0, presence=0.0, frequency=0.0, forbidden=(), forced=(), tokens=0):
    return (
        penalties(context, V, repetition=repetition, presence=presence, frequency=frequency),
        forbid(forbidden, V),
        force(forced, 4, V),
        min_tokens(tokens),
    )


def test_rules_in_the_engine():
    """Off, an engine with rules draws what one without draws; on, each row obeys its own and no other."""
    plain = make_engine(()).generate([Request(c, 20, uid=i) for i, c in enumerate(CONTEXTS)])
    engine = make_engine()
    off = engine.generate([Request(c, 20, uid=i) for i, c in enumerate(CONTEXTS)])
    drawn = [int(x) for x in plain[2].tokens if x not in EOS]
    on = [
        states(CONTEXTS[0]),
        states(CONTEXTS[1], repetition=1.5, presence=0.5, frequency=0.5, tokens=18),
        states(CONTEXTS[2], forbidden=drawn),
        states(CONTEXTS[3], forced=[11, 12, 13], tokens=20),
    ]
    temperatures = (1.0, 1.3, 0.6, 1.0)
    requests = [
        Request(c, 20, uid=i, rules=rules, temperature=t)
        for i, (c, rules, t) in enumerate(zip(CONTEXTS, on, temperatures))
    ]
    ruled = engine.generate(requests)
    for a, b in ((plain, off), (plain[:1], ruled[:1])):
        for x, y in zip(a, b):
            assert np.array_equal(x.tokens, y.tokens)
            for name in ("behaviour_logp", "raw_logp", "log_kept"):
                np.testing.assert_allclose(getattr(x, name), getattr(y, name), atol=1e-6)
    assert len(ruled[1].tokens) >= 19 or ruled[1].reason == "length"
    assert not {*ruled[2].tokens.tolist()} & {*drawn}
    assert ruled[3].tokens[:3].tolist() == [11, 12, 13] and len(ruled[3].tokens) == 20
    assert not ruled[3].behaviour_logp[:3].any() and np.all(ruled[3].log_kept[:3] < 0)
    # the trainer agrees, without knowing of any rule
    for context, out, t in zip(CONTEXTS, ruled, temperatures):
        ids = jnp.zeros((1, 32), jnp.int32)
        ids = ids.at[0, : len(context)].set(jnp.array(context))
        new = slice(len(context), len(context) + len(out.tokens))
        ids = ids.at[0, new].set(out.tokens)
        mask = jnp.zeros((1, 32), bool).at[0, new].set(True)
        logp = score(make_params(), ids, mask, TINY, temperature=t).logp[0, new]
        assert np.max(np.abs(np.asarray(logp) - out.log_kept - out.behaviour_logp)) <= 1e-5
        raw = score(make_params(), ids, mask, TINY).logp[0, new]
        assert np.max(np.abs(np.asarray(raw) - out.raw_logp)) <= 1e-5
    assert np.all(ruled[2].log_kept <= 1e-6)  # a mask's is the log of a mass


def test_rows_without_a_token_left_fail_alone():
    """Forced into what is forbidden: that request fails, greedy or not; its neighbours don't."""
    bad = states([5], forced=[7], forbidden=[7])
    for temperature in (0.0, 1.0):
        good, failed = make_engine().generate(
            [Request([5], 8, uid=0), Request([5], 8, uid=1, rules=bad, temperature=temperature)]
        )
        assert failed.reason == "failed" and not len(failed.tokens)
        assert good.reason in ("stop", "length") and np.all(np.isfinite(good.behaviour_logp))


def test_bad_input():
    for bad in ({"repetition": 0.0}, {"repetition": np.inf}, {"presence": np.nan}, {"frequency": np.inf}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            penalties([1], V, **bad)
    with pytest.raises(ValueError, match="token id 150"):
        penalties([1, 150], V)
    with pytest.raises(ValueError, match="token id -1"):
        forbid([-1], V)
    with pytest.raises(ValueError, match="nothing could be drawn"):
        forbid(range(V), V)
    with pytest.raises(ValueError, match="room for 2"):
        force([1, 2, 3], 2, V)
    with pytest.raises(ValueError, match="min_tokens=-1"):
        min_tokens(-1)
    with pytest.raises(ValueError, match="2 biased tokens and bias_rule has room for 1"):
        bias({1: 1.0, 2: 1.0}, 1, V)
    with pytest.raises(ValueError, match="token id 150"):
        bias({150: 1.0}, 1, V)
    with pytest.raises(ValueError, match="bias of token 3 is -inf"):
        bias({3: -np.inf}, 1, V)
    engine = make_engine()
    with pytest.raises(ValueError, match="2 states for the engine's 4 rules"):
        engine.submit(Request([5], 8, rules=states([5])[:2]))
    with pytest.raises(ValueError, match=r"state \(149,\) is not like \(150,\)"):
        engine.submit(Request([5], 8, rules=(states([5])[0], forbid([1], 149), *states([5])[2:])))
