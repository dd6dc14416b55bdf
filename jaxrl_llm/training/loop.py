"""The training loop: prompts → rollout → rewards → advantages → loss → update."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_llm.advantages import TRACKED
from jaxrl_llm.data.order import Cursor
from jaxrl_llm.data.rows import MalformedRow
from jaxrl_llm.losses import Metrics, finalize, merge
from jaxrl_llm.models import transformer
from jaxrl_llm.models.params import Tree
from jaxrl_llm.parallel.sharding import ShardingRules, shardings
from jaxrl_llm.rewards.pool import RewardPool
from jaxrl_llm.sampling.autoregressive import prepare
from jaxrl_llm.training.checkpoints import CheckpointError, Checkpoints, check_config
from jaxrl_llm.training.diffusion import denoising_loss, with_noise
from jaxrl_llm.training.evaluation import evaluate
from jaxrl_llm.training.groups import DegenerateBatch, collect
from jaxrl_llm.training.job import (
    EVALUATE,
    NOISE,
    SHUFFLE,
    Job,
    export,
    initial_params,
    reward_specs,
    run_key,
)
from jaxrl_llm.training.plots import plot
from jaxrl_llm.training.progress import progress
from jaxrl_llm.training.rewarding import RewardError
from jaxrl_llm.training.stages import (
    Host,
    compute_advantages,
    draw,
    modulate,
    narrow,
    next_examples,
    rollout_metrics,
    save_completions,
    throughput,
    timed,
)
from jaxrl_llm.training.state import (
    TrainState,
    abstract_state,
    init_state,
    make_optimizer,
    schedule,
    state_shardings,
)
from jaxrl_llm.training.update import (
    PolicyBatch,
    make_scorer,
    make_update,
    policy_loss,
    policy_scorer,
    scorer,
    supervised_loss,
)
from jaxrl_llm.training.writers import open_writer, read_metrics

MAY_CHANGE = (
    "num_steps",
    "eval",
    "checkpoint",
    "log",
    "reward.timeout",
    "reward.workers",
    "reward.memory_gib",
    "mesh",
)
"""Keys that a resumed run may set anew; a changed num_steps changes a schedule that runs to its end."""

SHOWN = ("reward", "eval/accuracy", "completions/mean_length", "entropy", "loss", "tokens_per_second/decode")
"""Metrics on the progress line."""


class Stopped(Exception):
    """The run was asked to stop; its state is saved."""


class NonFinite(RuntimeError):
    """Loss or gradient stayed NaN or infinite; the last good state is saved."""


class WriteError(RuntimeError):
    """A file of the workdir cannot be written; the checkpoints that were saved before stand."""


@contextlib.contextmanager
def writing(workdir: Path) -> Iterator[None]:
    """Turns a full disk or a missing permission into one `WriteError`."""
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"cannot write in {workdir}: {error}. Stopped; make room there, or choose a folder that can be "
            "written: the same command goes on from the newest checkpoint"
        ) from error


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a request that the loop sees between steps.

    A second Ctrl-C interrupts at once.
    """
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield lambda: False
        return
    asked = False

    def handle(number: int, _: Any) -> None:
        nonlocal asked
        again = asked and number == signal.SIGINT
        asked = True
        what = (
            "stopping at once; the newest checkpoint stands" if again else "finishing this step, then saving"
        )
        with contextlib.suppress(RuntimeError):  # in the middle of another print, which cannot be re-entered
            print(f"\n{signal.Signals(number).name}: {what}", flush=True)
        if again:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def num_pieces(c: Any, rows: int) -> int:
    """Micro-batches that `rows` rows are taken in."""
    return rows // (c.micro_batch_rows or rows)


def learn(
    job: Job,
    state: TrainState,
    batch: PolicyBatch,
    update: Callable[[TrainState, PolicyBatch], tuple[TrainState, Metrics]],
    step: int,
) -> tuple[TrainState, Metrics]:
    """All updates on one batch of rollouts: `num_iterations` passes in `num_minibatches` shuffled parts."""
    c = job.config.train
    rows = batch.advantages.shape[0]
    metrics: Metrics = {}
    for iteration in range(c.num_iterations):
        order = np.arange(rows)
        if c.num_minibatches > 1:
            key = jax.random.fold_in(run_key(job, SHUFFLE, step), iteration)
            order = np.asarray(jax.random.permutation(key, rows))
        for part in np.split(order, c.num_minibatches):
            whole = c.num_minibatches == 1
            piece = batch if whole else jax.tree.map(lambda x, part=part: x[part], batch)
            state, more = update(state, jax.device_put(piece, job.rows))
            metrics = merge(metrics, more)
    return state, metrics


