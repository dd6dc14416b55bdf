"""Everything that a run is made of, built from its config before anything compiles."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxrl_llm.data import tokenizers
from jaxrl_llm.data.prompts import Prompt, encode_prompts
from jaxrl_llm.data.sources import Row, Source, held_out, open_source
from jaxrl_llm.data.supervised import Example, encode_supervised
from jaxrl_llm.models import huggingface, huggingface_config, transformer
from jaxrl_llm.models import params as params_lib
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.params import Tree
from jaxrl_llm.parallel.sharding import ShardingRules, batch_sharding, make_mesh, shardings
from jaxrl_llm.rewards.specs import as_spec, check_columns, resolve
from jaxrl_llm.rollouts.engine import Engine
from jaxrl_llm.rollouts.single_turn import Settings
from jaxrl_llm.sampling.autoregressive import prepare
from jaxrl_llm.sampling.rules import Rules
from jaxrl_llm.training.architecture import check_objective, model_config
from jaxrl_llm.training.checkpoints import Checkpoints
from jaxrl_llm.training.config import check
from jaxrl_llm.training.progress import summary

GIB = 2**30
FILES = ("jsonl", "parquet")
SAMPLE, EVALUATE, SHUFFLE, NOISE = 1, 2, 3, 4
"""Purposes of random keys; see `run_key`."""


@dataclasses.dataclass(frozen=True)
class Job:
    """The fixed parts of a run.

    Attributes:
      config: checked.
      cfg: shape of the policy.
      tokenizer: of the policy.
      train, supervised: rows to draw from; None where the stage has no steps.
      eval_prompts: held-out problems, encoded.
      removed: training rows left out because their prompt is held out.
      weights: of each reward function, by its name.
      mesh, rules: where arrays live; rules is None on one device.
    """

    config: ConfigDict
    cfg: ModelConfig
    tokenizer: tokenizers.Tokenizer
    train: Source | None
    supervised: Source | None
    eval_prompts: list[Prompt]
    removed: int
    weights: dict[str, float]
    mesh: Mesh
    rules: ShardingRules | None

    @property
    def rows(self) -> jax.sharding.Sharding:
        """How arrays [N, ...] of sequences lie on the mesh."""
        return batch_sharding(self.mesh, self.rules or ShardingRules())

    @property
    def dtype(self) -> Any:
        """Compute dtype."""
        return jnp.dtype(self.config.model.compute_dtype)

    @property
    def objective(self) -> str:
        """What supervised training learns, of `config.OBJECTIVES`."""
        own = "next_token" if self.cfg.causal else "diffusion_finetuning"
        return self.config.supervised.objective or own

    def settings(self) -> Settings:
        """How training samples."""
        r = self.config.rollout
        return Settings(
            max_prompt_length=self.config.data.max_prompt_length,
            max_completion_length=r.max_completion_length,
            num_generations=r.num_generations,
            temperature=r.temperature,
            top_p=r.top_p,
            top_k=r.top_k,
            min_p=r.min_p,
            stop_strings=tuple(r.stop_strings),
            slots=r.slots,
        )

    def eval_settings(self) -> Settings:
        """How evaluation samples."""
        e = self.config.eval
        return dataclasses.replace(
            self.settings(),
            num_generations=e.num_generations,
            temperature=e.temperature,
            top_p=e.top_p,
            top_k=0,
            min_p=0.0,
        )


def open_rows(c: ConfigDict) -> Source | None:
    """The rows that a `config.source()` group describes; None without a kind, or without a file's path."""
    if not c.kind or (c.kind in FILES and not c.path):
        return None
    return open_source(
        c.kind,
        path=c.path,
        name=c.name,
        split=c.split,
        size=c.size,
        seed=c.seed,
        options=c.options.to_dict(),
    )


def load_tokenizer(c: ConfigDict) -> tokenizers.Tokenizer:
    """The tokenizer that the config names; without a path, that of the model's folder."""
    path = c.tokenizer.path
    if not path and c.tokenizer.kind in ("folder", "sentencepiece"):
        path = c.model.path
    return tokenizers.load(c.tokenizer.kind, path=path, alphabet=c.tokenizer.alphabet)


