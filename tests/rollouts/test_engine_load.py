"""The engine under load: many coroutines; many requests, of which some are cancelled, late or malformed."""

import asyncio
import dataclasses
import gc
import weakref

import jax
import numpy as np
import pytest
from tiny_engine import make_engine, make_prompt, mixed_requests, prepared, same_bits

from jaxrl_llm.rollouts.engine import Request
from jaxrl_llm.sampling import prefixes, slots

# --- coroutines


def test_coroutines_share_the_batch():
    """200 in random order, some cancelled and some refused: the others get what they would get alone."""
    rng = np.random.default_rng(0)
    requests = mixed_requests(200, longest=30, new=20)
    expected = make_engine().generate(requests)
    cancelled = set(rng.choice(200, 20, replace=False).tolist())
    malformed = {i for i in range(200) if i % 50 == 7} - cancelled
    engine = make_engine()
    rounds = []
    step = engine.step
    engine.step = lambda: rounds.append(1) or step()

    async def one(index: int):
        await asyncio.sleep(0.05 * rng.random())
        r = requests[index]
        return await engine.complete(dataclasses.replace(r, tokens=[]) if index in malformed else r)

    async def all_of_them():
        tasks = {int(index): asyncio.create_task(one(int(index))) for index in rng.permutation(200)}
        await asyncio.sleep(0.06)
        for index in cancelled:
            tasks[index].cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        return tasks

    tasks = asyncio.run(all_of_them())
    for index, task in tasks.items():
        if index in malformed:
            with pytest.raises(ValueError, match="empty context"):
                task.result()
        elif index in cancelled:
            assert task.cancelled() or same_bits(task.result(), expected[index])
        else:
            assert same_bits(task.result(), expected[index])
    assert sum(task.cancelled() for task in tasks.values()) > 0
    assert len(rounds) < 120  # in 4 slots; one after the other they would take more than 200
    while engine.waiting or engine.running:  # what was cancelled in the last moment
        engine.step()
    assert engine.counts["refused"] == len(malformed)
    assert sum(engine.counts.values()) == 200


def test_conversations_in_one_event_loop_after_another():
    engine = make_engine(stop_ids=())

    async def talk(index: int) -> list[int]:
        context = make_prompt(5, index)
        for turn in range(3):
            c = await engine.complete(Request(context, max_new_tokens=8, uid=10 * index + turn, keep=True))
            context = [*context, *c.tokens.tolist(), 9]
        return context

    async def several():
        return await asyncio.gather(*map(talk, range(6)))

    first, second = asyncio.run(several()), asyncio.run(several())
    assert first == second and all(len(context) == 5 + 3 * 9 for context in first)


def test_params_may_be_updated_between_the_rounds_of_coroutines():
    engine = make_engine(stop_ids=())
    requests = [dataclasses.replace(r, max_new_tokens=48) for r in mixed_requests(8)]

    async def train():
        tasks = [asyncio.create_task(engine.complete(r)) for r in requests]
        while not any(ticket.pieces for ticket in engine.running.values()):
            await asyncio.sleep(0)
        await asyncio.to_thread(engine.update, prepared(seed=1), 1)
        return await asyncio.gather(*tasks)

    completions = asyncio.run(train())
    for c in completions:
        assert np.all(np.diff(c.policy_version) >= 0) and c.policy_version[-1] == 1
    assert completions[0].policy_version[0] == 0