def specs_of(job: Job) -> Tree:
    """`ParamSpec` of the policy."""
    return transformer.param_specs(job.cfg)


def placed_state(job: Job, optimizer: optax.GradientTransformation) -> Any:
    """Where the state's arrays live."""
    rules = job.rules or ShardingRules()
    return state_shardings(specs_of(job), optimizer, job.mesh, rules, first_tracker(job))


def first_tracker(job: Job) -> Any:
    """What the config's advantage remembers before the first batch; () if it remembers nothing."""
    name = job.config.advantage.name
    return TRACKED[name].init() if name in TRACKED else ()


def reference_params(job: Job, state: TrainState, folder: Path) -> Tree:
    """The policy as RL found it, kept in a folder of its own so that a resumed run has the same."""
    with Checkpoints(folder) as kept:
        if kept.latest() is None:
            if int(state.version):
                raise CheckpointError(
                    f"{folder} has lost the reference model, and the policy has been trained since: "
                    "put it back, or start anew in another workdir"
                )
            kept.save(0, {"params": state.params}, {}, wait=True)
        placed = shardings(specs_of(job), job.mesh, job.rules or ShardingRules())
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state.params, placed
        )
        return kept.restore({"params": abstract})[0]["params"]


def start(
    job: Job, checkpoints: Checkpoints, optimizers: tuple[Any, Any]
) -> tuple[TrainState, Host, int | None]:
    """The state to go on from: the newest checkpoint's, or a fresh one.

    Returns:
      state, host, and the step that was restored (None = a fresh start).

    Raises:
      ConfigMismatch: the checkpoint belongs to another config.
    """
    c = job.config
    supervised, rl = optimizers
    latest = checkpoints.latest()
    if latest is None:
        first = supervised if c.supervised.num_steps else rl
        state = init_state(initial_params(job), first, placed_state(job, first), first_tracker(job))
        return state, Host(0, Cursor(c.seed), Cursor(c.seed + 1)), None
    # a checkpoint at the border of the stages already has the optimizer of the next one
    optimizer = supervised if latest < c.supervised.num_steps else rl
    abstract = abstract_state(specs_of(job), optimizer, placed_state(job, optimizer), first_tracker(job))
    check_config(checkpoints.host(latest)["config"], c.to_dict(), ignore=MAY_CHANGE)
    state, saved = checkpoints.restore(abstract, latest)
    return state, Host.load(saved["host"]), latest


