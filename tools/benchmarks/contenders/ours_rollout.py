"""jaxrl_llm's engine: requests in, completions with their log-probs out, on the host.

One engine per number of slots and length, kept between rounds as in training; a row of a queue takes the
place of one that is complete. Keys and values are in float32 beside weights in bfloat16 too, which a CPU
computes in float32 anyway; nothing else of its defaults is changed.
"""

import collections
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import ours_model
import rollout_worker
import worker
from rollout_worker import Completions, Wanted

from jaxrl_llm.rollouts.engine import Engine, Request
from jaxrl_llm.sampling.autoregressive import prepare

TRACED = "/jax/core/compile/jaxpr_trace_duration"
COMPILED = "/jax/core/compile/backend_compile_duration"


class Ours:
    """See `rollout_worker.Contender`."""

    queue_rows = 32

    def __init__(self, task: dict[str, Any]) -> None:
        params, self.cfg = ours_model.load(task)
        logits = ours_model.last_logits(params, self.cfg, task["prompts"])
        self.prepared = jax.block_until_ready(prepare(params, self.cfg, jnp.dtype(task["dtype"])))
        self.about = {"versions": worker.versions("jax"), "logits": logits}
        self.engines: dict[tuple[int, int], Engine] = {}

    def engine(self, slots: int, max_length: int) -> Engine:
        """The one of that size."""
        if (slots, max_length) not in self.engines:
            self.engines[slots, max_length] = Engine(
                self.prepared,
                self.cfg,
                slots=slots,
                max_length=max_length,
                key=jax.random.key(0),
                kv_dtype=jnp.float32,
            )
        return self.engines[slots, max_length]

    def plan(self, wanted: Wanted) -> Callable[[], Completions]:
        engine = self.engine(wanted.rows, wanted.room)
        requests = [
            Request(prompt, n, temperature=wanted.temperature, top_p=wanted.top_p)
            for prompt, n in zip(wanted.prompts, wanted.new_tokens)
        ]
        return lambda: [completion.tokens for completion in engine.generate(requests)]

    def retraces(self, requests: int, slots: int, most: int) -> dict[str, Any]:
        """What is traced and compiled while mixed requests are served by an engine that is warm.

        Args:
          requests: how many are served.
          slots, most: of the engine, its slots and the most tokens of a prompt, and of a completion.
        """
        engine = self.engine(slots, 2 * most)
        engine.warm_up()
        wanted = mixed_requests(requests, most, self.cfg.vocab_size)
        events: collections.Counter[str] = collections.Counter()

        def count(event: str, seconds: float, **_: Any) -> None:
            events[event] += 1

        jax.monitoring.register_event_duration_secs_listener(count)
        start = time.perf_counter()
        completions = engine.generate(wanted)
        seconds = time.perf_counter() - start
        served, reasons = dict(events), collections.Counter(c.reason for c in completions)
        jax.jit(lambda x: x + requests)(np.float32(0))  # a listener that hears nothing would prove nothing
        if not events[TRACED] > served.get(TRACED, 0) or not events[COMPILED] > served.get(COMPILED, 0):
            raise RuntimeError(f"JAX {jax.__version__} reports no {TRACED} or no {COMPILED}")
        return {
            "traced": served.get(TRACED, 0),
            "compiled": served.get(COMPILED, 0),
            "requests": len(completions),
            "tokens": sum(len(c.tokens) for c in completions),
            "reasons": dict(reasons),
            "seconds": seconds,
        }


def mixed_requests(count: int, most: int, vocab_size: int) -> list[Request]:
    """Prompts and completions of 1 to `most` tokens, mostly short, and parameters of every kind."""
    rng = np.random.default_rng(0)

    def length() -> int:
        return int(most ** rng.random())

    return [
        Request(
            rng.integers(0, vocab_size, length()),
            length(),
            temperature=float(rng.choice([0.0, 0.7, 1.0, 1.3])),
            top_p=float(rng.choice([0.8, 0.95, 1.0])),
            top_k=int(rng.choice([0, 0, 50])),
            min_p=float(rng.choice([0.0, 0.0, 0.05])),
        )
        for _ in range(count)
    ]


if __name__ == "__main__":
    rollout_worker.serve(Ours)
