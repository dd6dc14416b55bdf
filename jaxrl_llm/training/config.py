"""Every key of a run's configuration, with its default; and the checks made before anything compiles."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from jaxrl_llm.advantages import ADVANTAGES, MODULATIONS
from jaxrl_llm.losses import (
    AGGREGATIONS,
    AUXILIARY,
    IMPORTANCE_SAMPLING_CORRECTIONS,
    KL_ESTIMATORS,
    PRESETS,
    RATIOS,
    SURROGATES,
    Objective,
    policy_objective,
)
from jaxrl_llm.models.config import FEATURES
from jaxrl_llm.models.transformer import REMAT
from jaxrl_llm.rollouts import schedules

OBJECTIVES = ("next_token", "diffusion_pretraining", "diffusion_finetuning")
"""What supervised training learns: completions from what stands before each token; of a masked-diffusion LM
any masked tokens of a row (the mean over tokens), or those of completions alone (over examples, as LLaDA)."""


def source() -> ConfigDict:
    """Where rows come from; see `data.open_source`. An empty kind means: none."""
    return ConfigDict(
        {
            "kind": "",  # reasoning_gym, jsonl, parquet, tfds
            "path": "",  # file, pattern, or tfds data_dir
            "name": "",  # task or tfds name
            "split": "",  # of tfds
            "size": 0,  # rows; 0 = all there are
            "seed": 0,  # of reasoning_gym
            "options": ConfigDict(),  # a task's own config, or columns and form of a file
        }
    )


def default() -> ConfigDict:
    """The defaults. A config file starts from this, and may set none but these keys."""
    c = ConfigDict()
    c.seed = 0
    c.num_steps = 200  # policy updates by RL; 0 = supervised training alone

    c.model = ConfigDict()
    c.model.path = ""  # a Hugging Face folder; empty = random weights of the sizes below
    c.model.family = "qwen3"  # of models.config.FEATURES; llada and Dream are masked-diffusion LMs
    c.model.vocab_size = 0  # 0 = as the tokenizer needs
    c.model.hidden_size = 128
    c.model.num_layers = 2
    c.model.num_heads = 4
    c.model.num_kv_heads = 2
    c.model.head_dim = 32
    c.model.intermediate_size = 384
    c.model.causal = config_dict.placeholder(bool)  # None = as the family is; False = masked diffusion
    c.model.mask_id = config_dict.placeholder(int)  # of masked diffusion; None = after the tokenizer's ids
    c.model.logits_shift = config_dict.placeholder(int)  # of masked diffusion; None = the family's: Dream 1
    c.model.compute_dtype = "float32"  # or bfloat16; params and sums stay float32
    c.model.remat = "dots"  # none, dots, full: what the backward pass recomputes

    c.tokenizer = ConfigDict()
    c.tokenizer.kind = "folder"  # folder, sentencepiece, bytes, characters
    c.tokenizer.path = ""  # empty = model.path
    c.tokenizer.alphabet = ""  # of characters

    c.data = ConfigDict()
    c.data.train = source()
    c.data.max_prompt_length = 512  # tokens
    c.data.overlong_prompts = "drop"  # or error

    c.rollout = ConfigDict()
    c.rollout.prompts_per_step = 16
    c.rollout.num_generations = 8
    c.rollout.max_completion_length = 256  # tokens
    c.rollout.temperature = 1.0
    c.rollout.top_p = 1.0
    c.rollout.top_k = 0  # 0 = off
    c.rollout.min_p = 0.0
    c.rollout.stop_strings = ()
    c.rollout.mask_truncated_completions = False
    c.rollout.slots = 0  # completions side by side, a free slot taking the next; 0 = whole batches together
    c.rollout.allocation = ""  # of schedules.ALLOCATIONS: completions by prompt; empty = as many each
    c.rollout.allocation_options = ConfigDict()  # low, high, and further keywords of the rule
    c.rollout.success_at = 1.0  # total reward from which a completion counts as a success there
    c.rollout.max_attempts = 1  # dynamic sampling: batches drawn to fill a step with groups that differ
    c.rollout.on_degenerate = "train"  # when they do not suffice: train on what there is, skip, or fail

    c.reward = ConfigDict()
    c.reward.functions = ()  # names, dotted paths, file.py:function, or dicts with path and options
    c.reward.weights = ()  # empty = 1 each
    c.reward.timeout = 60.0  # seconds for all rewards of a step
    c.reward.workers = 2  # processes
    c.reward.memory_gib = 4.0  # per process

    c.advantage = ConfigDict()
    c.advantage.name = "group"  # of advantages.ADVANTAGES, or a dotted path
    c.advantage.scale_rewards = "group"  # group, batch, none
    c.advantage.epsilon = 1e-6
    c.advantage.options = ConfigDict()  # further keywords of the function
    c.advantage.modulation = ""  # of advantages.MODULATIONS: DynaMO's token factors; empty = none

    c.loss = ConfigDict()
    c.loss.surrogate = "ppo_clip"  # of losses.SURROGATES, or a dotted path
    c.loss.epsilon = config_dict.placeholder(float)  # None = the surrogate's own: 0.2 of ppo_clip
    c.loss.epsilon_high = config_dict.placeholder(float)  # None = epsilon; without epsilon its own too
    c.loss.delta = config_dict.placeholder(float)  # dual clip; None = off
    c.loss.options = ConfigDict()  # further keywords of the surrogate
    c.loss.ratio = ""  # of losses.RATIOS, or a dotted path; empty = the surrogate's own
    c.loss.ratio_options = ConfigDict()
    c.loss.beta = 0.0  # weight of the KL to the reference model; 0 = no reference model
    c.loss.kl_estimator = "k3"
    c.loss.kl_options = ConfigDict()
    c.loss.entropy_coef = 0.0
    c.loss.auxiliary = ConfigDict()  # coefficients of further losses, of losses.AUXILIARY or dotted paths
    c.loss.loss_aggregation = "token_mean"
    c.loss.count_empty = False  # whether rows without a token count in means over rows
    c.loss.importance_sampling_correction = "none"
    c.loss.importance_sampling_cap = 2.0
    c.loss.importance_sampling_floor = 0.0

    c.train = ConfigDict()
    c.train.num_iterations = 1  # passes over a batch of rollouts
    c.train.num_minibatches = 1  # policy updates per pass
    c.train.micro_batch_rows = 0  # rows per gradient accumulation step; 0 = all of a minibatch
    c.train.max_nonfinite_steps = 5  # in a row; then the run stops

    c.optimizer = optimizer(learning_rate=1e-6)

    c.supervised = ConfigDict()  # training on (prompt, completion) rows before RL, or instead of it
    c.supervised.num_steps = 0
    c.supervised.batch_rows = 64
    c.supervised.max_length = 0  # tokens; 0 = max_prompt_length + max_completion_length
    c.supervised.completion_length = 0  # tokens that EOS fills up, of masked-diffusion fine-tuning; 0 = none
    c.supervised.objective = ""  # of OBJECTIVES; empty = next_token, of a masked-diffusion LM its fine-tuning
    c.supervised.train = source()  # empty kind = data.train, with `answer` for a missing completion
    c.supervised.optimizer = optimizer(learning_rate=1e-3)

    c.eval = ConfigDict()
    c.eval.data = source()
    c.eval.every = 0  # steps between evaluations; 0 = at the start and the end of RL alone
    c.eval.num_generations = 1
    c.eval.temperature = 1.0
    c.eval.top_p = 1.0
    c.eval.batch_prompts = 128
    c.eval.correct_at = 1.0  # a total reward of at least this counts as solved

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 100  # steps
    c.checkpoint.keep_last = 2
    c.checkpoint.keep_best = 1
    c.checkpoint.export = True  # write workdir/export as a Hugging Face folder at the end

    c.log = ConfigDict()
    c.log.every = 1  # steps between rows of metrics
    c.log.completions_every = 50  # steps between completions_<step>.parquet; 0 = never
    c.log.plots = True

    c.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})  # -1 = the devices left
    return c


def optimizer(learning_rate: float) -> ConfigDict:
    """Keys of an optimizer and its schedule."""
    return ConfigDict(
        {
            "name": "adamw",  # adamw, lion, sgd
            "learning_rate": learning_rate,
            "schedule": "constant",  # constant, linear, cosine: to final_fraction over the stage
            "warmup_steps": 0,
            "final_fraction": 0.0,
            "b1": 0.9,
            "b2": 0.999,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
        }
    )


def nearest(word: str, words: Any) -> str:
    """'; did you mean 'x'?', or nothing."""
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def lookup(name: str, table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """A function by its name in `table`, or by the dotted path of the user's own.

    Raises:
      ValueError: neither, with the nearest name.
    """
    if name in table:
        return table[name]
    module, _, attribute = name.rpartition(".")
    if module:
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{name!r} cannot be imported: {error}") from error
    raise ValueError(f"unknown name {name!r}; one of {', '.join(table)}{nearest(name, table)}")


def accepted(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that `function` has a keyword for."""
    names = inspect.signature(function).parameters
    return {key: value for key, value in options.items() if key in names}


