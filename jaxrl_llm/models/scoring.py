"""Log-probs of given tokens under a model: what training and reference models need from it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_kernels.linear_distribution import linear_collision
from jaxrl_kernels.linear_logprob import linear_logprob
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig, require_causal
from jaxrl_llm.models.params import Tree
from jaxrl_llm.parallel.sharding import ShardingRules, mesh_axes, mesh_in_context

Array = jax.Array


class Scores(NamedTuple):
    """f32[N, T] each, 0 where not asked for: of token t given those before it, at `[:, t]`.

    Attributes:
      logp, entropy: nats.
      covariance: Σπ²·(log π + H), which says how a step on a token changes the entropy; without a gradient,
        and None unless it was asked for.
    """

    logp: Array
    entropy: Array
    covariance: Array | None = None


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
    collision: bool = False,
) -> Scores:
    """Scores the tokens under `mask`; the vocabulary matrix is applied at those positions alone.

    Args:
      params, tokens i32[N, T], positions, segment_ids, dtype, remat, rules: as `transformer.forward`.
      mask: bool[N, T] tokens to score. The first token of a sequence has nothing before it: leave it out.
      temperature: scalar or f32[N].
      max_targets: at least the largest number of masked tokens in a row (static); None = T - 1. Fewer
        means less work: the head is applied to N·max_targets positions.
      collision: whether `Scores.covariance` is wanted; it takes another pass over the vocabulary.

    Returns:
      `Scores`.

    Raises:
      ValueError: a bidirectional model, which has no next-token log-probs.
    """
    require_causal(cfg, "scoring each token given those before it")
    width = tokens.shape[1]
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
    return _scores(params, picked, tokens, mask, columns + 1, cfg, temperature, rules, collision)


def score_groups(
    params: Tree,
    tokens: Array,
    mask: Array,
    cfg: ModelConfig,
    *,
    group_size: int,
    max_prompt_length: int,
    max_completion_length: int,
    temperature: Array | float = 1.0,
    dtype: Any = jnp.float32,
    remat: str = "none",
    rules: ShardingRules | None = None,
    collision: bool = False,
) -> Scores:
    """`score` of rows that begin with a common prompt, which is computed once for all of them.

    The prompt of consecutive rows is what they have in common before the first masked token of any.

    Args:
      params, tokens i32[N, T], mask, cfg, temperature, dtype, remat, rules, collision: as `score`.
      group_size: G dividing N; rows i·G to i·G + G - 1 share a prompt.
      max_prompt_length: P, at least the length of every prompt.
      max_completion_length: C; masked tokens stand among the C that follow the prompt.

    Returns:
      `Scores`; all NaN if a masked token stands elsewhere, rather than a score that was left out.
    """
    width = tokens.shape[1]
    groups = tokens.reshape(-1, group_size, width)
    common = jnp.all(groups == groups[:, :1], axis=1) & ~jnp.any(mask.reshape(groups.shape), axis=1)
    lengths = jnp.sum(jnp.cumprod(common[:, :max_prompt_length], axis=1), axis=1)
    from_right = jnp.arange(max_prompt_length) - max_prompt_length + lengths[:, None]
    prompts = jnp.take_along_axis(groups[:, 0], jnp.maximum(from_right, 0), axis=1)
    columns = jnp.repeat(lengths, group_size)[:, None] + jnp.arange(max_completion_length)
    own = jnp.take_along_axis(tokens, jnp.minimum(columns, width - 1), axis=1)
    prompt, hidden = transformer.forward_groups(
        params, prompts, lengths, own, cfg, dtype=dtype, remat=remat, rules=rules
    )
    last = jnp.repeat(prompt[:, -1:], group_size, axis=0)
    hidden = jnp.concatenate([last, hidden[:, :-1]], axis=1)  # what predicts each token stands before it
    scores = _scores(params, hidden, tokens, mask, columns, cfg, temperature, rules, collision)
    reached = jnp.sum(mask) == jnp.sum(mask & (jnp.arange(width) <= columns[:, -1:]))
    return jax.tree.map(lambda x: jnp.where(reached, x, jnp.nan), scores)


def _scores(
    params: Tree,
    hidden: Array,
    tokens: Array,
    mask: Array,
    columns: Array,
    cfg: ModelConfig,
    temperature: Array | float,
    rules: ShardingRules | None,
    collision: bool,
) -> Scores:
    """Scores of the tokens in `columns` i32[N, C] (no two alike) from the states f[N, C, D] before them."""
    (rows, width), size = tokens.shape, columns.shape[1]
    inside = jnp.minimum(columns, width - 1)
    kept = jnp.take_along_axis(mask, inside, axis=1)
    predictors = hidden.reshape(rows * size, -1), transformer.head(params)
    options: dict[str, Any] = {
        "temperature": jnp.repeat(jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), rows), size),
        "softcap": cfg.logit_softcap,
        "active": kept.reshape(-1),
        **logprob_axes(rules),
    }
    targets = jnp.take_along_axis(tokens, inside, axis=1).reshape(-1)
    stats = linear_logprob(*predictors, targets, **options)
    index = jnp.arange(rows)[:, None]

    def place(x: Array) -> Array:
        values = jnp.where(kept, x.reshape(rows, size), 0)
        placed = jnp.zeros((rows, width), x.dtype)
        return placed.at[index, columns].set(values, mode="drop", unique_indices=True)

    covariance = place(linear_collision(*predictors, **options).covariance) if collision else None
    return Scores(place(stats.logp), place(stats.entropy), covariance)


def logprob_axes(rules: ShardingRules | None) -> dict[str, Any]:
    """How `linear_logprob` is to cut rows and the vocabulary matrix on the mesh in context."""
    if rules is None:
        return {}
    rows, vocab, embed = (mesh_axes(rule) for rule in (rules.batch, rules.vocab, rules.embed))
    return {
        "mesh": mesh_in_context(),
        "row_axes": rows,
        # an axis that is not passed on is gathered by the compiler
        "vocab_axis": vocab[0] if len(vocab) == 1 else None,
        "embed_axis": embed[0] if len(embed) == 1 and embed[0] in rows else None,
    }
