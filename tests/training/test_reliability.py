"""The loop as a whole: on policy, through troubled rewards and degenerate groups, resumed, traced once."""

import collections
import contextlib
import dataclasses
import itertools
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pyarrow.parquet as pq
import pytest
import tiny_config
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from troubled_rewards import BROKEN, is_chosen

from jaxrl_llm.losses import (
    AGGREGATIONS,
    IMPORTANCE_SAMPLING_CORRECTIONS,
    aggregate,
    finalize,
    importance_sampling_correction,
    reinforce,
)
from jaxrl_llm.models import huggingface, transformer
from jaxrl_llm.models.scoring import Scores as TokenScores
from jaxrl_llm.parallel.sharding import ShardingRules, make_mesh, shardings
from jaxrl_llm.rewards.pool import Scores
from jaxrl_llm.rollouts import schedules
from jaxrl_llm.training import loop, stages
from jaxrl_llm.training.checkpoints import CheckpointError, Checkpoints
from jaxrl_llm.training.evaluation import evaluate
from jaxrl_llm.training.groups import DegenerateBatch, collect
from jaxrl_llm.training.job import build, initial_params
from jaxrl_llm.training.state import init_state, make_optimizer, schedule
from jaxrl_llm.training.update import (
    PolicyBatch,
    accumulate,
    make_scorer,
    make_update,
    policy_loss,
    policy_scorer,
)
from jaxrl_llm.trajectory import Trajectories

REWARDS = Path(__file__).with_name("troubled_rewards.py")
TROUBLES = ("fine", "raise", "none", "nan", "huge", "equal", "hang", "inf")
P, G, C = 4, 4, 12  # prompts, completions of each, their most tokens
TIMED = ("time", "timing/", "_time", "_per_second")


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Runs of equal configs share what they compile: compiling is what these tests cost."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0)):
        jax.config.update(name, value)
    reset_cache()
    yield
    for name, value in zip(names, before):
        jax.config.update(name, value)
    reset_cache()


def make_job(folder: Path, **overrides):
    """Eight prompts of unequal lengths: two steps to an epoch."""
    path = folder / "rows.jsonl"
    rows = [{"prompt": "Calculate " + "+1" * i, "trouble": what} for i, what in enumerate(TROUBLES)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = tiny_config.get_config()
    for source in (c.data.train, c.eval.data):
        source.kind, source.path, source.name, source.seed, source.size = "jsonl", str(path), "", 0, 0
        source.options = {}
    c.eval.data.kind = ""
    c.supervised.num_steps = 0
    c.rollout.max_completion_length = C
    c.reward.functions = (f"{REWARDS}:bonus",)
    c.checkpoint.export = False
    c.update_from_flattened_dict(overrides)
    return build(c)


def metrics_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved_arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.restore(workdir / "checkpoints" / str(step) / "state")
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in flat}


def assert_on_policy(numbers: dict[str, float]) -> None:
    for name in ("ratio/min", "ratio/mean", "ratio/max", "effective_sample_size"):
        assert abs(numbers[name] - 1) <= 1e-5, name
    for bound in ("min", "max"):
        assert abs(numbers[f"sampling/importance_sampling_ratio/{bound}"] - 1) <= 1e-5
    assert numbers["sampling/sampling_logp_difference/max"] <= 1e-5
    assert 0 <= numbers["mismatch_kl"] <= 1e-10
    names = [name for name in numbers if "clip_ratio/" in name or "clamped_ratio" in name]
    assert len(names) >= 4 and not any(numbers[name] for name in names)


# --- the stations by hand: many settings for one compilation


class Pool:
    """Scores in this process: 1 for every second row."""

    def score(self, prompts, completions, completion_ids, columns):
        values = np.arange(len(completions), dtype=np.float32) % 2
        return Scores({"bonus": values}, {"bonus": {}}, np.zeros(len(values), bool))