def supervised_length(c: ConfigDict) -> int:
    """Tokens of a packed row."""
    return c.supervised.max_length or c.data.max_prompt_length + c.rollout.max_completion_length


def encode_examples(job: Job, rows: Iterable[Row], place: Callable[[int], str]) -> tuple[list[Example], int]:
    """`encode_supervised` for the run's model, within its limits."""
    c = job.config
    return encode_supervised(
        rows,
        job.tokenizer,
        max_length=supervised_length(c),
        overlong=c.data.overlong_prompts,
        mask_id=job.cfg.mask_id,
        completion_length=c.supervised.completion_length,
        place=place,
    )


def with_completions(rows: Source) -> Source:
    """The rows with their `answer` for a completion, where they have none."""

    def read(index: int) -> Row:
        row = rows.read(index)
        known = "completion" in row or "chosen" in row or "answer" not in row
        return row if known else row | {"completion": str(row["answer"])}

    return dataclasses.replace(rows, read=read)


def check_rows(job: Job) -> None:
    """Finds rows that training could not use before anything compiles.

    With data.overlong_prompts='error' every row is encoded, else only as many as it takes to find one that is
    short enough.

    Raises:
      MalformedRow: a row that cannot be encoded, or is too long under 'error'.
      ValueError: no row is short enough.
    """
    data, filled = job.config.data, job.config.supervised.completion_length
    limit_of_examples = f"supervised.max_length={supervised_length(job.config)}"
    if filled:
        limit_of_examples += f" (its completion filled to supervised.completion_length={filled})"
    prompts = functools.partial(
        encode_prompts,
        tokenizer=job.tokenizer,
        max_prompt_length=data.max_prompt_length,
        overlong=data.overlong_prompts,
    )
    examples = functools.partial(encode_examples, job)
    for rows, encode, limit in (
        (job.train, prompts, f"data.max_prompt_length={data.max_prompt_length}"),
        (job.supervised, examples, limit_of_examples),
    ):
        if rows is None:
            continue
        found = False
        for index, row in enumerate(rows):
            place = lambda _, rows=rows, index=index: rows.place(index)  # noqa: E731
            found |= bool(encode([row], place=place)[0])
            if found and data.overlong_prompts == "drop":
                break
        if not found:
            raise ValueError(f"no training row has at most {limit} tokens: raise the limit")


