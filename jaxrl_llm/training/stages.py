"""The stations of the loop, each a function: prompts, rollout, rewards, advantages, what the update sees."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.advantages import (
    ADVANTAGES,
    MODULATIONS,
    TRACKED,
    entropy_change,
    modulation_extremes,
    modulation_weights,
)
from jaxrl_llm.data.order import Cursor, take
from jaxrl_llm.data.prompts import Prompt, encode_prompts
from jaxrl_llm.data.rows import prompt_text
from jaxrl_llm.data.supervised import Example, pack
from jaxrl_llm.losses import Metrics, WeightedSum
from jaxrl_llm.models.params import Tree
from jaxrl_llm.models.scoring import Scores
from jaxrl_llm.rewards.pool import RewardPool
from jaxrl_llm.rewards.pool import Scores as RewardScores
from jaxrl_llm.rollouts.single_turn import Rollout, failed_rows, rollout
from jaxrl_llm.training.config import accepted, allocate, lookup
from jaxrl_llm.training.groups import Scored
from jaxrl_llm.training.job import SAMPLE, Job, encode_examples, run_key, supervised_length
from jaxrl_llm.training.rewarding import total_rewards
from jaxrl_llm.training.update import PolicyBatch, SupervisedBatch
from jaxrl_llm.training.writers import write_completions
from jaxrl_llm.trajectory import widen


@dataclasses.dataclass
class Host:
    """The host's part of the state: JSON, saved beside the arrays.

    Attributes:
      step: updates stages finished: supervised steps first, RL steps after them.
      train, supervised: where the data stand.
      uid: sequences sampled so far; numbers the next ones.
      num_tokens: tokens trained on so far.
      dropped: prompts or examples left out because they were too long.
      accuracy: of the last evaluation.
      outcomes: successes and trials so far by row of the training data, for `rollout.allocation`.
    """

    step: int
    train: Cursor
    supervised: Cursor
    uid: int = 0
    num_tokens: int = 0
    dropped: int = 0
    accuracy: float | None = None
    outcomes: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, saved: dict[str, Any]) -> "Host":
        """From what `dataclasses.asdict` made of it and JSON of that."""
        cursors = {name: Cursor(*saved[name]) for name in ("train", "supervised")}
        return cls(**saved | cursors)


@contextlib.contextmanager
def timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the seconds spent inside to timings['timing/<stage>']."""
    start = time.perf_counter()
    yield
    name = f"timing/{stage}"
    timings[name] = timings.get(name, 0.0) + time.perf_counter() - start


def next_prompts(job: Job, host: Host, count: int) -> list[Prompt]:
    """The next `count` prompts that fit, advancing the cursor past those that do not.

    Their `index` is that of their row of the training data.
    """
    train = job.train
    assert train is not None
    c = job.config.data
    prompts: list[Prompt] = []
    while len(prompts) < count:  # `job.check_rows` has found one that fits
        indices, host.train = take(host.train, count - len(prompts), len(train))
        more, dropped = encode_prompts(
            (train[int(i)] for i in indices),
            job.tokenizer,
            max_prompt_length=c.max_prompt_length,
            overlong=c.overlong_prompts,
            place=lambda i, indices=indices: train.place(int(indices[i])),  # type: ignore[misc]
        )
        prompts += [dataclasses.replace(p, index=int(indices[p.index])) for p in more]
        host.dropped += dropped
    return prompts


def next_counts(job: Job, host: Host, prompts: list[Prompt]) -> list[int] | None:
    """How many completions each prompt gets by what is known of it; None = as many each."""
    if not job.config.rollout.allocation:
        return None
    successes, trials = zip(*(host.outcomes.get(str(p.index), (0, 0)) for p in prompts))
    return allocate(job.config, successes, trials).tolist()