class Stations:
    """A policy with peaked distributions, and the compiled stages of its training."""

    def __init__(self, job):
        c = job.config
        self.job, self.host = job, stages.Host(0, stages.Cursor(0), stages.Cursor(1))
        optimizer = make_optimizer(c.optimizer, 100)
        params = initial_params(job)
        params = params | {"embed": params["embed"] * 40}
        self.state = init_state(params, optimizer, loop.placed_state(job, optimizer))
        score = policy_scorer(c, job.cfg, None)
        rows = P * G
        self.update = make_update(
            policy_loss(c, score),
            optimizer,
            schedule(c.optimizer, 100),
            pieces=loop.num_pieces(c.train, rows // c.train.num_minibatches),
        )
        self.scores = make_scorer(score, pieces=loop.num_pieces(c.train, rows))

    def set(self, **options) -> None:
        c = self.job.config.copy_and_resolve_references()
        c.rollout.update(options)
        self.job = dataclasses.replace(self.job, config=c)

    def sample(self):
        """A batch, as the loop makes it."""
        prepared = loop.prepare(self.state.params, self.job.cfg, self.job.dtype)
        scored = collect(
            lambda: stages.draw(self.job, self.host, prepared, Pool(), 0, {}), num_groups=P, group_size=G
        )
        advantages, _, metrics = stages.compute_advantages(self.job, scored, ())
        return scored, stages.narrow(self.job, scored, advantages), metrics

    def learn(self, batch) -> dict[str, float]:
        """All updates on the batch, as the loop makes them."""
        t, c = batch.trajectories, self.job.config
        logp = self.scores(self.state.params, t).logp
        is_corrected = c.loss.importance_sampling_correction != "none"
        batch = dataclasses.replace(
            batch, old_logp=logp if is_corrected else None, ref_logp=logp if c.loss.beta else None
        )
        self.state, metrics = loop.learn(self.job, self.state, batch, self.update, self.host.step)
        self.host.step += 1
        return finalize(metrics)


@contextlib.contextmanager
def count_traces():
    """How often each function is traced inside, by its name."""
    traced: collections.Counter[str] = collections.Counter()

    def listen(event: str, seconds: float, **what) -> None:
        if event.endswith("/jaxpr_trace_duration"):
            traced[str(what["fun_name"])] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield traced
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@partial(jax.jit, static_argnames="cfg")
def whole_logits(params, tokens, cfg):
    return transformer.logits(params, transformer.forward(params, tokens, cfg), cfg)


def entropy_of(stations: Stations, t) -> float:
    """Mean entropy of the tempered distributions at action tokens, over whole logits in float64."""
    logits = whole_logits(stations.state.params, t.tokens, stations.job.cfg)
    z = np.asarray(logits, np.float64)[:, :-1] / np.asarray(t.temperature)[:, None, None]
    z -= z.max(axis=-1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
    entropy = -np.sum(p * np.log(p), axis=-1)
    return entropy[np.asarray(t.action_mask)[:, 1:]].mean()


@pytest.fixture(scope="module")
def stations(tmp_path_factory):
    """Learning rate 0; two updates on a batch, each in two micro-batches."""
    options = {"train.num_iterations": 2, "train.micro_batch_rows": 8, "optimizer.learning_rate": 0.0}
    options["loss.importance_sampling_correction"] = "token_truncate"
    return Stations(make_job(tmp_path_factory.mktemp("stations"), **options))


def test_learning_rate_zero_stays_on_policy_and_nothing_is_traced_twice(stations):
    """|ratio − 1| ≤ 1e-5 in every update of every step, whatever the temperature and truncation (B, Q)."""
    before, version = jax.device_get((stations.state.params, stations.state.version))
    truncations = ({}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"top_p": 0.9, "top_k": 20})
    grid = list(itertools.product((1.3, 1.0, 0.6), truncations))
    widths = set()
    with count_traces() as traced:
        for number, (temperature, truncation) in enumerate([grid[0], *grid]):
            stations.set(**{"temperature": temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0} | truncation)
            _, batch, _ = stations.sample()
            numbers = stations.learn(batch)
            assert_on_policy(numbers)
            assert numbers["entropy"] == pytest.approx(entropy_of(stations, batch.trajectories), rel=1e-4)
            widths.add(batch.trajectories.tokens.shape[1])
            if number == 0:  # everything has been compiled
                assert traced["update"] <= 1 and traced["logp"] <= 1
                traced.clear()
    assert traced == {} and len(widths) == 1
    assert stations.state.version - version == 2 * (len(grid) + 1) and int(stations.state.skipped) == 0
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(stations.state.params))
    stations.set(temperature=1.0, top_p=1.0, top_k=0)


