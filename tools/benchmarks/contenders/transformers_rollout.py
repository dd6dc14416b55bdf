"""transformers' `generate` on PyTorch, with its dynamic cache and no top-k.

It has no refill, so that a queue is served in batches, each up to its longest row.
"""

from collections.abc import Callable
from typing import Any

import rollout_worker
import torch
import torch_model
from rollout_worker import Completions, Wanted


class Generate:
    """See `rollout_worker.Contender`."""

    queue_rows = 64

    def __init__(self, task: dict[str, Any]) -> None:
        self.model, self.about = torch_model.load(task)

    def plan(self, wanted: Wanted) -> Callable[[], Completions]:
        torch.manual_seed(wanted.seed)

        @torch.inference_mode()
        def generate(rows: slice, new_tokens: int) -> Completions:
            prompts = torch.tensor(wanted.prompts[rows])
            output = self.model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                temperature=wanted.temperature,
                top_p=wanted.top_p,
                top_k=0,
                max_new_tokens=new_tokens,
            )
            return output[:, prompts.shape[1] :].tolist()

        return lambda: rollout_worker.in_batches(wanted, generate)


if __name__ == "__main__":
    rollout_worker.serve(Generate)
