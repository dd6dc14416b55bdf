"""The engine: it draws what the plain sampler draws, and nothing about its neighbours changes a request."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import (
    BIASES,
    GEMMA,
    KEY,
    STOP,
    TINY,
    make_engine,
    make_params,
    make_prompt,
    mixed_requests,
    prepared,
    same_bits,
)

from jaxrl_llm.models import transformer
from jaxrl_llm.models.scoring import score
from jaxrl_llm.rollouts import engine as engine_lib
from jaxrl_llm.rollouts.engine import Engine, Request, trajectories
from jaxrl_llm.sampling import prefixes, slots
from jaxrl_llm.sampling.autoregressive import generate, prepare
from jaxrl_llm.sampling.logits import Sampling
from jaxrl_llm.trajectory import Trajectories

score_jit = jax.jit(score, static_argnames="cfg")


def by_sampler(requests, cfg=TINY, seed=0) -> Trajectories:
    """What `autoregressive.generate` makes of the requests, in one batch."""
    tokens = np.zeros((len(requests), 40), np.int32)
    for row, r in zip(tokens, requests):
        row[: len(r.tokens)] = r.tokens
    columns = (np.array([getattr(r, name) for r in requests]) for name in Sampling._fields)
    return generate(
        prepared(cfg, seed),
        cfg,
        tokens,
        np.array([len(r.tokens) for r in requests], np.int32),
        num_generations=1,
        max_new_tokens=48,
        sampling=Sampling(*(jnp.asarray(x, t) for x, t in zip(columns, ("f4", "f4", "i4", "f4")))),
        key=KEY,
        uids=np.array([r.uid for r in requests]),
        stop_ids=STOP,
    )


def trainer_logp(t: Trajectories, cfg) -> tuple[np.ndarray, np.ndarray]:
    """What the trainer thinks of the rows: tempered less what truncation kept, and raw."""
    params = make_params(cfg)
    tempered = score_jit(params, t.tokens, t.action_mask, cfg, temperature=t.temperature).logp - t.log_kept
    raw = score_jit(params, t.tokens, t.action_mask, cfg, temperature=jnp.ones_like(t.temperature)).logp
    return np.asarray(tempered), np.asarray(raw)


def assert_on_policy(t: Trajectories, cfg=TINY) -> None:
    mask = np.asarray(t.action_mask)
    tempered, raw = trainer_logp(t, cfg)
    assert np.max(np.abs(np.expm1(tempered - np.asarray(t.behaviour_logp))[mask])) <= 1e-5
    assert np.max(np.abs(raw - np.asarray(t.raw_logp))[mask]) <= 1e-5


# --- what is drawn


@pytest.mark.parametrize(
    "cfg, longest, new",
    [(TINY, 40, 48), (GEMMA, 30, 30), (BIASES, 30, 30)],
    ids=["qwen3", "gemma2", "biases"],
)
def test_draws_what_the_sampler_draws_and_the_trainer_agrees(cfg, longest, new):
    """Temperatures × truncations side by side, through refills, widths and contexts read in pieces."""
    requests = mixed_requests(15, longest=longest, new=new)
    completions = make_engine(cfg).generate(requests)
    expected = by_sampler(requests, cfg)
    for row, (r, c) in enumerate(zip(requests, completions)):
        own = slice(len(r.tokens), len(r.tokens) + len(c.tokens))
        assert c.tokens.tolist() == expected.tokens[row, own].tolist()
        assert len(c.tokens) == min(r.max_new_tokens, int(expected.lengths[row]) - len(r.tokens))
        for name in ("behaviour_logp", "raw_logp", "log_kept"):
            np.testing.assert_allclose(getattr(c, name), getattr(expected, name)[row, own], atol=1e-5)
        assert c.finished == (c.tokens[-1] in STOP) and c.reason == ("stop" if c.finished else "length")
    assert 0 < sum(c.finished for c in completions) < 15
    assert_on_policy(trajectories(requests, completions, group=range(15), width=88), cfg)


def test_greedy_requests_beside_others():
    requests = mixed_requests(15)
    requests[::2] = [dataclasses.replace(r, temperature=0.0) for r in requests[::2]]
    completions = make_engine().generate(requests)
    expected = by_sampler(requests)
    for row, (r, c) in enumerate(zip(requests, completions)):
        assert (
            c.tokens.tolist() == expected.tokens[row, len(r.tokens) : len(r.tokens) + len(c.tokens)].tolist()
        )
        assert c.behaviour_logp.any() == (row % 2 == 1)


@functools.cache
def alone():
    """Requests, and what each gets from an engine of its own. Two of them have one prompt."""
    requests = mixed_requests(7, longest=70, new=50, seed=1)
    requests[1] = dataclasses.replace(requests[1], tokens=requests[0].tokens)
    return requests, [make_engine().generate([r])[0] for r in requests]


@settings(max_examples=12, deadline=None)
@given(
    order=st.permutations(range(7)),
    gaps=st.lists(st.integers(0, 3), min_size=7, max_size=7),
    count=st.integers(2, 7),
)
def test_a_request_does_not_depend_on_its_neighbours(order, gaps, count):
    """Bit for bit: whoever else is there, in whatever slot, at whatever time and width."""
    requests, expected = alone()
    engine = make_engine()
    tickets = {}
    for index, gap in zip(order[:count], gaps):
        tickets[index] = engine.submit(requests[index])
        for _ in range(gap):
            engine.step()
    while engine.waiting or engine.running:
        engine.step()
    for index, ticket in tickets.items():
        assert same_bits(ticket.completion, expected[index]), index


def test_independence_is_tested_across_widths():
    requests, completions = alone()
    totals = [len(r.tokens) + len(c.tokens) for r, c in zip(requests, completions)]
    assert min(totals) < 40 and max(totals) > 72  # 64 columns hold the least, and not the most


def test_numbers_of_submission_are_the_default_uids():
    r = Request(make_prompt(5), max_new_tokens=9)
    first, second = make_engine().generate([r, r])
    assert same_bits(make_engine().generate([dataclasses.replace(r, uid=1)])[0], second)
    assert not np.array_equal(first.tokens, second.tokens)


# --- contexts


def count_reads(monkeypatch) -> list[int]:
    """Number of rows, past and new tokens of every call of prefill, from now on."""
    calls = []
    prefill = prefixes.prefill

    def counted(params, past, tokens, counts, cfg, **options):
        calls.append((0 if past is None else int(past.lengths[0]), np.asarray(counts).tolist()))
        return prefill(params, past, tokens, counts, cfg, **options)

    monkeypatch.setattr(prefixes, "prefill", counted)
    return calls


def test_the_prompt_of_a_group_is_read_once(monkeypatch):
    calls = count_reads(monkeypatch)
    prompt = make_prompt(20)
    group = [Request(prompt, max_new_tokens=20, uid=i) for i in range(9)]  # more rows than slots
    make_engine().generate(group)
    assert calls == [(0, [20] * 8)]  # 32 columns are read in 8 rows, of which one is new
    calls.clear()
    make_engine(remember=0).generate(group)
    assert len(calls) > 1


def test_a_prompt_longer_than_the_largest_bucket(monkeypatch):
    calls = count_reads(monkeypatch)
    r = Request(make_prompt(77), max_new_tokens=20, uid=3)
    pieces = make_engine().generate([r])[0]
    assert calls == [(0, [32]), (32, [32]), (64, [13])]
    whole = make_engine(buckets=(128,)).generate([r])[0]
    assert pieces.tokens.tolist() == whole.tokens.tolist()
    np.testing.assert_allclose(pieces.behaviour_logp, whole.behaviour_logp, atol=1e-5)


def test_a_conversation_goes_on_where_it_was(monkeypatch):
    """A turn reads only what is new to it, and its log-probs are those of scoring it all from scratch."""
    calls = count_reads(monkeypatch)
    engine = make_engine(GEMMA, stop_ids=())
    requests, completions, context = [], [], make_prompt(10)
    for turn in range(4):
        r = Request(context, max_new_tokens=13, uid=turn, keep=True, top_p=0.9, temperature=1.3)
        others = mixed_requests(3, longest=9, seed=7 + turn)
        c = engine.generate([r, *others])[0]
        requests.append(r)
        completions.append(c)
        context = [*context, *c.tokens.tolist(), *make_prompt(4, turn)]
    assert [(past, counts) for past, counts in calls if past] == [(23, [4]), (40, [4]), (57, [4])]
    t = trajectories(requests, completions, group=[0] * 4, width=88)
    assert_on_policy(t, GEMMA)
    assert t.lengths.tolist() == [23, 40, 57, 74]


def test_what_is_remembered_stays_within_its_columns_and_the_least_used_goes_first(monkeypatch):
    engine = make_engine(remember=4 * 16)
    calls = count_reads(monkeypatch)
    a, b, c, d, e = (Request(make_prompt(9, seed), max_new_tokens=2) for seed in range(5))
    for r in (a, b, c, d, a, e):
        engine.generate([r])
    assert len(calls) == 5 and engine.contexts.remembered.used == 64
    engine.generate([a])
    assert len(calls) == 5  # used again in between, so it is b that has gone
    engine.generate([b])
    assert len(calls) == 6 and engine.contexts.remembered.used == 64


# --- how a request ends


def test_find_stop_cuts_and_a_failing_one_fails_alone():
    plain = make_engine().generate(mixed_requests(15))
    longest = max(range(15), key=lambda i: len(plain[i].tokens))
    marker = plain[longest].tokens[10:12].tolist()

    def find(ids):
        ids = ids.tolist()
        return next((i + 2 for i in range(len(ids) - 1) if ids[i : i + 2] == marker), None)

    def broken(ids):
        raise KeyError("no such state")

    requests = mixed_requests(15)
    requests[longest] = dataclasses.replace(requests[longest], find_stop=find, keep=True)
    other = (longest + 1) % 15
    requests[other] = dataclasses.replace(requests[other], find_stop=broken)
    engine = make_engine()
    completions = engine.generate(requests)
    for index, (c, p) in enumerate(zip(completions, plain)):
        if index == longest:
            assert c.finished and c.tokens.tolist() == p.tokens[: find(p.tokens)].tolist()
        elif index == other:
            assert c.reason == "failed" and "no such state" in c.error and len(c.tokens) <= 16
        else:
            assert same_bits(c, p)
    assert engine.counts == {
        "stop": sum(c.finished for c in completions),
        "length": sum(c.reason == "length" for c in completions),
        "failed": 1,
    }


def test_cancelled_requests_end_with_what_they_have():
    requests = [dataclasses.replace(r, max_new_tokens=48) for r in mixed_requests(6)]
    expected = make_engine(stop_ids=()).generate(requests)
    engine = make_engine(stop_ids=())
    tickets = [engine.submit(r) for r in requests]
    engine.step()
    tickets[1].cancel()  # it is written
    tickets[4].cancel()  # it waits for a slot
    done = engine.step()
    assert set(done) == {tickets[1], tickets[4]}
    assert [len(t.completion.tokens) for t in (tickets[1], tickets[4])] == [16, 0]
    assert np.array_equal(tickets[1].completion.tokens, expected[1].tokens[:16])
    assert not tickets[1].completion.finished
    while engine.waiting or engine.running:
        engine.step()
    assert all(same_bits(tickets[i].completion, expected[i]) for i in (0, 2, 3, 5))
    assert engine.counts == {"cancelled": 2, "length": 4}


def test_deadlines(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(engine_lib.time, "monotonic", lambda: now[0])
    engine = make_engine(stop_ids=())
    limits = (None, 5.0, None, None, 2.0, 0.0)  # the last two wait for a slot
    tickets = [
        engine.submit(Request(make_prompt(4), 48, uid=i, deadline=limit)) for i, limit in enumerate(limits)
    ]
    reasons = []
    while engine.waiting or engine.running:
        engine.step()
        now[0] += 2.5
        reasons.append([t.completion and t.completion.reason for t in tickets])
    assert reasons == [
        [None, None, None, None, None, "deadline"],
        [None, None, None, None, "deadline", "deadline"],
        ["length", "deadline", "length", "length", "deadline", "deadline"],
    ]
    assert [len(t.completion.tokens) for t in tickets] == [48, 32, 48, 48, 0, 0]


# --- new params


def test_requests_in_flight_go_on_with_new_params():
    """Tokens after an update are those of the new params after the same context; nothing old is served."""
    requests = [dataclasses.replace(r, max_new_tokens=40) for r in mixed_requests(6, longest=30)]
    engine = make_engine(stop_ids=())
    tickets = [engine.submit(r) for r in requests]
    engine.step()
    engine.update(prepared(TINY, 1), version=7)
    while engine.waiting or engine.running:
        engine.step()
    for index, (r, ticket) in enumerate(zip(requests, tickets)):
        old = 16 if index < 4 else 0  # two waited
        c = ticket.completion
        assert c.policy_version.tolist() == [0] * old + [7] * (40 - old)
        rest = dataclasses.replace(r, tokens=[*r.tokens, *c.tokens[:old].tolist()], max_new_tokens=40 - old)
        fresh = make_engine(stop_ids=(), seed=1).generate([rest])[0]
        assert fresh.tokens.tolist() == c.tokens[old:].tolist()
        assert np.array_equal(fresh.behaviour_logp, c.behaviour_logp[old:])


def test_nothing_that_old_params_read_is_served(monkeypatch):
    engine = make_engine(stop_ids=())
    r = Request(make_prompt(10), max_new_tokens=10, uid=1, keep=True)
    first = engine.generate([r])[0]
    follow = Request([*r.tokens, *first.tokens.tolist(), 9, 8], max_new_tokens=10, uid=2)
    engine.update(prepared(TINY, 1), version=1)
    calls = count_reads(monkeypatch)
    again, after = engine.generate([r, follow])
    assert [past for past, _ in calls] == [0, 0]
    fresh = make_engine(stop_ids=(), seed=1).generate([r, follow])
    assert np.array_equal(again.raw_logp, fresh[0].raw_logp)
    assert np.array_equal(after.raw_logp, fresh[1].raw_logp)
    assert not np.array_equal(again.raw_logp, first.raw_logp)


# --- bad input


def test_logits_that_are_nan_fail_their_request_alone():
    params = make_params(BIASES)
    poisoned = params | {"embed": params["embed"].at[149].set(jnp.nan)}
    requests = [dataclasses.replace(r, tokens=[t % 149 for t in r.tokens]) for r in mixed_requests(12)]
    expected = make_engine(BIASES).generate(requests)
    served = [i for i, c in enumerate(expected) if 149 not in c.tokens]  # the others would fail by themselves
    requests, expected = ([rows[i] for i in served] for rows in (requests, expected))
    assert len(served) > 6
    bad = [
        dataclasses.replace(r, tokens=[*r.tokens[:3], 149, 9], uid=99 + i) for i, r in enumerate(requests[:5])
    ]
    engine = Engine(
        prepare(poisoned, BIASES), BIASES, slots=4, max_length=128, key=KEY, stop_ids=STOP, block=16,
        buckets=(16, 32),
    )  # fmt: skip
    mixed = [r for pair in itertools.zip_longest(requests, bad) for r in pair if r is not None]
    got = dict(zip(map(id, mixed), engine.generate(mixed)))
    for r in bad:
        c = got[id(r)]
        assert c.reason == "failed" and "NaN" in c.error and len(c.tokens) == 0
    for r, e in zip(requests, expected):
        assert same_bits(got[id(r)], e)  # also in a slot that a poisoned one has left
    assert engine.counts["failed"] == 5


def test_a_block_that_is_no_power_of_two_holds_what_it_promises():
    cfg = dataclasses.replace(TINY, num_layers=1)
    engine = make_engine(cfg, widths=None, block=24, max_length=60, stop_ids=())
    r = Request(make_prompt(7), max_new_tokens=53, uid=1)
    c = engine.generate([r])[0]
    assert len(c.tokens) == 53
    assert_on_policy(trajectories([r], [c], group=[0]), cfg)


# --- int8


def test_an_int8_cache_takes_a_quarter_of_the_memory_and_stays_close():
    wide = dataclasses.replace(TINY, head_dim=64)
    sizes = [
        sum(x.nbytes for x in jax.tree.leaves((engine.slots.keys, engine.slots.values)))
        for engine in (make_engine(wide), make_engine(wide, kv_dtype=jnp.int8))
    ]
    assert sizes[1] / sizes[0] == (64 + 4) / (4 * 64)
    requests = mixed_requests(15, longest=30, new=30)
    engine = make_engine(kv_dtype=jnp.int8)
    completions = engine.generate(requests)
    t = trajectories(requests, completions, group=range(15), width=88)
    off = np.abs(trainer_logp(t, TINY)[1] - np.asarray(t.raw_logp))[np.asarray(t.action_mask)]
    assert 1e-5 < off.max() < 0.2 and off.mean() < 0.02  # nats
    rest = mixed_requests(15, longest=30, new=30)[::-1]
    assert all(map(same_bits, engine.generate(rest)[::-1], completions))  # independent like any other


# --- compilation


def test_nothing_is_traced_twice():
    """After contexts of every bucket in slots of every width: not for new parameters, lengths or mixtures."""
    functions = (slots.decode, slots.place, slots.release, prefixes.prefill, prefixes.rows, prefixes.trim)
    engine = make_engine()
    for sizes in ((10, 20, 40, 60), (100, 10, 20, 40), (120, 70, 90, 60)):
        engine.generate([Request(make_prompt(size), max_new_tokens=4) for size in sizes])
    before = [f._cache_size() for f in functions]
    engine = make_engine()
    for seed in range(2, 5):
        engine.generate(mixed_requests(12, longest=70, new=50, seed=seed))
        for r in mixed_requests(4, longest=70, new=50, seed=seed):
            engine.submit(r)
        engine.step()
        engine.update(prepared(TINY, seed % 2), version=seed)
    assert [f._cache_size() for f in functions] == before


def test_after_warm_up_nothing_is_compiled():
    """Contexts read at once and in pieces, and every width."""
    engine = make_engine(dataclasses.replace(TINY, num_layers=1), widths=(16, 32, 64, 128))
    engine.warm_up()
    assert not any(jax.device_get(engine.slots.left)) and not engine.contexts.remembered.entries
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "compile" in event else None
    )
    engine.generate(mixed_requests(40, longest=79))
    heard = list(compiled)
    jax.jit(lambda x: x + 1)(jnp.zeros(()))
    assert not heard and compiled


def test_only_an_idle_engine_warms_up():
    engine = make_engine()
    engine.submit(Request(make_prompt(5), max_new_tokens=40))
    engine.step()
    with pytest.raises(RuntimeError, match="1 requests are running"):
        engine.warm_up()


def test_the_trainer_agrees_when_rows_are_packed_into_one():
    requests = mixed_requests(6)
    completions = make_engine().generate(requests)
    rows = [[*r.tokens, *c.tokens] for r, c in zip(requests, completions)]
    ends = np.cumsum([len(row) for row in rows])
    hidden = transformer.forward(
        make_params(TINY),
        jnp.asarray(np.concatenate(rows)[None], jnp.int32),
        TINY,
        positions=jnp.asarray(np.concatenate([np.arange(len(row)) for row in rows])[None], jnp.int32),
        segment_ids=jnp.asarray(np.repeat(np.arange(1, 7), [len(row) for row in rows])[None], jnp.int32),
    )
    logits = transformer.logits(make_params(TINY), hidden[0], TINY)
    for end, r, c in zip(ends, requests, completions):
        before = logits[end - len(c.tokens) - 1 : end - 1]
        for temperature, kept, sampled in (
            (r.temperature, c.log_kept, c.behaviour_logp),
            (1.0, 0.0, c.raw_logp),
        ):
            logp = jax.nn.log_softmax(before / temperature)[np.arange(len(c.tokens)), c.tokens]
            np.testing.assert_allclose(logp - kept, sampled, atol=1e-5)