def test_training_sees_the_samplers_ids(stations):
    """What the policy wrote cannot be had back from its text: half of the ids have none (I)."""
    stations.set(stop_strings=("1",))
    scored, batch, _ = stations.sample()
    stations.set(stop_strings=())
    t, tokenizer = batch.trajectories, stations.job.tokenizer
    differs = 0
    for row in range(P * G):
        ids = np.asarray(t.tokens[row])[: int(t.lengths[row])].tolist()
        written = scored.rollout.completion_ids[row]
        assert ids == scored.rollout.prompts[row].ids + written
        assert np.asarray(t.action_mask[row]).sum() == len(written)
        text = scored.rollout.completions[row]
        assert "1" not in text[:-1]
        differs += tokenizer.encode(text) != written
    assert differs > 0


# --- gradients


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_accumulation_is_exact(mode):
    """Micro-batches of unequal lengths, some without a token: the whole batch's gradient, in float64 (A)."""
    rng = np.random.default_rng(0)
    lengths = np.array([7, 0, 0, 3, 1, 5])
    x, advantages = rng.normal(size=(6, 7, 5)), rng.normal(size=(6, 1))
    batch = {"x": x, "advantages": advantages, "mask": np.arange(7) < lengths[:, None]}

    def loss(w, batch):
        logp = -jax.nn.softplus(batch["x"] @ w)
        per_token, metrics = reinforce(logp, logp, batch["advantages"], batch["mask"])
        return aggregate(per_token, batch["mask"], mode, norm=10), metrics

    with jax.enable_x64(True):
        w = jnp.asarray(rng.normal(size=5))
        run = jax.jit(lambda batch, pieces: accumulate(loss, w, batch, pieces)[:2], static_argnums=1)
        whole, total = run(batch, 1)
        rows = jax.tree.map(lambda x: x[:, None], batch)
        size = np.abs(jax.vmap(lambda row: run(row, 1)[0])(rows)).sum(axis=0)  # of absolute terms
        assert whole.dtype == np.float64 and np.all(np.abs(whole) > 1e-3)
        for pieces in (2, 3, 6):
            cut, cut_total = run(batch, pieces)
            assert np.all(np.abs(cut - whole) <= 1e-12 * size)
            assert cut_total.weight == total.weight
            np.testing.assert_allclose(cut_total.sum, total.sum, rtol=1e-12)


@pytest.mark.parametrize("mode", IMPORTANCE_SAMPLING_CORRECTIONS)
def test_importance_weights_carry_no_gradient(tmp_path, mode):
    """In the whole objective, whose params are the log-probs here: the gradient of −w·A·log π is −w·A (B)."""
    options = {"loss.surrogate": "reinforce", "loss.importance_sampling_correction": mode}
    c = make_job(tmp_path, **options, **{"loss.importance_sampling_cap": 1.5}).config
    rng = np.random.default_rng(0)
    behaviour = jnp.asarray(rng.normal(-2, 0.5, (4, 6)), jnp.float32)
    logp = behaviour + jnp.asarray(rng.normal(0, 0.3, (4, 6)), jnp.float32)
    mask = jnp.arange(6) < jnp.array([[6], [3], [1], [5]])
    zeros, ones = jnp.zeros((4, 6)), jnp.ones(4)
    t = Trajectories(
        tokens=zeros.astype(jnp.int32),
        lengths=jnp.full(4, 6),
        action_mask=mask,
        behaviour_logp=behaviour,
        raw_logp=behaviour,
        log_kept=zeros,
        temperature=ones,
        finished=ones > 0,
        group=jnp.zeros(4, jnp.int32),
    )
    advantages = jnp.array([1.0, -2.0, 0.5, 3.0])
    batch = PolicyBatch(t, advantages, old_logp=logp)
    loss = policy_loss(c, lambda params, t: TokenScores(params, zeros))
    gradient = jax.grad(lambda x: loss(x, batch)[0].sum)(logp)
    weights, _ = importance_sampling_correction(logp, behaviour, mask, mode=mode, cap=1.5)
    np.testing.assert_allclose(gradient, jnp.where(mask, -weights * advantages[:, None], 0), rtol=1e-6)
    assert (mode == "none") == bool(jnp.all(weights == 1))


# --- rewards that are not what one hopes for (E)

EQUAL, APART = np.full(G, 0.7), np.array([0.0, 1.0, 0.0, 1.0])
DEGENERATE = {
    "equal": [EQUAL] * P,
    "equal_huge": [EQUAL * 1e8, EQUAL * -1e8, APART, EQUAL],
    "huge": [APART * 1e8, APART * -1e8, APART * 2e8 - 1e8, APART],
    "nan": [APART, [np.nan, 1, 0, 1], [np.nan] * G, [np.nan, np.nan, np.nan, 1]],
    "inf": [APART, [np.inf, 1, 0, 1], [-np.inf] * G, [np.inf, -np.inf, 1, 1]],
}


