"""jaxrl_llm's decoder of masked diffusion models: token ids in; tokens and their trace out, on the host.

Besides the timed calls it answers {"call": "retraces"} and {"call": "operations"}.
"""

import collections
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import ours_model
import worker
from ours_rollout import COMPILED, TRACED

from jaxrl_llm.models.denoiser import denoise, prepare
from jaxrl_llm.sampling.diffusion import decode
from jaxrl_llm.sampling.diffusion_options import Method, settings
from jaxrl_llm.sampling.diffusion_state import Decoded, of_model

Array = jax.Array

EVERYTHING = {"guidance": "high_information", "accelerate": True, "block_size": 16, "commit": "threshold"}
VALUES = {
    "temperature": (0.0, 0.7),
    "guidance_weight": (0.5, 1.5),
    "threshold": (0.1, 0.05),
    "window": (16, 3),
}
"""A method that reads all of these numbers, and two values of each, which must share its program."""


class Ours:
    """The model, and all that a user waits for when decoding with it."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.size, self.steps = task["new_tokens"], task["steps"]
        params, self.cfg = ours_model.load(task)
        self.params = jax.block_until_ready(prepare(params, self.cfg))
        self.denoiser = of_model(self.cfg)

    def first_logits(self, prompts: list[list[int]]) -> list[float]:
        """f32[V] of the first prompt's first masked position."""
        canvas = jnp.array([prompts[0] + [self.cfg.mask_id] * self.size])
        column = jnp.array([[len(prompts[0])]])
        return np.asarray(denoise(self.params, canvas, self.cfg, columns=column))[0, 0].tolist()

    def decode(self, prompts: list[list[int]], structure: dict[str, Any], **values: Any) -> Decoded:
        """Greedy unless `values` says otherwise; `structure` are fields of `Method`."""
        batch, method = len(prompts), Method(self.size, **structure)
        numbers = settings(method, batch, **{"steps": self.steps} | values)
        tokens, lengths = jnp.asarray(prompts, jnp.int32), jnp.full(batch, len(prompts[0]), jnp.int32)
        uids = jnp.arange(batch, dtype=jnp.int32)
        out = decode(
            self.denoiser, self.params, tokens, lengths, method, numbers, key=jax.random.key(0), uids=uids
        )
        return jax.device_get(out)

    def retraces(self, prompts: list[list[int]]) -> dict[str, Any]:
        """What is traced and compiled for new values of the numbers of `VALUES`, one after the other."""
        first = {name: pair[0] for name, pair in VALUES.items()}
        self.decode(prompts, EVERYTHING, **first)
        events: collections.Counter[str] = collections.Counter()

        def count(event: str, duration_secs: float, **_: Any) -> None:
            events[event] += 1

        jax.monitoring.register_event_duration_secs_listener(count)
        for name, (_, other) in VALUES.items():
            self.decode(prompts, EVERYTHING, **first | {name: other})
        seen = dict(events)
        jax.jit(lambda x: x + 1)(np.float32(0))  # a listener that hears nothing would prove nothing
        if not events[TRACED] > seen.get(TRACED, 0) or not events[COMPILED] > seen.get(COMPILED, 0):
            raise RuntimeError(f"JAX {jax.__version__} reports no {TRACED} or no {COMPILED}")
        return {
            "values": len(VALUES),
            "traced": seen.get(TRACED, 0),
            "compiled": seen.get(COMPILED, 0),
        }

    def operations(self, prompts: list[list[int]], block_size: int) -> dict[str, float]:
        """Floating-point operations of all forward passes of one response: cache -> count.

        Each kind of pass is counted once by the compiler, and multiplied by how many a decode made.
        """
        length = len(prompts[0]) + self.size
        block = jnp.arange(block_size)[None]

        def whole(tokens: Array) -> Array:
            hidden = self.denoiser.states(self.params, tokens, jnp.array([length]), len(prompts[0]) + block)
            return self.denoiser.head(self.params, hidden)

        def window(tokens: Array, cache: Any) -> Array:
            start, lengths = jnp.array([len(prompts[0])]), jnp.array([length])
            assert self.denoiser.window is not None
            hidden, _ = self.denoiser.window(self.params, tokens, start, lengths, block, cache)
            return self.denoiser.head(self.params, hidden)

        shape = (1, length, self.cfg.num_kv_heads, self.cfg.head_dim)
        cache = ((jax.ShapeDtypeStruct(shape, jnp.float32),) * 2,) * self.cfg.num_layers

        def flops(function: Any, width: int, *rest: Any) -> float:
            tokens = jax.ShapeDtypeStruct((1, width), jnp.int32)
            counted = jax.jit(function).lower(tokens, *rest).cost_analysis()
            assert counted is not None
            return counted["flops"]

        every, some = flops(whole, length), flops(window, block_size, cache)
        rounds = {
            name: int(self.decode(prompts[:1], {"block_size": block_size, "cache": name}).steps[0])
            for name in ("none", "dual")
        }
        blocks = self.size // block_size
        return {"none": rounds["none"] * every, "dual": blocks * every + (rounds["dual"] - blocks) * some}


def main() -> None:
    channel, task = worker.Channel(), worker.task()
    ours = Ours(task)
    channel.send({"versions": worker.versions("jax"), "logits": ours.first_logits(task["prompts"])})
    while (request := channel.receive()) is not None:
        call, prompts = request.get("call", "decode"), request["prompts"]
        if call == "retraces":
            channel.send(ours.retraces(prompts))
            continue
        if call == "operations":
            channel.send(ours.operations(prompts, request["block_size"]))
            continue
        start = time.perf_counter()
        out = ours.decode(prompts, request.get("structure", {}))
        seconds = time.perf_counter() - start
        reply = {"seconds": seconds, "tokens": out.tokens.size, "steps": int(out.steps.max())}
        channel.send(reply | ({"ids": out.tokens.tolist()} if request.get("ids") else {}))


if __name__ == "__main__":
    main()
