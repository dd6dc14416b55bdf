"""One completion per row: prompts in, trajectories and their texts out."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxrl_llm.data.prompts import Prompt, bucket_length, ladder, pad
from jaxrl_llm.data.tokenizers import Tokenizer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.params import Tree
from jaxrl_llm.parallel.sharding import ShardingRules
from jaxrl_llm.rollouts.engine import Engine, Request, trajectories
from jaxrl_llm.sampling.autoregressive import generate
from jaxrl_llm.sampling.logits import Sampling, sampling_params
from jaxrl_llm.trajectory import Trajectories


@dataclasses.dataclass(frozen=True)
class Settings:
    """How completions are sampled; see `sampling.logits.Sampling` for the parameters.

    Attributes:
      max_prompt_length, max_completion_length: tokens.
      num_generations: completions per prompt.
      stop_strings: texts that end a completion (and stay in it).
      slots: completions that are written side by side, each free slot taking the next; 0 = all together.
      prompt_bucket: prompts are padded to a multiple of this, times a power of two.
    """

    max_prompt_length: int
    max_completion_length: int
    num_generations: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_strings: tuple[str, ...] = ()
    slots: int = 0
    prompt_bucket: int = 64


@dataclasses.dataclass(frozen=True)
class Rollout:
    """N trajectories and what the rewards want to know of them.

    Attributes:
      trajectories: N rows.
      prompts: the prompt of each row, N.
      completions: text of each row, special tokens left out.
      completion_ids: the tokens that the policy wrote, EOS included.
    """

    trajectories: Trajectories
    prompts: list[Prompt]
    completions: list[str]
    completion_ids: list[list[int]]


def stop_finder(
    tokenizer: Tokenizer, stop_strings: Sequence[str]
) -> Callable[[np.ndarray], int | None] | None:
    """A function from token ids to how many of them to keep: up to the one that completes a stop string."""
    if not stop_strings:
        return None

    def find(ids: np.ndarray) -> int | None:
        def stopped(count: int) -> bool:
            text = tokenizer.decode(ids[:count].tolist())
            return any(stop in text for stop in stop_strings)

        if not stopped(len(ids)):
            return None
        low, high = 1, len(ids)  # the text of a prefix grows with it, so the first stop can be bisected
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if stopped(middle) else (middle + 1, high)
        return low

    return find


def rollout(
    prepared: Tree,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    settings: Settings,
    *,
    key: jax.Array,
    first_uid: int,
    policy_version: int = 0,
    counts: Sequence[int] | None = None,
    rules: ShardingRules | None = None,
) -> Rollout:
    """Samples completions of every prompt: the same tokens whatever `settings.slots` says.

    Args:
      prepared: from `sampling.autoregressive.prepare`.
      prompts: M prompts; their rows follow one another in the result, group i of prompt i.
      key, first_uid: rows are numbered from `first_uid`; a row's draws depend on key and number alone.
      policy_version: written to every token.
      counts: M numbers of completions, one per prompt; None = `settings.num_generations` each.
      rules: how rows and heads lie on the mesh in context; None = one device.

    Raises:
      ValueError: counts that differ without slots.
    """
    counts = [settings.num_generations] * len(prompts) if counts is None else counts
    rows = [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
    uids = (first_uid + np.arange(len(rows))) % 2**31
    columns = bucket_length(
        max(len(p.ids) for p in prompts),
        ladder(
            settings.max_prompt_length, multiple_of=min(settings.prompt_bucket, settings.max_prompt_length)
        ),
    )
    find_stop = stop_finder(tokenizer, settings.stop_strings)
    choices = {name: getattr(settings, name) for name in Sampling._fields}
    if settings.slots:
        # an engine for this call alone: it cannot serve what older params have read, and its cache does not
        # stand beside the activations of an update
        engine = Engine(
            prepared,
            cfg,
            slots=settings.slots,
            max_length=settings.max_prompt_length + settings.max_completion_length,
            key=key,
            stop_ids=tokenizer.eos_ids,
            version=policy_version,
            sharding=rules,
        )
        requests = [
            Request(p.ids, settings.max_completion_length, uid=int(uid), find_stop=find_stop, **choices)
            for p, uid in zip(rows, uids)
        ]
        out = trajectories(
            requests,
            engine.generate(requests),
            group=np.repeat(np.arange(len(prompts)), counts).tolist(),
            width=columns + settings.max_completion_length,
        )
    else:
        if len(set(counts)) > 1:
            raise ValueError(f"counts={list(counts)} that differ need an engine: set slots (rollout.slots)")
        tokens, lengths = pad([p.ids for p in prompts], length=columns)
        out = generate(
            prepared,
            cfg,
            tokens,
            lengths,
            num_generations=counts[0],
            max_new_tokens=settings.max_completion_length,
            sampling=sampling_params(len(rows), **choices),
            key=key,
            uids=uids,
            stop_ids=tokenizer.eos_ids,
            policy_version=policy_version,
            find_stop=find_stop,
            rules=rules,
        )
    return with_texts(out, rows, tokenizer)


def failed_rows(rollout: Rollout, settings: Settings) -> np.ndarray:
    """bool[N]: completions that the engine had to break off, because of logits that are NaN or infinite.

    They are neither at an end of their own nor as long as they may be.
    """
    written = np.array([len(ids) for ids in rollout.completion_ids])
    return ~np.asarray(rollout.trajectories.finished) & (written < settings.max_completion_length)


def with_texts(trajectories: Trajectories, prompts: list[Prompt], tokenizer: Tokenizer) -> Rollout:
    """Decodes what the policy wrote, for people and rewards."""
    host: Any = jax.device_get((trajectories.tokens, trajectories.action_mask))
    ids = [row[mask].tolist() for row, mask in zip(*host)]
    return Rollout(trajectories, prompts, [tokenizer.decode(row) for row in ids], ids)