@pytest.fixture(scope="module")
def sampled(stations):
    return stations, stations.sample()[0]


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_rewards(sampled, name):
    stations, scored = sampled
    total = np.concatenate(DEGENERATE[name]).astype(np.float32)
    scored = dataclasses.replace(scored, total=total)
    advantages, _, metrics = stages.compute_advantages(stations.job, scored, ())
    got, groups = np.asarray(advantages).reshape(P, G), total.reshape(P, G)
    assert np.all(np.isfinite(got)) and np.all(np.abs(got) < 2)
    for advantage, rewards in zip(got, groups):
        usable = np.isfinite(rewards)
        assert np.all(advantage[~usable] == 0)
        assert np.any(advantage != 0) == (len(set(rewards[usable])) > 1)
    numbers = finalize(metrics)
    usable = [set(rewards[np.isfinite(rewards)]) for rewards in groups]
    counted = [len(rewards) == 1 for rewards in usable if rewards]
    assert numbers["frac_reward_zero_std"] == pytest.approx(np.mean(counted))
    assert numbers["reward"] == pytest.approx(total[np.isfinite(total)].mean(dtype=np.float64))
    skipped = int(stations.state.skipped)
    out = stations.learn(stages.narrow(stations.job, scored, advantages))
    assert np.isfinite([out["loss"], out["grad_norm"]]).all() and int(stations.state.skipped) == skipped
    assert (out["grad_norm"] > 0) == np.any(got)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(stations.state.params)))


def test_groups_of_one_have_no_advantage(sampled):
    stations, scored = sampled
    t = scored.rollout.trajectories
    alone = dataclasses.replace(t, group=jnp.arange(P * G, dtype=jnp.int32))
    scored = dataclasses.replace(scored, rollout=dataclasses.replace(scored.rollout, trajectories=alone))
    advantages, _, metrics = stages.compute_advantages(stations.job, scored, ())
    assert not np.any(advantages) and finalize(metrics)["frac_reward_zero_std"] == 1
    assert stations.learn(stages.narrow(stations.job, scored, advantages))["grad_norm"] == 0


@pytest.mark.parametrize("reason", ["not valid", "truncated"])
def test_a_batch_without_a_token_to_learn_from(sampled, reason):
    stations, scored = sampled
    if reason == "truncated":
        stations.set(mask_truncated_completions=True)
        t = dataclasses.replace(scored.rollout.trajectories, finished=jnp.zeros(P * G, bool))
        scored = dataclasses.replace(scored, rollout=dataclasses.replace(scored.rollout, trajectories=t))
    else:
        scored = dataclasses.replace(scored, valid=np.zeros(P * G, bool))
    advantages, _, _ = stages.compute_advantages(stations.job, scored, ())
    skipped = int(stations.state.skipped)
    out = stations.learn(stages.narrow(stations.job, scored, advantages))
    stations.set(mask_truncated_completions=False)
    assert "loss" not in out and out["grad_norm"] == 0 and int(stations.state.skipped) == skipped
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(stations.state.params)))


def test_failed_rows_touch_nobody(sampled):
    """Whatever stands in the total of a row whose reward failed."""
    stations, scored = sampled
    total = np.tile([0.0, 1.0, 0.0, 1.0], P).astype(np.float32)
    failed = np.arange(P * G) % 5 == 0
    results = []
    for garbage in (np.nan, 0.0, 1e8):
        rows = dataclasses.replace(scored, total=np.where(failed, garbage, total), failed=failed)
        advantages, _, metrics = stages.compute_advantages(stations.job, rows, ())
        assert not np.any(np.asarray(advantages)[failed])
        results.append((advantages.tolist(), finalize(metrics)["reward"]))
    assert results[0] == results[1] == results[2]
    assert results[0][1] == pytest.approx(total[~failed].mean())


def test_rewards_that_are_no_number_are_counted(sampled):
    """Failed, not applicable and infinite: as a share of the valid rows."""
    stations, scored = sampled
    total = np.tile([0.0, 1.0, 0.0, 1.0], P).astype(np.float32)
    total[:3] = np.nan, np.inf, -np.inf
    failed, valid = np.arange(P * G) == 3, np.arange(P * G) < 12
    scored = dataclasses.replace(scored, total=total, failed=failed, valid=valid)
    *_, metrics = stages.compute_advantages(stations.job, scored, ())
    assert finalize(metrics)["nonfinite_rewards"] == pytest.approx(4 / 12)


