"""How `sample` samples from a causal model: by the rollout engine."""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxrl_llm.data.prompts import Prompt
from jaxrl_llm.rollouts.engine import Completion, Request
from jaxrl_llm.rollouts.single_turn import stop_finder
from jaxrl_llm.rollouts.streaming import TextStream
from jaxrl_llm.training import job as jobs


class Autoregressive:
    """A policy. `load` it before use; completions of a prompt are numbered from a uid."""

    def __init__(self, config: ConfigDict, count: int) -> None:
        """`count`: completions per prompt. Raises what `jobs.build` does; no weights are read."""
        self._job = jobs.build(config, training=False, evaluation=False)
        self._count = count
        self.mask_id = None  # no token is kept for the model itself
        self.tokenizer = self._job.tokenizer
        self.max_prompt_length = int(config.data.max_prompt_length)

    def load(self, workdir: Path | None, step: int | None, slots: int) -> None:
        """Reads the weights. Errors are those of `jobs.policy_params`."""
        params, _ = jobs.policy_params(self._job, workdir, step)
        self._engine = jobs.make_engine(self._job, params, slots=slots)

    def columns(self, prompts: Sequence[Prompt]) -> Iterator[dict[str, Any]]:
        """What each prompt's row gets, as soon as it and those before it are done."""
        tickets = [[*map(self._engine.submit, self._requests(p, p.index * self._count))] for p in prompts]
        for own in tickets:
            while not all(ticket.future.done() for ticket in own):
                self._engine.step()
            yield self._columns([ticket.future.result() for ticket in own])
            own.clear()

    def texts(self, prompt: Prompt, uid: int) -> Iterator[tuple[str, str]]:
        """(text, error) of each completion."""
        for completion in self._engine.generate(self._requests(prompt, uid)):
            yield self.tokenizer.decode(completion.tokens.tolist()), completion.error or ""

    def show(self, prompt: Prompt, uid: int) -> None:
        """Prints the completions while they are written."""
        for request in self._requests(prompt, uid):
            asyncio.run(self._show(request))

    async def _show(self, request: Request) -> None:
        text = TextStream(self.tokenizer)
        async for piece in self._engine.stream(request):
            print(text.push(piece.tokens.tolist(), last=bool(piece.reason)), end="", flush=True)
            if piece.error:
                print(f"not sampled: {piece.error}", file=sys.stderr)
        print(flush=True)

    def _requests(self, prompt: Prompt, uid: int) -> list[Request]:
        s = self._job.settings()
        find_stop = stop_finder(self.tokenizer, s.stop_strings)
        sampling = s.temperature, s.top_p, s.top_k, s.min_p
        return [
            Request(
                prompt.ids, s.max_completion_length, *sampling, uid=(uid + i) % 2**31, find_stop=find_stop
            )
            for i in range(self._count)
        ]

    def _columns(self, completions: list[Completion]) -> dict[str, Any]:
        return {
            "completions": [self.tokenizer.decode(c.tokens.tolist()) for c in completions],
            "completion_ids": [c.tokens.tolist() for c in completions],
            "behaviour_logp": [c.behaviour_logp.tolist() for c in completions],
            "raw_logp": [c.raw_logp.tolist() for c in completions],
            "reasons": [c.reason for c in completions],
        }
