"""google-tunix's vanilla `Sampler`, called as its users call it: strings in, tokens and text out.

It has no refill, so that a queue is served in batches, each up to its longest row. One sampler per length of
the cache. A completion's greatest length is part of its compiled shape; the lengths of a queue are the same
in every round, so that all are compiled before the clock starts. It returns no log-probs here (its default).
"""

from collections.abc import Callable
from typing import Any

import rollout_worker
import tunix_model
import worker
from rollout_worker import Completions, Wanted
from tunix.generate.sampler import CacheConfig, Sampler


class Tunix:
    """See `rollout_worker.Contender`."""

    queue_rows = 64

    def __init__(self, task: dict[str, Any]) -> None:
        self.config, self.tokenizer = task["config"], worker.Numbers(task["config"]["vocab_size"])
        self.model = tunix_model.load(task)
        self.about = {
            "versions": worker.versions("google-tunix", "jax", "flax"),
            "logits": tunix_model.last_logits(self.model, task["prompts"]),
        }
        self.samplers: dict[int, Sampler] = {}

    def sampler(self, cache_size: int) -> Sampler:
        """The one of that length."""
        if cache_size not in self.samplers:
            cache = CacheConfig(
                cache_size=cache_size,
                num_layers=self.config["num_hidden_layers"],
                num_kv_heads=self.config["num_key_value_heads"],
                head_dim=self.config["head_dim"],
            )
            self.samplers[cache_size] = Sampler(self.model, self.tokenizer, cache)
        return self.samplers[cache_size]

    def plan(self, wanted: Wanted) -> Callable[[], Completions]:
        sampler = self.sampler(wanted.room)
        texts = [self.tokenizer.decode(prompt) for prompt in wanted.prompts]

        def generate(rows: slice, new_tokens: int) -> Completions:
            return sampler(
                texts[rows],
                max_generation_steps=new_tokens,
                max_prompt_length=len(wanted.prompts[0]),
                temperature=wanted.temperature,
                top_p=wanted.top_p,
                seed=wanted.seed,
            ).tokens

        return lambda: rollout_worker.in_batches(wanted, generate)


if __name__ == "__main__":
    rollout_worker.serve(Tunix)