def test_rows_without_a_token_are_not_counted_as_trained(sampled):
    stations, scored = sampled
    finished = jnp.arange(P * G) < 5
    t = dataclasses.replace(scored.rollout.trajectories, finished=finished)
    scored = dataclasses.replace(scored, rollout=dataclasses.replace(scored.rollout, trajectories=t))
    stations.set(mask_truncated_completions=True)
    numbers = stages.rollout_metrics(stations.job, scored)
    batch = stages.narrow(stations.job, scored, jnp.zeros(P * G))
    stations.set(mask_truncated_completions=False)
    assert numbers["rollout/rows_trained"] == 5
    assert jnp.any(batch.trajectories.action_mask, axis=1).tolist() == finished.tolist()


# --- widths and evaluation (Q)


def test_the_update_sees_few_widths_and_every_token(sampled):
    stations, scored = sampled
    full = 24 + C
    c = stations.job.config.copy_and_resolve_references()
    c.data.max_prompt_length = 1000 - C
    job = dataclasses.replace(stations.job, config=c)
    widths = set()
    for longest in (1, 30, 63, 64, 65, 125, 126, 249, 250, 251, 500, 501, 999, 1000):
        t = scored.rollout.trajectories
        t = dataclasses.replace(t, lengths=jnp.full(P * G, longest, jnp.int32))
        rows = dataclasses.replace(scored, rollout=dataclasses.replace(scored.rollout, trajectories=t))
        width = stages.narrow(job, rows, jnp.zeros(P * G)).trajectories.tokens.shape[1]
        assert longest <= width <= max(2 * longest, 125)
        widths.add(width)
    assert widths == {125, 250, 500, 1000} and full < 64


STAGES = ("prepare", "row_uniforms", "prefill", "decode", "grow", "stop", "collect")


def test_evaluation_compiles_no_stage_twice(sampled):
    """Eight prompts in batches of three, so the last has two; then at another temperature."""
    stations, _ = sampled
    job = stations.job
    prompts = stages.next_prompts(job, stations.host, 8)
    settings = job.eval_settings()
    prepared = loop.prepare(stations.state.params, job.cfg, job.dtype)
    with count_traces() as traced:
        for temperature, top_p in ((1.0, 1.0), (0.5, 0.9)):
            numbers, rollouts, scores = evaluate(
                prepared,
                job.cfg,
                job.tokenizer,
                prompts,
                dataclasses.replace(settings, num_generations=2, temperature=temperature, top_p=top_p),
                Pool(),
                job.weights,
                key=jax.random.key(0),
                batch_prompts=3,
                correct_at=1.0,
            )
            assert [len(out.completions) for out in rollouts] == [6, 6, 4] and scores.shape == (8, 2)
            assert numbers["eval/accuracy"] == 0.5
    assert traced["prefill"] == traced["decode"] == 1
    assert all(traced[stage] <= 1 for stage in STAGES)


# --- whole runs

FOUR_UPDATES = {  # a step; the policy stays where it is
    "optimizer.learning_rate": 0.0,
    "train.num_iterations": 2,
    "train.num_minibatches": 2,
    "rollout.temperature": 0.6,
    "rollout.top_p": 0.9,
}


def expected_of(table: dict[str, list], troubles: list[str]) -> dict[str, np.ndarray]:
    """What the two reward functions and the loop have to make of the dumped completions, in float64."""
    chosen = np.array([is_chosen(text) for text in table["completion"]])
    what = np.array(troubles)
    failed = chosen & np.isin(what, BROKEN)
    shaped = np.array([len(text) / 4 for text in table["completion"]])
    shaped = np.where(what == "equal", 0.25, np.where(chosen & (what == "huge"), -1e8, shaped))
    shaped = np.where(failed | chosen & (what == "none"), np.nan, shaped)
    bonus = np.where(what == "none", np.nan, ["1" in text for text in table["completion"]])
    both = np.stack([2 * shaped, 0.5 * bonus])
    total = np.where(np.all(np.isnan(both), axis=0), np.nan, np.nansum(both, axis=0))
    total = total.astype(np.float32).astype(np.float64)  # beside 2e8 a half is lost
    usable = ~failed & np.isfinite(total)
    advantage, stds = np.zeros(len(total)), []
    for start in range(0, len(total), G):
        rows = np.arange(start, start + G)[usable[start : start + G]]
        if len(rows):
            stds.append(np.std(total[rows], ddof=1) if len(rows) > 1 else 0.0)
            if stds[-1]:
                advantage[rows] = (total[rows] - total[rows].mean()) / (stds[-1] + 1e-6)
    return {
        "shaped": shaped,
        "bonus": bonus,
        "total": total,
        "usable": usable,
        "advantage": advantage,
        "stds": np.array(stds),
        "failed": failed,
        "what": what,
    }


