"""jaxrl_llm's training loop, one step per request.

The loop owns itself, so the data set paces it, as with google-tunix: asking for the first prompt of a step is
where the step before it has ended and where the next request is awaited. Timed is everything between two such
points: rollout, rewards in their worker processes, advantages, loss, gradient, optimizer, metrics fetched and
written to metrics.jsonl and TensorBoard, and the params prepared for the next rollout. No checkpoint but the
first. The stages are the loop's own `timing/` metrics.
"""

import contextlib
import json
import pathlib
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import jax
import ours_model
import worker

from jaxrl_llm.data.sources import Source
from jaxrl_llm.models.huggingface_config import config_from_folder
from jaxrl_llm.parallel.sharding import make_mesh
from jaxrl_llm.training import config as defaults
from jaxrl_llm.training import loop
from jaxrl_llm.training.job import Job, initial_params

STAGES = ("rollout", "update")


class Numbers:
    """`worker.Numbers` with our names. No id ends a completion."""

    pad_id = 0
    eos_ids: tuple[int, ...] = ()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._numbers = worker.Numbers(vocab_size)

    def encode_prompt(self, prompt: str) -> list[int]:
        return self._numbers.encode(prompt)

    def decode(self, ids: Iterable[int]) -> str:
        return self._numbers.decode(list(ids))


class Done(Exception):
    """The driver wants no more steps."""


class Prompts:
    """Rows of which the first of each step closes the step before, reports it, and waits for a request."""

    def __init__(self, channel: worker.Channel, task: dict[str, Any], metrics: pathlib.Path) -> None:
        self._channel, self._task, self._metrics = channel, task, metrics
        self._rows: list[str] = []
        self._start: float | None = None
        self._decode = worker.Numbers(task["config"]["vocab_size"]).decode

    def read(self, index: int) -> dict[str, str]:
        """The next prompt of the request, whatever the index."""
        if not self._rows:
            self._report()
            request = self._channel.receive()
            if request is None:
                raise Done
            self._start = time.perf_counter()
            self._rows = [self._decode(prompt) for prompt in request["prompts"]]
        return {"prompt": self._rows.pop(0)}

    def _report(self) -> None:
        if self._start is None:
            return
        seconds = time.perf_counter() - self._start
        last = json.loads(self._metrics.read_text().splitlines()[-1])
        tokens = (
            last["completions/mean_length"] * self._task["prompts_per_step"] * self._task["num_generations"]
        )
        parts = {stage: last[f"timing/{stage}"] for stage in STAGES}
        self._channel.send({"seconds": seconds, "tokens": round(tokens), "parts": parts})


def main() -> None:
    channel, task = worker.Channel(), worker.task()
    c = defaults.default()
    c.model.path = task["model"]
    c.num_steps = 1_000_000
    c.data.max_prompt_length = task["prompt_length"]
    c.rollout.prompts_per_step = task["prompts_per_step"]
    c.rollout.num_generations = task["num_generations"]
    c.rollout.max_completion_length = task["new_tokens"]
    c.rollout.temperature, c.rollout.top_p = task["temperature"], task["top_p"]
    c.reward.functions = (f"{pathlib.Path(worker.__file__).resolve()}:even_share",)
    c.train.micro_batch_rows = task["num_generations"]  # a group at a time: what is in flight fits the cache
    c.optimizer.learning_rate = task["learning_rate"]
    c.checkpoint.every, c.checkpoint.export = 1_000_000, False
    c.log.completions_every, c.log.plots = 0, False
    with tempfile.TemporaryDirectory() as workdir:
        rows = Prompts(channel, task, pathlib.Path(workdir) / "metrics.jsonl")
        job = Job(
            config=c,
            cfg=config_from_folder(task["model"]),
            tokenizer=Numbers(task["config"]["vocab_size"]),
            train=Source(10_000, rows.read, ("prompt",)),
            supervised=None,
            eval_prompts=[],
            removed=0,
            weights={"even_share": 1.0},
            mesh=make_mesh(devices=jax.devices()[:1]),
            rules=None,
        )
        logits = ours_model.last_logits(initial_params(job), job.cfg, task["prompts"])
        channel.send({"versions": worker.versions("jax", "optax"), "logits": logits})
        with contextlib.suppress(Done):
            loop.run(job, pathlib.Path(workdir))


if __name__ == "__main__":
    main()