def run(job: Job, workdir: Path) -> None:
    """Trains, from wherever the workdir stands to the end.

    Raises:
      Stopped: Ctrl-C or SIGTERM, after saving.
      NonFinite: too many updates in a row were not finite; the last good state is saved.
      ConfigMismatch, CheckpointError: the workdir cannot be resumed.
      WriteError: the workdir cannot be written.
      MalformedRow, RewardError, DegenerateBatch, FloatingPointError: no step can be made of the data, their
        rewards or the policy's logits; saved.
    """
    c = job.config
    rl_begins, end = c.supervised.num_steps, c.supervised.num_steps + c.num_steps
    rows = c.rollout.prompts_per_step * c.rollout.num_generations
    updates = c.num_steps * c.train.num_iterations * c.train.num_minibatches
    optimizers = make_optimizer(c.supervised.optimizer, rl_begins), make_optimizer(c.optimizer, updates)
    score = policy_scorer(c, job.cfg, job.rules)
    timings: dict[str, float] = {}

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(job.mesh))
        stopping = stack.enter_context(stop_requests())
        with writing(workdir):
            checkpoints = stack.enter_context(
                Checkpoints(
                    workdir / "checkpoints",
                    keep_last=c.checkpoint.keep_last,
                    keep_best=c.checkpoint.keep_best,
                )
            )
        state, host, restored = start(job, checkpoints, optimizers)
        with writing(workdir):
            try:
                writer = open_writer(workdir, restored)
            except ValueError as error:
                raise CheckpointError(f"{error}; mend that line, or move the file away") from error
            stack.callback(writer.close)
            if restored is None:
                writer.write_hparams(c.to_dict())
        pool = None
        if c.reward.functions:
            pool = stack.enter_context(
                RewardPool(
                    reward_specs(c),
                    workers=c.reward.workers,
                    timeout=c.reward.timeout,
                    memory_gib=c.reward.memory_gib,
                )
            )

        def save(wait: bool = False) -> None:
            record = {"host": dataclasses.asdict(host), "config": c.to_dict()}
            best = {} if host.accuracy is None else {"eval/accuracy": host.accuracy}
            try:
                with timed(timings, "checkpoint"):
                    checkpoints.save(host.step, state, record, best, wait=wait)
            except CheckpointError as error:
                if wait:
                    raise
                print(f"\nWARNING: {error}\nTraining goes on; the next save is tried again.", flush=True)

        @contextlib.contextmanager
        def saved_if_refused(before: Host) -> Iterator[None]:
            """Saves the state as the step found it, `before`, where data or rewards do not let it begin."""
            nonlocal host
            try:
                yield
            except (MalformedRow, RewardError, DegenerateBatch, FloatingPointError) as error:
                host = before
                save(wait=True)
                error.add_note(
                    f"Saved at step {host.step} of {end}: once this is mended, the same command goes on."
                )
                raise

        def evaluate_now() -> dict[str, float]:
            assert pool is not None
            with timed(timings, "eval"):
                numbers, _, _ = evaluate(
                    prepare(state.params, job.cfg, job.dtype),
                    job.cfg,
                    job.tokenizer,
                    job.eval_prompts,
                    job.eval_settings(),
                    pool,
                    job.weights,
                    key=run_key(job, EVALUATE, 0),
                    batch_prompts=c.eval.batch_prompts,
                    correct_at=c.eval.correct_at,
                    rules=job.rules,
                )
            host.accuracy = numbers["eval/accuracy"]
            return numbers

        def finish_step(numbers: dict[str, float]) -> None:
            """Everything that follows an update: evaluation, metrics, checkpoint, requests to stop."""
            host.step += 1
            step = host.step
            in_rl = step > rl_begins
            due = c.eval.every and in_rl and (step - rl_begins) % c.eval.every == 0
            if job.eval_prompts and (step in (rl_begins, end) or due):
                numbers |= evaluate_now()
            if int(state.nonfinite) >= c.train.max_nonfinite_steps:
                save(wait=True)
                raise NonFinite(
                    f"{int(state.nonfinite)} updates in a row were not finite (NaN or infinite loss or "
                    f"gradient); stopped at step {step}. The last good state is in {checkpoints.directory}; "
                    "lower the learning rate, or look at the rewards and completions of the last steps"
                )
            if step % c.log.every == 0 or step in (rl_begins, end) or "eval/accuracy" in numbers:
                with writing(workdir):
                    writer.write_scalars(step, numbers | timings | {"skipped_updates": float(state.skipped)})
            timings.clear()
            stop = stopping()  # asked once: what is not saved below is not said to be
            if stop or step in (rl_begins, end) or step % c.checkpoint.every == 0:
                save(wait=stop or step == end)
            if stop and step < end:
                raise Stopped(f"saved at step {step} of {end}; the same command goes on from there")

        # --- supervised: the warm start, or the whole run
        if host.step < rl_begins:
            rate = schedule(c.supervised.optimizer, rl_begins)
            loss = supervised_loss(scorer(c, job.cfg, job.rules))
            if not job.cfg.causal:
                by_example = job.objective == "diffusion_finetuning"
                options = {"dtype": job.dtype, "remat": c.model.remat, "rules": job.rules}
                loss = denoising_loss(job.cfg, by_example=by_example, **options)
            update = make_update(loss, optimizers[0], rate)
            with progress(total=rl_begins, title="supervised") as tick:
                while host.step < rl_begins:
                    with timed(timings, "prompts"), saved_if_refused(host):
                        examples = next_examples(job, host, c.supervised.batch_rows)
                    with timed(timings, "update"):
                        given: Any = examples
                        if not job.cfg.causal:
                            given = with_noise(
                                examples,
                                run_key(job, NOISE, host.step),
                                mask_id=job.cfg.mask_id,
                                everywhere=job.objective == "diffusion_pretraining",
                            )
                        state, metrics = update(state, jax.device_put(given, job.rows))
                        numbers = finalize(metrics)
                    host.num_tokens += int(np.sum(examples.segment_ids > 0))
                    numbers["num_tokens"] = float(host.num_tokens)
                    numbers["step_time"] = sum(timings.values())
                    if host.step + 1 == rl_begins:  # RL starts with an optimizer of its own
                        state = init_state(
                            state.params, optimizers[1], placed_state(job, optimizers[1]), state.tracker
                        )
                    finish_step(numbers)
                    tick(host.step, {k: numbers[k] for k in SHOWN if k in numbers})
        elif host.step == 0 and restored is None:
            if job.eval_prompts:
                numbers = evaluate_now()
                with writing(workdir):
                    writer.write_scalars(0, numbers)
            save()

        # --- reinforcement learning
        if c.num_steps:
            reference = reference_params(job, state, workdir / "reference") if c.loss.beta else None
            update = make_update(
                policy_loss(c, score),
                optimizers[1],
                schedule(c.optimizer, updates),
                pieces=num_pieces(c.train, rows // c.train.num_minibatches),
            )
            modulation = c.advantage.modulation
            pieces = num_pieces(c.train, rows)
            scores = make_scorer(score, pieces=pieces)
            own_scores = scores
            if modulation:
                own_scores = make_scorer(policy_scorer(c, job.cfg, job.rules, collision=True), pieces=pieces)
            is_corrected = c.loss.importance_sampling_correction != "none"
            assert pool is not None
            with progress(total=c.num_steps, title="RL", start=host.step - rl_begins) as tick:
                while host.step < end:
                    with timed(timings, "prepare"):
                        prepared = prepare(state.params, job.cfg, job.dtype)
                        version = int(state.version)
                    with saved_if_refused(dataclasses.replace(host)):
                        scored = collect(
                            lambda: draw(job, host, prepared, pool, version, timings),  # noqa: B023
                            num_groups=c.rollout.prompts_per_step,
                            group_size=c.rollout.num_generations,
                            max_attempts=c.rollout.max_attempts,
                            on_degenerate=c.rollout.on_degenerate,
                        )
                    if scored is None:
                        finish_step({"rollout/skipped": 1.0})
                        tick(host.step - rl_begins, {})
                        continue
                    with timed(timings, "advantage"):
                        advantages, tracker, metrics = compute_advantages(job, scored, state.tracker)
                        state = dataclasses.replace(state, tracker=tracker)
                        batch = narrow(job, scored, advantages)
                    if is_corrected or modulation or reference is not None:
                        with timed(timings, "score"):
                            if is_corrected or modulation:
                                now = own_scores(state.params, batch.trajectories)
                            if is_corrected:
                                batch = dataclasses.replace(batch, old_logp=now.logp)
                            if modulation:
                                factored, more = modulate(batch, now, modulation)
                                batch = dataclasses.replace(batch, advantages=factored)
                                metrics |= more
                            if reference is not None:
                                ref_logp = scores(reference, batch.trajectories).logp
                                batch = dataclasses.replace(batch, ref_logp=ref_logp)
                    with timed(timings, "update"):
                        state, more = learn(job, state, batch, update, host.step)
                        numbers = finalize(metrics | more) | rollout_metrics(job, scored)
                    host.num_tokens += int(jnp.sum(batch.trajectories.lengths))
                    numbers |= throughput(scored, batch, timings)
                    numbers["num_tokens"] = float(host.num_tokens)
                    numbers["policy_version_lag"] = (int(state.version) - version - 1) / 2
                    done = host.step - rl_begins
                    every = c.log.completions_every
                    if every and (done % every == 0 or host.step + 1 == end):
                        with writing(workdir):
                            save_completions(workdir, host.step + 1, scored, advantages)
                    finish_step(numbers)
                    tick(host.step - rl_begins, {k: numbers[k] for k in SHOWN if k in numbers})

        # --- what remains of the run
        with writing(workdir):
            if c.checkpoint.export:
                export(job, state.params, workdir / "export")
            writer.flush()
            if c.log.plots:
                plot([workdir], workdir / "plots")


def results(job: Job, workdir: Path) -> list[tuple[str, str]]:
    """What a finished run has to show, (name, value): accuracy before and after, and files."""
    metrics = read_metrics(workdir)
    lines = []
    if "eval/accuracy" in metrics:
        steps, accuracy = metrics["eval/accuracy"]
        low, high = metrics["eval/accuracy_low"][1], metrics["eval/accuracy_high"][1]
        for place in (0, -1) if len(steps) > 1 else (-1,):
            lines.append(
                (
                    f"accuracy at step {steps[place]}",
                    f"{100 * accuracy[place]:.1f}% [{100 * low[place]:.1f}, {100 * high[place]:.1f}] of "
                    f"{len(job.eval_prompts)} held-out problems",
                )
            )
        if len(steps) > 1:
            lines.append(("gain", f"{100 * (accuracy[-1] - accuracy[0]):+.1f} points"))
    if job.config.checkpoint.export:
        lines.append(("model", str(workdir / "export")))
    return lines