def test_every_logged_mean_is_that_of_the_dumped_completions(tmp_path, monkeypatch):
    """One epoch of every trouble that a reward function can make: the run goes on and counts (E, J, N).

    At learning rate 0, so that four updates per step leave the policy where it was (B).
    """
    options = {"reward.weights": (2.0, 0.5), "reward.timeout": 4.0, "reward.workers": 2, "num_steps": 2}
    options |= {"reward.functions": (f"{REWARDS}:shaped", f"{REWARDS}:bonus"), "checkpoint.keep_last": 9}
    job = make_job(tmp_path, **FOUR_UPDATES, **options)
    written = []  # the ids, which the dump has as text

    def spy(job, scored):
        written.append(scored.rollout.completion_ids)
        return stages.rollout_metrics(job, scored)

    monkeypatch.setattr(loop, "rollout_metrics", spy)
    loop.run(job, tmp_path)
    trouble_of = {"Calculate " + "+1" * i: what for i, what in enumerate(TROUBLES)}
    seen, tokens = [], 0
    for row in metrics_of(tmp_path):
        table = pq.read_table(tmp_path / f"completions_{row['step']}.parquet").to_pydict()
        troubles = [trouble_of[prompt] for prompt in table["prompt"]]
        seen += troubles[::G]
        want = expected_of(table, troubles)
        for name, dumped in (("shaped", "rewards/shaped"), ("bonus", "rewards/bonus"), ("total", "reward")):
            got = np.array([np.nan if x is None else x for x in table[dumped]])
            np.testing.assert_allclose(got, want[name], rtol=1e-6, err_msg=dumped)
        np.testing.assert_allclose(table["advantage"], want["advantage"], rtol=1e-4, atol=1e-5)
        # the mean over tokens of −A, as the ratio is 1
        length = np.array(table["length"])
        loss = -np.sum(want["advantage"] * length) / length.sum()
        tokens += length.sum() + sum(map(len, table["prompt"]))
        logged = {
            "reward": want["total"][want["usable"]].mean(),
            "reward_std": want["stds"].mean(),
            "frac_reward_zero_std": np.mean(want["stds"] == 0),
            "rewards/shaped/mean": np.nanmean(want["shaped"]),
            "rewards/shaped/std": np.nanstd(want["shaped"]),
            "rewards/bonus/mean": np.nanmean(want["bonus"]),
            "rewards/bonus/std": np.nanstd(want["bonus"]),
            "completions/mean_length": length.mean(),
            "completions/min_length": length.min(),
            "completions/max_length": length.max(),
            "nonfinite_rewards": 1 - want["usable"].mean(),
            "rollout/groups_drawn": P,
            "rollout/groups_differing": (want["stds"] > 0).sum(),
            "rollout/rows_trained": P * G,
            "num_tokens": tokens,
            "tokens_per_second/decode": length.sum() / row["timing/rollout"],
            "loss": loss,
        }
        for name, value in logged.items():
            assert row[name] == pytest.approx(value, rel=2e-5, abs=1e-5), name
        assert [len(ids) for ids in written[row["step"] - 1]] == table["length"]
        clipped = [ids[-1] not in job.tokenizer.eos_ids for ids in written[row["step"] - 1]]
        assert (
            row["completions/clipped_ratio"] == pytest.approx(np.mean(clipped)) and 0 < sum(clipped) < P * G
        )
        for name, reason in (
            *(("raise", "raised_ZeroDivisionError"), ("nan", "nonfinite"), ("hang", "timeout")),
            ("none", "not_applicable"),
        ):
            same = ("nan", "inf") if reason == "nonfinite" else (name,)
            missing = np.isnan(want["shaped"]) & np.isin(want["what"], same)
            assert row.get(f"rewards/shaped/{reason}", 0) == missing.sum(), reason
        assert row.get("rewards/bonus/not_applicable", 0) == np.isnan(want["bonus"]).sum()
        assert row["skipped_updates"] == 0
        assert_on_policy(row)
        assert row["policy_version_lag"] == 1.5  # the versions 0 to 3 behind the sampler's
    first, last = (saved_arrays(tmp_path, step) for step in (0, 2))
    assert first["version"] == 0 and last["version"] == 8 and len(first) > 20
    for name in first:
        if name.startswith("params"):
            np.testing.assert_array_equal(first[name], last[name], name)
    assert sorted(seen) == sorted(TROUBLES)


