"""Workflows: many coroutines over shared engines, and the same rows whatever runs beside them."""

import asyncio
import functools
import threading
import time

import jax
import numpy as np
import pytest

from jaxrl_llm.data.chat import NotAppendOnly
from jaxrl_llm.data.tokenizers import load
from jaxrl_llm.models import params as params_lib
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.scoring import score
from jaxrl_llm.rollouts.engine import Engine
from jaxrl_llm.rollouts.episode import Cast, Episode
from jaxrl_llm.rollouts.workflow import ContextFull, GenerationFailed, Role, run_workflows
from jaxrl_llm.sampling.autoregressive import prepare
from jaxrl_llm.trajectory import Trajectories

TOKENIZER = load("characters", alphabet="0123456789+=? ")
CFG = ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=24,
)
ROLES = {"asker": Role("policy", 5), "solver": Role("policy", 6, temperature=0.8, top_p=0.9)}
END = TOKENIZER.eos_ids[0]


@functools.cache
def make_params(seed: int = 0):
    params = params_lib.init(jax.random.key(seed), transformer.param_specs(CFG))
    return params | {"embed": params["embed"] * 20}


def make_engine(seed: int = 0, **options) -> Engine:
    options = {"slots": 4, "max_length": 64, "block": 8, "buckets": (16,), "stop_ids": [END]} | options
    return Engine(prepare(make_params(seed), CFG), CFG, key=jax.random.key(5), **options)


@functools.cache
def shared_engine() -> Engine:
    """For tests that do not look at the engine itself."""
    return make_engine()


def play(workflow, tasks=(1, 2, 3), roles=ROLES, engine=None, **options):
    engines = options.pop("engines", None) or {"policy": engine or shared_engine()}
    options = {"tokenizers": {name: TOKENIZER for name in engines}} | options
    return run_workflows(workflow, tasks, engines, roles, **options)


def user(text) -> list[dict]:
    return [{"role": "user", "content": str(text)}]


async def two_roles(task, ctx):
    """Two turns of a solver, with a tool in between, and an asker beside it."""
    asked, first = await asyncio.gather(
        ctx.generate("asker", user(f"{task}+")), ctx.generate("solver", user(f"{task}+{task}="))
    )
    ctx.reward(task / 8, of=asked)
    tool = await ctx.call(slow_sum, task, timeout=30.0)
    second = await ctx.generate("solver", [{"role": "tool", "content": str(tool.value)}], after=first)
    ctx.reward(float(len(second.ids)))
    return second.text


def slow_sum(task):
    time.sleep(0.002 * (7 * task % 5))  # so that turns begin in another order than tasks
    return 2 * task


def assert_equal(a: Trajectories, b: Trajectories) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b)):
        assert np.array_equal(x, y, equal_nan=x.dtype == np.float32), jax.tree_util.keystr(path)


# --- rows


def test_rows_do_not_depend_on_what_runs_beside_them():
    """Bit for bit: one episode at a time, all at once, an engine that forgets, other tasks first."""
    tasks = list(range(1, 10))
    alone = play(two_roles, tasks, max_concurrent=1).trajectories()["policy"]
    assert alone.num_sequences == 18
    assert_equal(alone, play(two_roles, tasks).trajectories()["policy"])
    assert_equal(alone, play(two_roles, tasks, max_concurrent=3).trajectories()["policy"])
    assert_equal(alone, play(two_roles, tasks, engine=make_engine(remember=64)).trajectories()["policy"])
    last = play(two_roles, tasks[4:], first_index=4).trajectories(alone.tokens.shape[1])["policy"]
    rows = np.arange(8, 18)
    for name in ("tokens", "behaviour_logp", "turn", "role"):
        assert np.array_equal(getattr(last, name), np.asarray(getattr(alone, name))[rows]), name