@pytest.mark.parametrize("module, name", [(slots, "decode"), (prefixes, "prefill")])
def test_an_error_of_a_round_reaches_everyone_who_waits(module, name, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("the device is gone")

    engine = make_engine()
    monkeypatch.setattr(module, name, broken)

    async def several():
        return await asyncio.gather(*map(engine.complete, mixed_requests(6)), return_exceptions=True)

    outcomes = asyncio.run(several())
    assert [str(outcome) for outcome in outcomes] == ["the device is gone"] * 6
    with pytest.raises(RuntimeError, match="gone"):
        engine.generate(mixed_requests(1))
    monkeypatch.undo()  # and once it is back the engine goes on
    (again,), (expected,) = engine.generate(mixed_requests(1)), make_engine().generate(mixed_requests(1))
    np.testing.assert_array_equal(again.tokens, expected.tokens)


# --- load


def malformed(rng: np.random.Generator) -> Request:
    bad = ({"tokens": []}, {"tokens": [200]}, {"tokens": [1] * 128}, {"temperature": -1.0}, {"top_p": 0.0})
    return dataclasses.replace(Request([7], 5), **bad[rng.integers(len(bad))])


def device_bytes() -> int:
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def run_load(count: int) -> None:
    rng = np.random.default_rng(count)
    engine, new_params = make_engine(remember=1024), prepared(seed=1)
    requests = mixed_requests(count, longest=36, new=40, seed=3)
    requests = [
        dataclasses.replace(
            r,
            keep=bool(rng.random() < 0.2),  # no other request continues it
            deadline=float(rng.choice([0.0, 0.01, 0.1, 1.0])) if rng.random() < 0.1 else None,
        )
        for r in requests
    ]
    tickets, done, refused, memory = [], [], 0, []
    written_by_old = None
    while len(tickets) < count or engine.waiting or engine.running:
        for r in requests[len(tickets) : len(tickets) + int(rng.integers(0, 6))]:
            if rng.random() < 0.1:
                with pytest.raises(ValueError):
                    engine.submit(malformed(rng))
                refused += 1
            tickets.append(engine.submit(r))
        if tickets and rng.random() < 0.3:
            tickets[rng.integers(len(tickets))].cancel()  # running, waiting or done
        if written_by_old is None and len(tickets) >= count // 2 and len(engine.running) > 2:
            written_by_old = [ticket.written for ticket in tickets]
            engine.update(new_params, version=1)
        done += engine.step()
        if len(done) // 20 > len(memory):
            memory.append(device_bytes())

    # nothing is lost, nothing is served twice
    assert sorted(ticket.number for ticket in done) == list(range(count))
    completions = [ticket.completion for ticket in tickets]
    reasons = [c.reason for c in completions]
    assert engine.counts == {r: reasons.count(r) for r in set(reasons)} | {"refused": refused}
    assert {"stop", "length", "cancelled", "deadline"} <= set(reasons) and refused > 0

    # every token carries the version that wrote it, and is that version's
    assert any(0 < old < len(c.tokens) for c, old in zip(completions, written_by_old))  # some were in flight
    written_by_old += [0] * (count - len(written_by_old))
    calm = [make_engine(seed=seed, remember=0) for seed in (0, 1)]
    plain = [dataclasses.replace(r, deadline=None, keep=False) for r in requests]
    expected = [engine.generate(plain) for engine in calm]
    for c, old, by_old, by_new in zip(completions, written_by_old, *expected):
        n = len(c.tokens)
        assert c.policy_version.tolist() == [0] * min(old, n) + [1] * (n - min(old, n))
        assert np.array_equal(c.tokens[:old], by_old.tokens[: min(old, n)])
        assert np.array_equal(c.raw_logp[:old], by_old.raw_logp[: min(old, n)])
        if old == 0:
            assert np.array_equal(c.tokens, by_new.tokens[:n]) and np.array_equal(
                c.raw_logp, by_new.raw_logp[:n]
            )
        if c.reason in ("stop", "length") and old in (0, n):
            assert n == len((by_old if old else by_new).tokens)

    # memory is flat, and no ticket is held
    assert max(memory[len(memory) // 2 :]) <= 1.05 * max(memory[: len(memory) // 2])
    assert engine.contexts.remembered.used <= 1024
    gone = weakref.ref(tickets[0])
    del tickets, done
    gc.collect()
    assert gone() is None


def test_load():
    run_load(300)


@pytest.mark.slow
def test_load_in_full():
    run_load(5000)