@pytest.mark.parametrize("behaviour", ["train", "skip", "fail"])
def test_no_group_ever_differs(tmp_path, behaviour):
    """A constant reward under dynamic sampling: the attempts are bounded, the run goes on or ends (M)."""
    options = {"reward.functions": (f"{REWARDS}:constant",), "rollout.max_attempts": 3, "num_steps": 2}
    job = make_job(tmp_path, **FOUR_UPDATES, **options, **{"rollout.on_degenerate": behaviour})
    if behaviour == "fail":
        with pytest.raises(DegenerateBatch, match="none of 12 groups"):
            loop.run(job, tmp_path)
        assert metrics_of(tmp_path) == []
        return
    loop.run(job, tmp_path)
    for row in metrics_of(tmp_path):
        if behaviour == "skip":
            assert row["rollout/skipped"] == 1 and "loss" not in row
        else:
            assert row["rollout/groups_drawn"] == 3 * P and row["rollout/groups_differing"] == 0
            assert row["rollout/rows_trained"] == 0 and row["grad_norm"] == 0
    record = json.loads((tmp_path / "checkpoints" / "2" / "host" / "metadata").read_text())["host"]["host"]
    assert record["step"] == 2 and record["uid"] == 2 * 3 * P * G  # two steps of three attempts
    first, last = (loop.read_metrics(tmp_path)["skipped_updates"][1][i] for i in (0, -1))
    assert first == last == 0


def comparable(workdir: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if not any(t in k for t in TIMED)} for r in metrics_of(workdir)]


def test_resume_at_the_end_of_an_epoch(tmp_path):
    """One supervised and four RL steps at once, or stopped after the second, where the data end (L)."""
    options = {"optimizer.learning_rate": 1e-2, "train.num_minibatches": 2, "loss.beta": 0.1}
    options["supervised.num_steps"] = 1
    options |= {
        "loss.importance_sampling_correction": "token_mask",
        "supervised.optimizer.learning_rate": 0.1,
    }
    options |= {"supervised.train.kind": "jsonl", "supervised.train.path": str(tmp_path / "supervised.jsonl")}
    rows = [{"prompt": "Calculate", "completion": str(i)} for i in range(4)]
    (tmp_path / "supervised.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, stops in (("whole", (4,)), ("parts", (2, 4))):
        for num_steps in stops:
            job = make_job(tmp_path, **options, **{"num_steps": num_steps})
            loop.run(job, tmp_path / name)
            record = tmp_path / name / "checkpoints" / str(1 + num_steps) / "host" / "metadata"
            host = json.loads(record.read_text())["host"]["host"]
            assert host["train"] == [0, num_steps // 2, 0]  # seed, epoch, position
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    one, other = saved_arrays(whole, 5), saved_arrays(parts, 5)
    assert one.keys() == other.keys() and one["version"] == 8
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], name)
    assert comparable(whole) == comparable(parts)
    for step in range(2, 6):
        name = f"completions_{step}.parquet"
        assert pq.read_table(whole / name) == pq.read_table(parts / name)
    # the same on another mesh
    job = make_job(tmp_path, **options, **{"num_steps": 5, "mesh.data": 2, "mesh.fsdp": 2})
    optimizers = make_optimizer(job.config.supervised.optimizer, 1), make_optimizer(job.config.optimizer, 10)
    with Checkpoints(whole / "checkpoints", read_only=True) as checkpoints:
        state, host, step = loop.start(job, checkpoints, optimizers)
    assert step == host.step == 5
    embed = state.params["embed"]
    np.testing.assert_array_equal(embed, one["params/embed"])
    assert embed.addressable_shards[0].data.size == embed.size // 2
    # taking the policy of now for a lost reference would change the objective in silence
    shutil.rmtree(parts / "reference")
    with pytest.raises(CheckpointError, match="has lost the reference model"):
        loop.run(make_job(tmp_path, **options, **{"num_steps": 5}), parts)


ENGINE = {
    "rollout.slots": 3,
    "rollout.allocation": "dynamo",
    "rollout.allocation_options": {"low": 2, "high": 8, "initial_budget": 3},
}