@pytest.mark.parametrize("keep", [False, True])
def test_the_trainer_agrees_with_what_was_sampled_over_several_turns(keep):
    roles = {"asker": Role("policy", 9, keep=keep), "solver": Role("policy", 9, 0.7, top_k=8, keep=keep)}
    results = play(two_roles, range(1, 7), roles, engine=make_engine())
    t = results.trajectories()["policy"]
    tempered = score(make_params(), t.tokens, t.action_mask, CFG, temperature=t.temperature).logp - t.log_kept
    raw = score(make_params(), t.tokens, t.action_mask, CFG).logp
    mask = np.asarray(t.action_mask)
    assert np.max(np.abs(np.expm1(tempered - t.behaviour_logp)[mask])) <= 1e-5
    assert np.max(np.abs(raw - t.raw_logp)[mask]) <= 1e-5
    assert set(np.asarray(t.turn)[mask]) == {0, 1}
    temperature = np.where(np.asarray(t.role) == 1, np.float32(0.7), np.float32(1))
    assert np.array_equal(t.temperature, temperature)


def test_rows_hold_the_sampled_ids_in_the_order_in_which_they_were_seen():
    results = play(two_roles, [3, 4])
    rows = results.rows("policy")
    t = results.trajectories()["policy"]
    assert [(e.index, role) for e, role, *_ in rows] == [(i, r) for i in (0, 1) for r in ("asker", "solver")]
    for n, (episode, role, _, _) in enumerate(rows):
        replies = [reply for reply in episode.replies if reply.role == role]
        ids = TOKENIZER.encode_chat(user(f"{episode.task}+" + f"{episode.task}=" * (role == "solver")))
        ids += replies[0].ids
        if role == "solver":
            ids += [] if replies[0].ids[-1] == END else [END]
            ids += TOKENIZER.encode(f"<|tool|>{2 * episode.task}<|end|><|assistant|>") + replies[1].ids
        assert t.tokens[n, : int(t.lengths[n])].tolist() == ids
        written = [i for reply in replies for i in reply.ids]
        assert np.asarray(t.tokens[n])[np.asarray(t.action_mask[n])].tolist() == written
    assert results.episodes[1].value == results.episodes[1].replies[-1].text


def test_coroutines_share_the_batch(monkeypatch):
    """16 episodes of 2 turns in 4 slots: rounds are counted, and are far from those of one after another."""
    engine = make_engine()
    rounds, step = [], engine.step
    monkeypatch.setattr(engine, "step", lambda: rounds.append(1) or step())

    async def twice(task, ctx):
        reply = await ctx.generate("asker", user(task))
        await ctx.generate("asker", user(task), after=reply)

    play(twice, range(16), {"asker": Role("policy", 8)}, engine)
    assert len(rounds) <= 12  # 32 requests of one block each: 8 if all slots are always full
    assert not engine.running and not engine.waiting


def test_groups_are_the_rows_of_one_role_for_one_task():
    t = play(two_roles, [1, 2], num_generations=3).trajectories()["policy"]
    assert t.role.tolist() == [0, 1] * 6
    assert t.group.tolist() == [0, 1] * 3 + [2, 3] * 3
    assert len({tuple(row) for row in np.asarray(t.tokens).tolist()}) > 6  # generations differ


def test_every_model_gets_its_own_rows_and_names_do_not_matter():
    def both(one, two):
        engines = {one: make_engine(0), two: make_engine(1)}
        roles = {"asker": Role(one, 5), "solver": Role(two, 6, temperature=0.8, top_p=0.9)}
        out = play(two_roles, roles=roles, engines=engines).trajectories()
        return out[one], out[two]

    first, second = both("a", "b"), both("y", "x")
    for x, y in zip(first, second):
        assert_equal(x, y)
    shared = play(two_roles).trajectories()["policy"]
    assert first[0].role.tolist() == [0, 0, 0] and first[1].role.tolist() == [1, 1, 1]
    # the asker is played by the same params in both casts, the solver by others
    asked = np.asarray(shared.tokens)[::2]
    assert np.array_equal(first[0].tokens, asked)
    assert not np.array_equal(first[1].tokens, np.asarray(shared.tokens)[1::2])


def test_a_model_that_wrote_nothing_has_no_rows():
    engines = {"policy": shared_engine(), "idle": shared_engine()}
    out = play(two_roles, engines=engines).trajectories()
    assert out["idle"].num_sequences == 0 and out["policy"].num_sequences == 6


# --- rewards


