"""The weight products of a decode step and nothing else, with the weights as jaxrl_llm's engine has them.

Per layer those of the joined queries, keys and values, of the attention's output, of the joined gate and up,
and of down; then that of the head. Unrolled, in one loop over as many steps as the others take. Every product
is given something of the one before, so that none can be left out, moved out of the loop or done ahead.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import ours_model
import rollout_worker
import worker
from rollout_worker import Completions, Wanted

from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.params import Tree
from jaxrl_llm.models.transformer import project_fused
from jaxrl_llm.sampling.autoregressive import next_logits, prepare

whole = jax.lax.optimization_barrier
"""A product that is used in part is computed as a whole."""


@partial(jax.jit, static_argnames=("cfg",))
def products(prepared: Tree, x: jax.Array, steps: jax.Array, cfg: ModelConfig) -> jax.Array:
    """x f[B, D] through the products of `steps` steps: f[B, D]."""

    def step(_: jax.Array, x: jax.Array) -> jax.Array:
        for layer in prepared["layers"]:
            qkv = whole(project_fused(x, layer["qkv"]))
            x = whole(project_fused(qkv[:, : cfg.num_heads], layer["o"], inputs=2))
            gate_up = whole(project_fused(x, layer["gate_up"]))
            x = whole(project_fused(gate_up[:, : cfg.intermediate_size], layer["down"]))
        logits = whole(next_logits(prepared, x, cfg))
        x = logits[:, : x.shape[1]]
        return (x / (1 + jnp.max(jnp.abs(x)))).astype(prepared["final_norm"].dtype)

    return jax.lax.fori_loop(0, steps, step, x)


class Products:
    """See `rollout_worker.Contender`; for cases of decoding alone."""

    queue_rows = 1

    def __init__(self, task: dict[str, Any]) -> None:
        params, self.cfg = ours_model.load(task)
        self.prepared = jax.block_until_ready(prepare(params, self.cfg, jnp.dtype(task["dtype"])))
        self.about = {"versions": worker.versions("jax")}

    def plan(self, wanted: Wanted) -> Callable[[], Completions]:
        x = jax.random.normal(jax.random.key(wanted.seed), (wanted.rows, self.cfg.hidden_size))
        x = jax.block_until_ready(x.astype(self.prepared["final_norm"].dtype))
        steps = max(wanted.new_tokens)

        def call() -> Completions:
            out = np.asarray(products(self.prepared, x, steps, self.cfg))
            if not np.isfinite(out.astype(np.float32)).all():
                raise RuntimeError(
                    "the products have left the range of numbers, which may change their speed"
                )
            return [range(steps)] * wanted.rows

        return call


if __name__ == "__main__":
    rollout_worker.serve(Products)