def record_outcomes(job: Job, host: Host, prompts: list[Prompt], total: np.ndarray) -> None:
    """Counts the successes of every row's prompt. Rows without a verdict, NaN, are no trials."""
    outcomes = dict(host.outcomes)  # of its own: the host before this step may be the one that is saved
    for prompt, reward in zip(prompts, total):
        if np.isfinite(reward):
            won, tried = outcomes.get(str(prompt.index), (0, 0))
            outcomes[str(prompt.index)] = [won + int(reward >= job.config.rollout.success_at), tried + 1]
    host.outcomes = outcomes


def next_examples(job: Job, host: Host, rows: int) -> SupervisedBatch:
    """As many of the next examples as fit into `rows` packed rows."""
    supervised = job.supervised
    assert supervised is not None
    looked, used = 0, 0
    examples: list[Example] = []
    while used == len(examples):  # until one is left over: then the rows are full
        ahead, _ = take(host.supervised, looked + rows, len(supervised))
        ahead = ahead[looked:]
        more, _ = encode_examples(
            job,
            (supervised[int(i)] for i in ahead),
            place=lambda i, ahead=ahead: supervised.place(int(ahead[i])),  # type: ignore[misc]
        )
        examples += [dataclasses.replace(example, index=example.index + looked) for example in more]
        looked += rows
        packed, used = pack(examples, supervised_length(job.config), rows)
    taken = examples[used].index
    host.dropped += taken - used
    _, host.supervised = take(host.supervised, taken, len(supervised))
    return SupervisedBatch(*(jnp.asarray(x) for x in packed))


def draw(
    job: Job, host: Host, prepared: Tree, pool: RewardPool, version: int, timings: dict[str, float]
) -> tuple[Rollout, np.ndarray, RewardScores]:
    """Prompts → rollout → rewards.

    Raises:
      FloatingPointError: the policy's logits are NaN or infinite, so that not one completion was written.
    """
    c = job.config.rollout
    with timed(timings, "prompts"):
        prompts = next_prompts(job, host, c.prompts_per_step)
        counts = next_counts(job, host, prompts)
    with timed(timings, "rollout"):
        out = rollout(
            prepared,
            job.cfg,
            job.tokenizer,
            prompts,
            job.settings(),
            key=run_key(job, SAMPLE, 0),
            first_uid=host.uid,
            policy_version=version,
            counts=counts,
            rules=job.rules,
        )
        host.uid += len(out.completions)
    broken = failed_rows(out, job.settings())
    if broken.all():
        raise FloatingPointError(
            f"logits that are NaN or infinite broke off all {len(broken)} completions of a step: lower the "
            "learning rate, or look at the updates of the last steps"
        )
    with timed(timings, "reward"):
        total, scores = total_rewards(pool, job.weights, out)
        scores = dataclasses.replace(scores, failed=scores.failed | broken)
    if c.allocation:
        record_outcomes(job, host, out.prompts, np.where(scores.failed, np.nan, total))
    return out, total, scores


def compute_advantages(job: Job, scored: Scored, tracker: Any) -> tuple[jax.Array, Any, Metrics]:
    """Total rewards → advantages f32[N]; rows that some reward function failed on are left out.

    Returns:
      Advantages, what the advantage remembers after this batch (`TrainState.tracker`), and metrics.
    """
    c = job.config.advantage
    t = scored.rollout.trajectories
    usable = scored.valid & ~scored.failed & np.isfinite(scored.total)
    arguments = jnp.asarray(scored.total), t.group, jnp.asarray(usable)
    known = {"scale": c.scale_rewards, "epsilon": c.epsilon, "lengths": t.completion_lengths}
    if c.name in TRACKED:
        advantages, tracker, metrics = TRACKED[c.name].step(tracker, *arguments, **c.options.to_dict())
    else:
        function = lookup(c.name, ADVANTAGES)
        advantages, metrics = function(*arguments, **accepted(function, known) | c.options.to_dict())
    # the function is shown usable rows alone, so it cannot count the others
    lost = WeightedSum(jnp.float32(np.sum(scored.valid & ~usable)), jnp.float32(np.sum(scored.valid)))
    return advantages, tracker, metrics | {"nonfinite_rewards": lost}