def test_rewards_of_episode_role_conversation_and_turn():
    async def workflow(task, ctx):
        one = await ctx.generate("asker", user(1))
        two = await ctx.generate("solver", user(2))
        three = await ctx.generate("solver", user(3))
        ctx.reward(1.0)
        ctx.reward(2.0, of="solver")
        ctx.reward(4.0, of=three.conversation)
        ctx.reward(0.5, of=two, name="ignored")
        ctx.reward(0.25, of=two)
        ctx.reward(8.0, of="asker", name="format")
        assert one.call == 0 and (two.call, three.call) == (0, 1)

    results = play(workflow, [0])
    t = results.trajectories()["policy"]
    assert t.rewards["reward"].tolist() == [1.0, 3.0, 7.0]
    assert np.array_equal(t.rewards["format"], [8.0, np.nan, np.nan], equal_nan=True)
    last = np.asarray(t.lengths) - 1
    assert np.asarray(t.token_rewards)[range(3), last].tolist() == [0.0, 0.75, 0.0]
    assert float(np.sum(t.token_rewards)) == 0.75
    results.episodes[0].reward(1.0)  # as a judge that scores all of them later
    assert results.trajectories()["policy"].rewards["reward"].tolist() == [2.0, 4.0, 8.0]
    with pytest.raises(ValueError, match="unknown role 'judge'; one of asker, solver"):
        results.episodes[0].reward(1.0, of="judge")


# --- tools, deadlines, failures


async def answers(x):
    return x + 1


async def hangs():
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:  # as badly written clients do
            if stop_hanging.is_set():
                raise


def sleeps():
    stop_sleeping.wait(60)


def leaves():
    raise SystemExit(3)


def fails():
    raise KeyError("no such page")


def stops():
    raise StopIteration


async def cancels():
    raise asyncio.CancelledError


class Calculator:
    def __call__(self, x, *, y):
        return x * y


stop_hanging, stop_sleeping = threading.Event(), threading.Event()


@pytest.fixture(autouse=True)
def let_go():
    stop_hanging.set()  # abandoned coroutines end with their loop, but for the test that is about it
    stop_sleeping.clear()
    yield
    stop_hanging.set()
    stop_sleeping.set()


def test_whatever_a_tool_does_is_a_value():
    tools = {
        answers: None,
        hangs: TimeoutError,
        sleeps: TimeoutError,
        leaves: RuntimeError,
        fails: KeyError,
        stops: RuntimeError,
        cancels: RuntimeError,
    }

    async def workflow(task, ctx):
        outcomes = [
            await ctx.call(tool, *[1] * (tool is answers), timeout=0.2 if error is TimeoutError else 30)
            for tool, error in tools.items()
        ]
        assert (await ctx.call(Calculator(), 6, y=7)).value == 42
        assert (await ctx.call(lambda: answers(4))).value == 5  # returns a coroutine
        return outcomes

    results = play(workflow, [0])
    assert results.episodes[0].error is None
    for outcome, (tool, error) in zip(results.episodes[0].value, tools.items()):
        assert outcome.tool == tool.__qualname__
        assert outcome.ok == (error is None) and type(outcome.error) is (error or type(None))
        assert outcome.value == (2 if error is None else None)
    late = results.episodes[0].value[2]
    assert 0.2 <= late.seconds < 10 and str(late.error) == "sleeps gave no answer within 0.2 seconds"
    assert len(results.episodes[0].tools) == 9
    expected = {"tool/ok": 3, "tool/TimeoutError": 2, "tool/RuntimeError": 3, "tool/KeyError": 1}
    assert {key: n for key, n in results.counts.items() if key.startswith("tool")} == expected


