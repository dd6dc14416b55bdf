"""transformers' continuous batching on PyTorch: rows that are complete are replaced from the queue.

Scaled-dot-product attention over a paged cache (on a CPU it has no compiled or graphed path), as many pages
as the rows in flight fill, no shared pages where all prompts differ. One manager per kind of request, whose
thread waits between rounds. A group is one request with `num_return_sequences`: its prompt is read once.
"""

from collections.abc import Callable
from typing import Any

import rollout_worker
import torch_model
import transformers
from rollout_worker import Completions, Wanted
from transformers.generation.continuous_batching import ContinuousBatchingManager

PAGE = 32
"""Tokens of a page."""
BATCH_TOKENS = 1024
"""Most tokens that go through the model at once; prompts come in such pieces."""


class Continuous:
    """See `rollout_worker.Contender`."""

    queue_rows = 16

    def __init__(self, task: dict[str, Any]) -> None:
        self.model, self.about = torch_model.load(task)
        self.managers: dict[tuple[Any, ...], ContinuousBatchingManager] = {}

    def manager(self, wanted: Wanted) -> ContinuousBatchingManager:
        """The one for such requests, running."""
        kind = (wanted.rows, wanted.room, wanted.num_generations, wanted.temperature, wanted.top_p)
        if kind not in self.managers:
            draws = transformers.GenerationConfig(
                do_sample=True,
                temperature=wanted.temperature,
                top_p=wanted.top_p,
                top_k=0,
                num_return_sequences=wanted.num_generations,
                eos_token_id=-1,
            )
            pages = wanted.rows * (-(-wanted.room // PAGE) + 1)
            config = transformers.ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=pages,
                max_batch_tokens=BATCH_TOKENS,
                max_requests_per_batch=wanted.rows,
                allow_block_sharing=wanted.num_generations > 1,
                auto_switch_to_flash=False,
                seed=wanted.seed,
            )
            self.managers[kind] = self.model.init_continuous_batching(draws, config)
            self.managers[kind].start()
        return self.managers[kind]

    def plan(self, wanted: Wanted) -> Callable[[], Completions]:
        manager, count = self.manager(wanted), wanted.num_generations

        def call() -> Completions:
            names: list[str] = []
            for row in range(0, len(wanted.prompts), count):
                name = manager.add_request(wanted.prompts[row], max_new_tokens=wanted.new_tokens[row])
                names += [name, *(f"{name}__child#{child}" for child in range(count - 1))]
            done: dict[str, list[int]] = {}
            while len(done) < len(names):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("the manager's thread has ended; its log says why")
                if result is not None and result.is_finished():
                    done[result.request_id] = result.generated_tokens
            return [done[name] for name in names]

        return call


if __name__ == "__main__":
    rollout_worker.serve(Continuous)