def use_preset(c: ConfigDict, preset: str, method: str) -> None:
    """Sets `c.loss` and `c.advantage` to what another library, or the paper, does (`losses.PRESETS`).

    Example:
      >>> c = default()
      >>> use_preset(c, "verl-0.9", "gspo")
      >>> c.loss.surrogate, c.loss.ratio, c.loss.loss_aggregation
      ('ppo_clip', 'sequence_token', 'token_mean')

    Raises:
      ValueError: an unknown preset or method, or one that takes more than a config can say.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; one of {', '.join(PRESETS)}{nearest(preset, PRESETS)}")
    methods = PRESETS[preset]
    if method not in methods:
        known = ", ".join(methods) + nearest(method, methods)
        raise ValueError(f"preset {preset!r} has no method {method!r}; one of {known}")
    objective, advantage = methods[method]["objective"], dict(methods[method]["advantage"])
    name = advantage.pop("name")
    if not isinstance(objective["surrogate"], str) or name not in ADVANTAGES:
        raise ValueError(
            f"{method!r} of {preset!r} needs arrays that this training loop does not make: call "
            f"losses.policy_objective(**losses.PRESETS[{preset!r}][{method!r}]['objective']) yourself"
        )
    c.loss.surrogate = objective["surrogate"]
    c.loss.options = ConfigDict(objective["surrogate_options"])
    c.loss.ratio = objective.get("ratio", "")
    c.loss.ratio_options = ConfigDict(objective.get("ratio_options", {}))
    for estimator, coefficient in objective.get("auxiliary", {}).items():  # one at most
        c.loss.kl_estimator, c.loss.beta = estimator, coefficient
        c.loss.kl_options = ConfigDict(objective.get("auxiliary_options", {}).get(estimator, {}))
    c.loss.loss_aggregation = objective["aggregation"]
    c.loss.count_empty = objective.get("count_empty", False)
    c.advantage.name = name
    c.advantage.scale_rewards = advantage.pop("scale", "group")
    c.advantage.epsilon = advantage.pop("epsilon", c.advantage.epsilon)
    c.advantage.options = ConfigDict(advantage)


def make_objective(c: ConfigDict) -> Objective:
    """The policy objective that the config describes.

    Raises:
      ValueError: a name, an option or a combination that does not exist.
    """
    surrogate = lookup(c.loss.surrogate, SURROGATES)
    options = {"delta": c.loss.delta, "epsilon_high": c.loss.epsilon_high, "epsilon": c.loss.epsilon}
    options = {name: value for name, value in options.items() if value is not None}
    if "epsilon" in options:  # what the surrogate has for its upper bound belongs to its own lower bound
        options.setdefault("epsilon_high", None)
    correction = c.loss.importance_sampling_correction
    limits = {"cap": c.loss.importance_sampling_cap, "floor": c.loss.importance_sampling_floor}
    auxiliary = {"entropy": c.loss.entropy_coef, c.loss.kl_estimator: c.loss.beta}
    return policy_objective(
        surrogate=surrogate,
        surrogate_options=accepted(surrogate, options) | c.loss.options.to_dict(),
        ratio=lookup(c.loss.ratio, RATIOS) if c.loss.ratio else None,
        ratio_options=c.loss.ratio_options.to_dict(),
        correction=correction,
        correction_options=limits if correction != "none" else {},
        auxiliary=auxiliary | {lookup(k, AUXILIARY): v for k, v in c.loss.auxiliary.items()},
        auxiliary_options={c.loss.kl_estimator: c.loss.kl_options.to_dict()},
        aggregation=c.loss.loss_aggregation,
        norm=c.rollout.max_completion_length,
        count_empty=c.loss.count_empty,
    )


def allocate(c: ConfigDict, successes: Any, trials: Any) -> Any:
    """How many completions each of M prompts gets: as many as prompts × `num_generations` in all.

    Args:
      successes, trials: i[M] so far.

    Raises:
      ValueError: what the rule or its bounds do not allow.
    """
    total = c.rollout.num_generations * len(trials)
    options = c.rollout.allocation_options.to_dict()
    return schedules.allocate(successes, trials, total, rule=c.rollout.allocation, **options)


def _one_of(errors: list[str], key: str, value: str, choices: Any) -> None:
    if value not in choices:
        errors.append(f"{key}={value!r}: one of {', '.join(choices)}{nearest(value, choices)}")


def _allocation_errors(c: ConfigDict) -> list[str]:
    errors = []
    if not c.rollout.slots:
        errors.append("rollout.allocation makes groups of several sizes, which takes rollout.slots: set it")
    if c.rollout.max_attempts > 1:
        errors.append(
            "rollout.allocation fixes the completions of a step, and rollout.max_attempts draws more: "
            "set one of the two"
        )
    none = [0] * c.rollout.prompts_per_step
    try:
        allocate(c, none, none)
    except (TypeError, ValueError) as error:
        errors.append(f"rollout.allocation={c.rollout.allocation!r}: {error}")
    return errors


def check(c: ConfigDict) -> None:
    """Everything that can be wrong with a config by itself, all of it at once.

    Raises:
      ValueError: one line per mistake, each with the key, its value and what would be right.
    """
    errors: list[str] = []
    for key, choices in (
        ("loss.loss_aggregation", AGGREGATIONS),
        ("loss.importance_sampling_correction", IMPORTANCE_SAMPLING_CORRECTIONS),
        ("loss.kl_estimator", KL_ESTIMATORS),
        ("advantage.scale_rewards", ("group", "batch", "none")),
        ("advantage.modulation", ("", *MODULATIONS)),
        ("rollout.on_degenerate", ("train", "skip", "fail")),
        ("rollout.allocation", ("", *schedules.ALLOCATIONS)),
        ("data.overlong_prompts", ("drop", "error")),
        ("supervised.objective", ("", *OBJECTIVES)),
        ("model.family", FEATURES),
        ("model.remat", REMAT),
        ("model.compute_dtype", ("float32", "bfloat16")),
    ):
        _one_of(errors, key, _get(c, key), choices)
    for key in ("optimizer", "supervised.optimizer"):
        group = _get(c, key)
        _one_of(errors, f"{key}.name", group.name, ("adamw", "lion", "sgd"))
        _one_of(errors, f"{key}.schedule", group.schedule, ("constant", "linear", "cosine"))
    for key, least in (
        ("rollout.prompts_per_step", 1),
        ("rollout.num_generations", 1),
        ("rollout.max_completion_length", 1),
        ("rollout.max_attempts", 1),
        ("rollout.slots", 0),
        ("data.max_prompt_length", 1),
        ("train.num_iterations", 1),
        ("train.num_minibatches", 1),
        ("train.micro_batch_rows", 0),
        ("train.max_nonfinite_steps", 1),
        ("num_steps", 0),
        ("supervised.num_steps", 0),
        ("supervised.batch_rows", 1),
        ("supervised.max_length", 0),
        ("supervised.completion_length", 0),
        ("eval.num_generations", 1),
        ("eval.batch_prompts", 1),
        ("checkpoint.every", 1),
        ("checkpoint.keep_last", 1),
        ("checkpoint.keep_best", 0),
        ("log.every", 1),
        ("log.completions_every", 0),
        ("seed", 0),
        ("rollout.top_k", 0),
        ("eval.every", 0),
        ("eval.temperature", 0),
        ("reward.workers", 1),
        ("optimizer.learning_rate", 0),
        ("optimizer.warmup_steps", 0),
        ("supervised.optimizer.learning_rate", 0),
        ("supervised.optimizer.warmup_steps", 0),
    ):
        if _get(c, key) < least:
            errors.append(f"{key}={_get(c, key)}: at least {least}")
    for key in (
        "reward.timeout",
        "reward.memory_gib",
        "optimizer.max_grad_norm",
        "supervised.optimizer.max_grad_norm",
    ):
        if not _get(c, key) > 0:
            errors.append(f"{key}={_get(c, key)}: above 0")
    for key in ("rollout.top_p", "eval.top_p"):
        if not 0 < _get(c, key) <= 1:
            errors.append(f"{key}={_get(c, key)}: above 0 and at most 1 (1 = off)")
    if not 0 <= c.rollout.min_p < 1:
        errors.append(f"rollout.min_p={c.rollout.min_p}: at least 0 (off) and below 1")
    for key, build in (
        ("loss", lambda: errors or make_objective(c)),
        ("advantage.name", lambda: lookup(c.advantage.name, ADVANTAGES)),
    ):
        try:
            build()
        except ValueError as error:
            errors.append(f"{key}: {error}")
    if c.rollout.allocation in schedules.ALLOCATIONS:
        errors += _allocation_errors(c)
    if c.rollout.temperature <= 0 and c.num_steps:
        errors.append(f"rollout.temperature={c.rollout.temperature}: above 0, or there is nothing to learn")
    if c.loss.delta is not None and c.loss.delta <= 1:
        errors.append(f"loss.delta={c.loss.delta}: the dual clip bounds the ratio, above 1")
    if c.reward.weights and len(c.reward.weights) != len(c.reward.functions):
        errors.append(
            f"reward.weights has {len(c.reward.weights)} entries for {len(c.reward.functions)} functions"
        )
    if c.num_steps and not c.reward.functions:
        errors.append("reward.functions is empty: RL needs a reward, for instance ('exact_match',)")
    if not c.num_steps and not c.supervised.num_steps:
        errors.append("num_steps=0 and supervised.num_steps=0: nothing to do")
    if c.num_steps and not c.data.train.kind:
        errors.append("data.train.kind is empty: one of reasoning_gym, jsonl, parquet, tfds")
    rows = c.rollout.prompts_per_step * c.rollout.num_generations
    if rows < 1 or c.train.num_minibatches < 1 or c.train.micro_batch_rows < 0:
        pass  # said above
    elif rows % c.train.num_minibatches:
        errors.append(f"train.num_minibatches={c.train.num_minibatches} does not divide {rows} completions")
    else:
        micro = c.train.micro_batch_rows or rows // c.train.num_minibatches
        if (rows // c.train.num_minibatches) % micro:
            errors.append(
                f"train.micro_batch_rows={micro} does not divide the "
                f"{rows // c.train.num_minibatches} rows of a minibatch"
            )
    if not c.tokenizer.path and not c.model.path and c.tokenizer.kind in ("folder", "sentencepiece"):
        errors.append(
            f"tokenizer.kind={c.tokenizer.kind!r} needs tokenizer.path or model.path; without files, take "
            "tokenizer.kind='bytes', or 'characters' with tokenizer.alphabet"
        )
    if errors:
        raise ValueError("the config has mistakes:\n  " + "\n  ".join(errors))


def _get(c: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        c = c[part]
    return c