def test_what_goes_wrong_with_one_task_is_recorded_and_purged_and_others_go_on():
    stop_hanging.clear()

    async def workflow(task, ctx):
        reply = await ctx.generate("solver", user(1))
        ctx.reward(1.0)
        if task == "dropped":
            ctx.drop("of no use")
        if task == "failed":
            raise KeyError("answer")
        if task == "late":
            await hangs()
        if task == "left":
            raise SystemExit
        if task == "branch":
            await asyncio.gather(ctx.generate("solver", user(2)), fail())
        if task == "again":
            with pytest.raises(ValueError, match="something follows turn 0 already"):
                await asyncio.gather(*(ctx.generate("solver", user(2), after=reply) for _ in range(2)))
        return task

    async def fail():
        raise ValueError("soon")

    tasks = ["fine", "dropped", "failed", "late", "left", "branch", "again"]
    engine = make_engine()
    first = play(two_roles, engine=engine).trajectories()["policy"]  # compiles, before deadlines count
    results = play(workflow, tasks, engine=engine, deadline=3.0)
    status = {episode.task: (episode.status, type(episode.error).__name__) for episode in results.episodes}
    assert status == {
        "fine": ("done", "NoneType"),
        "dropped": ("dropped", "Dropped"),
        "failed": ("failed", "KeyError"),
        "late": ("deadline", "TimeoutError"),
        "left": ("failed", "RuntimeError"),
        "branch": ("failed", "ValueError"),
        "again": ("done", "NoneType"),
    }
    assert str(results.episodes[1].error) == "of no use"
    assert results.counts["episode/done"] == 2 and results.counts["episode/failed"] == 3
    t = results.trajectories()["policy"]
    assert t.num_sequences == 2 and t.group.tolist() == [0, 1]
    assert not engine.running and not engine.waiting
    # and the engine serves as before, in another loop
    stop_hanging.set()
    assert_equal(first, play(two_roles, engine=engine).trajectories()["policy"])


def test_a_late_episode_frees_its_slots():
    async def workflow(task, ctx):
        if task == "long":
            while True:
                await ctx.generate("asker", user(1))
        return (await ctx.generate("asker", user(1))).ids

    engine = make_engine()
    play(workflow, ["short"], engine=engine)  # compiles, before deadlines count
    results = play(
        workflow, ["long", "short"], engine=engine, deadline=2.0, max_concurrent=1, max_calls=10**6
    )
    assert [episode.status for episode in results.episodes] == ["deadline", "done"]
    assert not engine.running and not engine.waiting


def test_what_nobody_waits_for_any_more_is_cancelled():
    seen = []

    class Endless:
        max_length = 64

        async def complete(self, request):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                seen.append(request.uid)
                raise

    async def workflow(task, ctx):
        branch = asyncio.ensure_future(ctx.generate("asker", [1]))
        await asyncio.sleep(0.01)
        assert not branch.done()

    async def main():
        episode = Episode(Cast({"policy": Endless()}, ROLES, {}, 1, 0, 64, False), "task", 0)
        await episode.play(workflow, None)
        await asyncio.sleep(0.01)
        assert (episode.status, seen, episode.replies) == ("done", [0], [])

    asyncio.run(main())


def test_a_failed_request_fails_its_episode_alone(monkeypatch):
    engine = shared_engine()
    complete = engine.complete

    async def patched(request):
        completion = await complete(request)
        if request.uid == 64 * 2:  # the asker's first call in episode 1
            object.__setattr__(completion, "reason", "failed")
            object.__setattr__(completion, "error", "logits are NaN")
        return completion

    monkeypatch.setattr(engine, "complete", patched)
    results = play(two_roles)
    assert [episode.status for episode in results.episodes] == ["done", "failed", "done"]
    error = results.episodes[1].error
    assert isinstance(error, GenerationFailed) and str(error) == "logits are NaN"
    assert set(np.asarray(results.trajectories()["policy"].group)) == {0, 1, 2, 3}


def test_a_full_context_is_an_error_that_workflows_can_catch():
    async def workflow(task, ctx):
        reply, sizes = await ctx.generate("asker", list(range(10)) * 5), []
        try:
            for _ in range(9):
                sizes.append(len(reply.conversation.rows[0].ids))
                reply = await ctx.generate("asker", [1, 2], after=reply)
        except ContextFull as error:
            return sizes, str(error)

    sizes, message = play(workflow, [0], tokenizers={}).episodes[0].value
    assert sizes[0] <= 55 and max(sizes) >= 62 and "fill max_length=64 of 'policy'" in message


