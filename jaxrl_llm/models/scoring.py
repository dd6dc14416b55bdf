"""Log-probs of given tokens under a model: what training and reference models need from it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_kernels.linear_logprob import linear_logprob
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.params import Tree
from jaxrl_llm.parallel.sharding import ShardingRules

Array = jax.Array


class Scores(NamedTuple):
    """f32[N, T] each, in nats; 0 where not asked for. `logp[:, t]` is that of token t given those before."""

    logp: Array
    entropy: Array


def score(
    params: Tree,
    tokens: Array,
    mask: Array,
    cfg: ModelConfig,
    *,
    temperature: Array | float = 1.0,
    max_targets: int | None = None,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    dtype: Any = jnp.float32,
    remat: str = "none",
    rules: ShardingRules | None = None,
) -> Scores:
    """Scores the tokens under `mask`; the vocabulary matrix is applied at those positions alone.

    Args:
      params, tokens i32[N, T], positions, segment_ids, dtype, remat, rules: as `transformer.forward`.
      mask: bool[N, T] tokens to score. The first token of a sequence has nothing before it: leave it out.
      temperature: scalar or f32[N].
      max_targets: at least the largest number of masked tokens in a row (static); None = T - 1. Fewer
        means less work: the head is applied to N·max_targets positions.

    Returns:
      `Scores`.
    """
    rows, width = tokens.shape
    hidden = transformer.forward(
        params,
        tokens,
        cfg,
        positions=positions,
        segment_ids=segment_ids,
        dtype=dtype,
        remat=remat,
        rules=rules,
    )
    size = width - 1 if max_targets is None else min(max_targets, width - 1)
    wanted = mask[:, 1:]
    # a stable sort of "not wanted" lists each row's wanted columns first, in order
    columns = jnp.argsort(~wanted, axis=1, stable=True)[:, :size]
    picked = jnp.take_along_axis(hidden[:, :-1], columns[:, :, None], axis=1)
    targets = jnp.take_along_axis(tokens[:, 1:], columns, axis=1)
    stats = linear_logprob(
        picked.reshape(rows * size, -1),
        transformer.head(params),
        targets.reshape(-1),
        temperature=jnp.repeat(jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), rows), size),
        softcap=cfg.logit_softcap,
    )
    kept = jnp.take_along_axis(wanted, columns, axis=1)
    index = jnp.arange(rows)[:, None]

    def place(x: Array) -> Array:
        values = jnp.where(kept, x.reshape(rows, size), 0)
        return jnp.zeros((rows, width), x.dtype).at[index, columns + 1].set(values, unique_indices=True)

    return Scores(place(stats.logp), place(stats.entropy))