def build(c: ConfigDict, *, training: bool = True, evaluation: bool = True) -> Job:
    """Checks the config and opens what it names.

    Args:
      c: the config.
      training, evaluation: whether the rows for it are wanted; without, their files need not be there.

    Raises:
      ValueError, FileNotFoundError: what is wrong, by key, by file or by row.
    """
    check(c)
    tokenizer = load_tokenizer(c)
    cfg = model_config(c, tokenizer)
    if training:
        check_objective(c, cfg)
    train = open_rows(c.data.train) if training else None
    test = open_rows(c.eval.data) if evaluation else None
    supervised = (open_rows(c.supervised.train) or train) if training and c.supervised.num_steps else None
    if training and c.num_steps and train is None:
        raise ValueError("data.train has no rows: set data.train.kind, and data.train.path of a file")
    if training and c.supervised.num_steps and supervised is None:
        raise ValueError("supervised.train has no rows: set its kind and path, or those of data.train")
    if training and not cfg.causal and (c.num_steps or test is not None):
        raise ValueError(
            f"{c.model.path or 'the new model'} is a masked-diffusion model, which is trained here on given "
            "texts: set num_steps=0 and no eval.data; RL on it is jaxrl_llm.training.diffusion_rl.improve"
        )
    removed = 0
    eval_prompts: list[Prompt] = []
    if test is not None:
        eval_prompts, _ = encode_prompts(
            test,
            tokenizer,
            max_prompt_length=c.data.max_prompt_length,
            overlong=c.data.overlong_prompts,
            place=test.place,
        )
        if not eval_prompts:
            raise ValueError(
                f"no held-out prompt has at most data.max_prompt_length={c.data.max_prompt_length} tokens: "
                "raise the limit"
            )
        same = supervised is train
        if train is not None:
            train, removed = held_out(train, test)
        if same:
            supervised = train if supervised is not None else None
        elif supervised is not None:
            supervised, more = held_out(supervised, test)
            removed += more
    rewards = [resolve(spec) for spec in c.reward.functions]
    names = [reward.name for reward in rewards]
    if len(set(names)) < len(names):
        raise ValueError(f"reward.functions need distinct names, got {names}: give a 'name' in a mapping")
    for reward in rewards:
        for source in (train if c.num_steps else None, test):
            if source is not None:
                check_columns(reward, source.columns)
    weights = c.reward.weights or [1.0] * len(rewards)
    mesh = make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    pieces = mesh.shape["data"] * mesh.shape["fsdp"]
    for key, count in (
        ("rollout.prompts_per_step", c.rollout.prompts_per_step),
        ("train.micro_batch_rows", c.train.micro_batch_rows or pieces),
        ("supervised.batch_rows", c.supervised.batch_rows),
        ("eval.batch_prompts", c.eval.batch_prompts if eval_prompts else pieces),
        ("rollout.slots", c.rollout.slots),
    ):
        if count % pieces:
            raise ValueError(f"{key}={count} is not divisible by the mesh's data × fsdp = {pieces}")
    job = Job(
        config=c,
        cfg=cfg,
        tokenizer=tokenizer,
        train=train if c.num_steps else None,
        supervised=None if supervised is None else with_completions(supervised),
        eval_prompts=eval_prompts,
        removed=removed,
        weights={reward.name: float(w) for reward, w in zip(rewards, weights)},
        mesh=mesh,
        rules=ShardingRules() if mesh.size > 1 else None,
    )
    check_rows(job)
    return job


def reward_specs(c: ConfigDict) -> list[Any]:
    """The reward functions as plain data, for the worker processes."""
    return [as_spec(spec) for spec in c.reward.functions]


def initial_params(job: Job) -> Tree:
    """The params a run starts from: those of the Hugging Face folder, or random ones."""
    specs = transformer.param_specs(job.cfg)
    placed = shardings(specs, job.mesh, job.rules or ShardingRules())
    if job.config.model.path:
        return huggingface.load(job.config.model.path, job.cfg, dtype=jnp.float32, shardings=placed)
    key = jax.random.fold_in(jax.random.key(job.config.seed), 0)
    return jax.jit(lambda k: params_lib.init(k, specs), out_shardings=placed)(key)


def policy_params(job: Job, workdir: Path | None, step: int | None = None) -> tuple[Tree, int | None]:
    """The params to evaluate or sample from: those of a checkpoint of `workdir`; without one, a run's first.

    Returns:
      The params, and the step of their checkpoint (None = initial).

    Raises:
      CheckpointError: `workdir` has no checkpoint, or none of that step, or it is of another model.
    """
    if workdir is None:
        return initial_params(job), None
    folder = workdir / "checkpoints"
    specs = transformer.param_specs(job.cfg)
    placed = shardings(specs, job.mesh, job.rules or ShardingRules())
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params_lib.abstract(specs), placed
    )
    with Checkpoints(folder, read_only=True) as checkpoints:
        step = checkpoints.latest() if step is None else step
        state, _ = checkpoints.restore({"params": abstract}, step, partial=True)
    return state["params"], step


def make_engine(
    job: Job, params: Tree, *, slots: int, max_length: int | None = None, rules: Rules = ()
) -> Engine:
    """An engine to sample from the policy; None = the config's longest prompt and completion just fit."""
    r = job.config.rollout
    return Engine(
        prepare(params, job.cfg, job.dtype),
        job.cfg,
        slots=slots,
        max_length=max_length or job.config.data.max_prompt_length + r.max_completion_length,
        key=run_key(job, SAMPLE, 0),
        stop_ids=job.tokenizer.eos_ids,
        rules=rules,
    )