def test_a_template_that_rewrites_ends_the_run_or_is_forked(tmp_path):
    TOKENIZER.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] if loop.last else '?' }}{% endfor %}"
        "{% if add_generation_prompt %}={% endif %}"
    )
    tokenizers = {"policy": load("folder", path=str(tmp_path))}

    async def workflow(task, ctx):
        reply = await ctx.generate("asker", user("12"))
        await ctx.generate("asker", user("34"), after=reply)

    with pytest.raises(NotAppendOnly, match=r"from character 0 on, '12="):
        play(workflow, tokenizers=tokenizers)
    results = play(workflow, tokenizers=tokenizers, fork=True)
    t = results.trajectories()["policy"]
    assert results.counts["fork"] == 3 and t.num_sequences == 6
    assert t.tokens[1, :5].tolist() == TOKENIZER.encode("??34=")
    assert [int(t.turn[n, 0]) for n in range(6)] == [0, 1] * 3


# --- calls


def test_own_numbers_make_draws_repeatable_in_branches_that_race():
    async def workflow(task, ctx):
        async def branch(name, wait):
            for turn in range(2):
                await ctx.call(time.sleep, wait)
                await ctx.generate("asker", user(name), call=2 * name + turn)

        waits = (0.0, 0.02) if task else (0.02, 0.0)
        await asyncio.gather(branch(0, waits[0]), branch(1, waits[1]))

    rows = [play(workflow, [task]).trajectories()["policy"] for task in (0, 1)]
    assert_equal(*rows)


def test_numbers_differ_for_every_episode_role_and_call():
    cast = play(two_roles, num_generations=2).cast
    uids = [cast.uid(i, role, call) for i in range(6) for role in ROLES for call in range(64)]
    assert sorted(uids) == list(range(6 * 2 * 64))


def test_stop_strings_end_a_reply():
    async def workflow(task, ctx):
        return await ctx.generate("asker", user(task))

    roles = {"asker": Role("policy", 30, stop_strings=("1", "2", "3", "4"))}
    engine = make_engine(stop_ids=[])
    replies = [episode.value for episode in play(workflow, range(4), roles, engine).episodes]
    stopped = [reply.text for reply in replies if reply.completion.reason == "stop"]
    assert stopped and all(text[-1] in "1234" and not set(text[:-1]) & set("1234") for text in stopped)


def test_within_a_running_loop():
    async def notebook():
        return play(two_roles).trajectories()["policy"]

    assert_equal(asyncio.run(notebook()), play(two_roles).trajectories()["policy"])


def test_wrong_calls_are_named():
    async def workflow(task, ctx):
        reply = await ctx.generate("asker", user(1))
        for arguments, options, message in [
            (("judge", user(1)), {}, "unknown role 'judge'; one of asker, solver"),
            (("solver", user(1)), {"after": reply}, "role 'solver' cannot go on after a reply of 'asker'"),
            (("asker", user(1)), {"call": 0}, "call 0 of role 'asker' was made before"),
            (("asker", user(1)), {"call": 64}, "call 64 of role 'asker' is beyond max_calls=64"),
            (("asker", [99]), {}, "token id 99 is outside the vocabulary"),
        ]:
            with pytest.raises(ValueError, match=message):
                await ctx.generate(*arguments, **options)
        return ctx

    ctx = play(workflow, [0]).episodes[0].value
    assert ctx.status == "done"
    with pytest.raises(RuntimeError, match=r"episode 0 is over \(done\)"):
        asyncio.run(ctx.generate("asker", user(1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"roles": {"a": Role("critic", 5)}}, "role 'a': no model 'critic'; one of policy"),
        (
            {"roles": {"a": Role("policy", 5, stop_strings=("1",))}, "tokenizers": {}},
            "role 'a' has stop strings",
        ),
        ({"tokenizers": {"critic": TOKENIZER}}, "tokenizers of critic, but no such engine"),
        ({"num_generations": 0}, "num_generations=0"),
        ({"max_concurrent": 0}, "max_concurrent=0 must be at least 1"),
        ({"max_calls": 2**30}, "3 episodes of 2 roles and max_calls=1073741824 need more than"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        play(two_roles, **options)


def test_no_tasks():
    results = play(two_roles, [])
    assert results.episodes == [] and results.trajectories()["policy"].num_sequences == 0
