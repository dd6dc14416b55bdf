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
from jaxrl_llm.sampling.autoregressive import generate
from jaxrl_llm.sampling.logits import sampling_params
from jaxrl_llm.trajectory import Trajectories


@dataclasses.dataclass(frozen=True)
class Settings:
    """How completions are sampled; see `sampling.logits.Sampling` for the parameters.

    Attributes:
      max_prompt_length, max_completion_length: tokens.
      num_generations: completions per prompt.
      stop_strings: texts that end a completion (and stay in it).
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
    rules: ShardingRules | None = None,
) -> Rollout:
    """Samples `settings.num_generations` completions of every prompt.

    Args:
      prepared: from `sampling.autoregressive.prepare`.
      prompts: M prompts; row i·G + j of the result continues prompt i.
      key, first_uid: rows are numbered from `first_uid`; a row's draws depend on key and number alone.
      policy_version: written to every token.
      rules: how rows and heads lie on the mesh in context; None = one device.
    """
    rows = len(prompts) * settings.num_generations
    slots = bucket_length(
        max(len(p.ids) for p in prompts),
        ladder(
            settings.max_prompt_length, multiple_of=min(settings.prompt_bucket, settings.max_prompt_length)
        ),
    )
    tokens, lengths = pad([p.ids for p in prompts], length=slots)
    trajectories = generate(
        prepared,
        cfg,
        tokens,
        lengths,
        num_generations=settings.num_generations,
        max_new_tokens=settings.max_completion_length,
        sampling=sampling_params(
            rows,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,
        ),
        key=key,
        uids=(first_uid + np.arange(rows)) % 2**31,
        stop_ids=tokenizer.eos_ids,
        policy_version=policy_version,
        find_stop=stop_finder(tokenizer, settings.stop_strings),
        rules=rules,
    )
    return with_texts(trajectories, [p for p in prompts for _ in range(settings.num_generations)], tokenizer)


def with_texts(trajectories: Trajectories, prompts: list[Prompt], tokenizer: Tokenizer) -> Rollout:
    """Decodes what the policy wrote, for people and rewards."""
    host: Any = jax.device_get((trajectories.tokens, trajectories.action_mask))
    ids = [row[mask].tolist() for row, mask in zip(*host)]
    return Rollout(trajectories, prompts, [tokenizer.decode(row) for row in ids], ids)