def export(job: Job, params: Tree, folder: Path) -> None:
    """Writes the policy and its tokenizer as a Hugging Face folder."""
    path = job.config.model.path
    ids = list(job.tokenizer.eos_ids)
    one = len(ids) == 1 or not job.cfg.causal  # LLaDA's and Dream's own code knows one
    known = huggingface_config.read_config(path) if path else {"eos_token_id": ids[0] if one else ids}
    huggingface.save(folder, params, job.cfg, hf_config=known)
    job.tokenizer.save(folder)


def validate(c: ConfigDict, title: str = "config") -> Job:
    """`build`, with the derived sizes of the run printed under the title.

    Raises:
      ValueError, FileNotFoundError: as `build`.
    """
    job = build(c)
    summary(describe(job), title=title)
    return job


def describe(job: Job) -> list[tuple[str, str]]:
    """Derived sizes of the run, (name, value): what it will do and need, before anything compiles."""
    c, cfg = job.config, job.cfg
    parameters = params_lib.count(transformer.param_specs(cfg))
    rows = c.rollout.prompts_per_step * c.rollout.num_generations
    length = c.data.max_prompt_length + c.rollout.max_completion_length
    micro = c.train.micro_batch_rows or rows // c.train.num_minibatches
    width = jnp.dtype(c.model.compute_dtype).itemsize
    pieces = job.mesh.shape["fsdp"] * job.mesh.shape["tensor"]
    spread = job.mesh.shape["data"] * job.mesh.shape["fsdp"]
    # params, gradients and two moments in float32; the sampler's copy in the compute dtype; a reference
    weights = parameters * (16 + width + (4 if c.loss.beta and c.num_steps else 0)) / pieces
    columns = c.rollout.prompts_per_step * c.data.max_prompt_length + rows * c.rollout.max_completion_length
    columns = c.rollout.slots * length or columns
    cache = 2 * cfg.num_layers * columns * cfg.num_kv_heads * cfg.head_dim * width / spread
    # what a backward pass keeps of a layer: about eight [T, D] and three [T, F] arrays, or its input alone
    kept = cfg.hidden_size if c.model.remat == "full" else 8 * cfg.hidden_size + 3 * cfg.intermediate_size
    activations = micro * length * cfg.num_layers * kept * width / spread
    logits = 3 * 4 * min(micro * c.rollout.max_completion_length * cfg.vocab_size, 2**24)
    need = weights + max(cache, activations + logits)
    lines = [
        (
            "model",
            f"{cfg.family}, {cfg.num_layers} layers, width {cfg.hidden_size}, vocabulary {cfg.vocab_size}",
        ),
        ("parameters", f"{parameters:,}"),
        ("devices", " × ".join(f"{name} {size}" for name, size in job.mesh.shape.items())),
    ]
    if c.supervised.num_steps:
        lines.append(
            (
                "supervised",
                f"{c.supervised.num_steps} updates × {c.supervised.batch_rows} packed rows, {job.objective}",
            )
        )
    if job.train is not None:
        updates, slots = c.train.num_iterations * c.train.num_minibatches, c.rollout.slots
        each = f"{c.rollout.num_generations} per prompt{' on average' if c.rollout.allocation else ''}"
        lines += [
            ("RL steps", f"{c.num_steps} × {updates} updates"),
            ("prompts per step", f"{c.rollout.prompts_per_step} of {len(job.train):,}"),
            ("completions per step", f"{rows} ({each}){f', {slots} at a time' if slots else ''}"),
            ("tokens per step", f"at most {rows * length:,} ({length} a row)"),
            ("rows per micro-batch", f"{micro} ({rows // c.train.num_minibatches // micro} per update)"),
        ]
    if job.eval_prompts:
        lines.append(
            (
                "held-out problems",
                f"{len(job.eval_prompts)} ({job.removed} of the same text left out of training)",
            )
        )
    lines.append(("memory per device", f"about {need / GIB:.2f} GiB"))
    return lines


def run_key(job: Job, purpose: int, step: int) -> jax.Array:
    """The random key of a purpose at a step: a pure function of the seed."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(job.config.seed), purpose), step)