def test_the_engine_in_the_loop_with_groups_of_several_sizes(tmp_path):
    """Three steps at once, or stopped after the second; counts and outcomes from the dumped completions."""
    options = ENGINE | {"optimizer.learning_rate": 1e-2}
    for name, stops in (("whole", (3,)), ("parts", (2, 3))):
        for num_steps in stops:
            job = make_job(tmp_path, **options, **{"num_steps": num_steps})
            assert job.settings().slots == job.eval_settings().slots == 3
            loop.run(job, tmp_path / name)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    one, other = saved_arrays(whole, 3), saved_arrays(parts, 3)
    assert one.keys() == other.keys() and one["version"] == 3
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], name)
    assert comparable(whole) == comparable(parts)
    successes, trials = collections.Counter(), collections.Counter()
    sizes = set()
    for step, row in enumerate(metrics_of(whole), 1):
        assert_on_policy(row)
        assert row["rollout/failed"] == 0 and row["rollout/rows_trained"] == P * G
        table = pq.read_table(whole / f"completions_{step}.parquet").to_pydict()
        counts = collections.Counter(table["prompt"])  # in the order of the prompts
        known = [[known[prompt] for prompt in counts] for known in (successes, trials)]
        wanted = schedules.allocate(*known, P * G, low=2, high=8, initial_budget=3)
        assert list(counts.values()) == wanted.tolist()
        sizes |= set(counts.values())
        for prompt, reward, advantage in zip(*(table[x] for x in ("prompt", "reward", "advantage"))):
            assert (reward is None) <= (advantage == 0)
            successes[prompt] += reward == 1
            trials[prompt] += reward is not None
    assert len(sizes) > 1
    record = (whole / "checkpoints" / "3" / "host" / "metadata").read_text()
    outcomes = json.loads(record)["host"]["host"]["outcomes"]
    prompts = [row["prompt"] for row in job.train]
    assert {prompts[int(i)]: tuple(x) for i, x in outcomes.items()} == {
        prompt: (successes[prompt], count) for prompt, count in trials.items() if count
    }


def test_a_policy_without_logits_stops_the_run(tmp_path, monkeypatch):
    """The engine has nothing to draw from, from the second step on: the run says so, saved."""
    prepare, calls = loop.prepare, itertools.count()

    def broken(params, cfg, dtype):
        prepared = prepare(params, cfg, dtype)
        return prepared | {"final_norm": prepared["final_norm"] * jnp.nan} if next(calls) else prepared

    monkeypatch.setattr(loop, "prepare", broken)
    with pytest.raises(FloatingPointError, match="broke off all 16 completions") as error:
        loop.run(make_job(tmp_path, **{"rollout.slots": 3}), tmp_path)
    assert "Saved at step 1 of 4" in error.value.__notes__[0] and len(metrics_of(tmp_path)) == 1
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest() == 1


def test_what_an_allocation_cannot_do_is_refused_before_anything_compiles(tmp_path):
    for change, message in (
        ({"rollout.slots": 0}, "several sizes, which takes rollout.slots"),
        ({"rollout.max_attempts": 2}, "set one of the two"),
        ({"rollout.allocation": "dynamic"}, "did you mean 'dynamo'"),
        ({"rollout.allocation_options": {"low": 5}}, r"total=16 is not between 4·5 and 4·24"),
        ({"rollout.allocation_options": {"lowest": 2}}, "lowest"),
        ({"rollout.slots": -1}, "rollout.slots=-1: at least 0"),
        ({"mesh.data": 2}, "rollout.slots=3 is not divisible by the mesh's data × fsdp = 2"),
    ):
        with pytest.raises(ValueError, match=message):
            make_job(tmp_path, **ENGINE | change)


def test_a_run_imports_the_slices_of_its_mesh(tmp_path):
    """`initial_params` asks for every tensor where it will live, not whole on one device (P)."""
    options = {"model.num_kv_heads": 2, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    plain = make_job(tmp_path, **{"model.num_kv_heads": 2})
    params = initial_params(plain)
    huggingface.save(tmp_path / "model", params, plain.cfg)
    job = make_job(tmp_path, **options, **{"model.path": str(tmp_path / "model")})
    loaded = initial_params(job)
    where = shardings(transformer.param_specs(job.cfg), make_mesh(2, 2, 2), ShardingRules())
    jax.tree.map(np.testing.assert_array_equal, params, loaded)
    assert jax.tree.map(lambda x: x.sharding, loaded) == where
    assert loaded["embed"].addressable_shards[0].data.size == loaded["embed"].size // 4