@partial(jax.jit, static_argnames=("name",))
def modulate(batch: PolicyBatch, scores: Scores, name: str) -> tuple[jax.Array, Metrics]:
    """Advantages f32[N, T] times DynaMO's token factors, from the scores of the params that sampled.

    The released code works them out anew at every update on the batch; after the first one they would differ.
    """
    advantages, mask = batch.advantages[:, None], batch.trajectories.action_mask
    change, _ = entropy_change(scores.logp, scores.logp, advantages, mask, scores.entropy, scores.covariance)
    extremes = modulation_extremes(scores.entropy, change, mask)
    weights, metrics = modulation_weights(
        advantages, scores.entropy, change, mask, extremes, **MODULATIONS[name]
    )
    return advantages * weights, metrics


def trained_rows(job: Job, scored: Scored) -> np.ndarray:
    """bool[N]: rows whose tokens count in the loss."""
    if job.config.rollout.mask_truncated_completions:
        return scored.valid & np.asarray(scored.rollout.trajectories.finished)
    return scored.valid


def narrow(job: Job, scored: Scored, advantages: jax.Array) -> PolicyBatch:
    """What the update sees: rows that do not count are masked, columns that no row fills are cut.

    The width is a power-of-two fraction of the full width, so there are few compiled shapes.
    """
    t = scored.rollout.trajectories
    counts = jnp.asarray(trained_rows(job, scored))
    full = job.config.data.max_prompt_length + job.config.rollout.max_completion_length
    width, longest = full, int(jnp.max(t.lengths))
    while width // 2 >= max(longest, 64):
        width = -(-width // 2)
    t = dataclasses.replace(widen(t, width), action_mask=widen(t, width).action_mask & counts[:, None])
    return PolicyBatch(t, advantages)


def rollout_metrics(job: Job, scored: Scored) -> dict[str, float]:
    """Numbers about completions and rewards, from the host's copies."""
    lengths = np.array([len(ids) for ids in scored.rollout.completion_ids])
    finished = np.asarray(scored.rollout.trajectories.finished)
    out = {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1 - finished.mean()),
        "rollout/failed": float(failed_rows(scored.rollout, job.settings()).sum()),
        "rollout/groups_drawn": float(scored.drawn),
        "rollout/groups_differing": float(scored.kept),
        "rollout/rows_trained": float(trained_rows(job, scored).sum()),
    }
    for name, values in scored.values.items():
        applies = values[np.isfinite(values)]
        if applies.size:
            out[f"rewards/{name}/mean"] = float(applies.mean())
            out[f"rewards/{name}/std"] = float(applies.std())
    for name, reasons in scored.failures.items():
        for reason, count in reasons.items():
            out[f"rewards/{name}/{reason}"] = float(count)
    return out


def throughput(scored: Scored, batch: PolicyBatch, timings: dict[str, float]) -> dict[str, float]:
    """Seconds of the step, and tokens per second of its stages (decode: completions alone)."""
    written = sum(len(ids) for ids in scored.rollout.completion_ids)
    seen = int(jnp.sum(batch.trajectories.lengths))
    out = {"step_time": sum(timings.values())}
    for name, stage, tokens in (
        ("decode", "rollout", written),
        ("score", "score", seen),
        ("train", "update", seen),
    ):
        if timings.get(f"timing/{stage}", 0) > 0:
            out[f"tokens_per_second/{name}"] = tokens / timings[f"timing/{stage}"]
    return out


def save_completions(workdir: Path, step: int, scored: Scored, advantages: jax.Array) -> None:
    """Writes what people want to read of a step."""
    r = scored.rollout
    write_completions(
        workdir,
        step,
        prompts=[prompt_text(prompt.row["prompt"]) for prompt in r.prompts],
        completions=r.completions,
        rewards=scored.values,
        reward=scored.total,
        advantages=advantages,
        lengths=[len(ids) for ids in r.completion_ids],
    )
