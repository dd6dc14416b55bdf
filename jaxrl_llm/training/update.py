"""One update of the params: micro-batched gradients of a loss that is a sum over a weight.

Losses return a (sum, weight) pair whose weight does not depend on params. Gradients of the sums are added
over micro-batches and divided once by the added weights, so that accumulation cannot change a mean.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jaxrl_llm.losses import (
    Max,
    Metric,
    Metrics,
    Min,
    WeightedSum,
    aggregate,
    entropy_bonus,
    importance_sampling_correction,
    negative_log_likelihood,
    ratio_statistics,
)
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.params import Tree
from jaxrl_llm.models.scoring import Scores, score, score_groups
from jaxrl_llm.parallel.sharding import ShardingRules, num_shards
from jaxrl_llm.training.config import make_objective
from jaxrl_llm.training.state import TrainState
from jaxrl_llm.trajectory import Trajectories

Array = jax.Array
Loss = Callable[[Tree, Any], tuple[WeightedSum, Metrics]]
"""(params, batch) -> the loss before its division, and metrics."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyBatch:
    """Rows to learn from. N rows, T tokens.

    Attributes:
      trajectories: the rows; `action_mask` says which tokens count.
      advantages: f32[N], or f32[N, T] where they differ along a row.
      old_logp: f32[N, T] log-probs (nats) by the trainer's own forward pass for the params that sampled;
        None = the sampler's `behaviour_logp`.
      ref_logp: f32[N, T] tempered log-probs (nats) under the reference model; None without one.
    """

    trajectories: Trajectories
    advantages: Array
    old_logp: Array | None = None
    ref_logp: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SupervisedBatch:
    """Packed rows, as `data.supervised.pack` makes them: i32 or bool[N, T] each."""

    tokens: Array
    segment_ids: Array
    positions: Array
    loss_mask: Array


def scorer(c: ConfigDict, cfg: ModelConfig, rules: ShardingRules | None) -> Callable[..., Scores]:
    """`score` with the run's dtype, remat and layout filled in."""
    dtype = jnp.dtype(c.model.compute_dtype)
    return partial(score, cfg=cfg, dtype=dtype, remat=c.model.remat, rules=rules)


def policy_scorer(
    c: ConfigDict, cfg: ModelConfig, rules: ShardingRules | None, *, collision: bool = False
) -> Callable[[Tree, Trajectories], Scores]:
    """Tempered log-probs and entropies of the action tokens of rows in groups that share a prompt.

    The prompt is computed once for its rows where that is less work, and the rows are in groups of one size.
    """
    prompt, completion = c.data.max_prompt_length, c.rollout.max_completion_length
    options: dict[str, Any] = {
        "dtype": jnp.dtype(c.model.compute_dtype),
        "remat": c.model.remat,
        "rules": rules,
        "collision": collision,
    }

    def scores(params: Tree, t: Trajectories) -> Scores:
        rows, width = t.tokens.shape
        in_groups = c.train.num_minibatches == 1 and not c.rollout.allocation
        size = shared(rows, c.rollout.num_generations, rules) if in_groups else 1
        args = params, t.tokens, t.action_mask, cfg
        if min(prompt, width) + size * completion >= size * width:
            return score(*args, temperature=t.temperature, max_targets=completion, **options)
        return score_groups(
            *args,
            group_size=size,
            max_prompt_length=min(prompt, width),
            max_completion_length=completion,
            temperature=t.temperature,
            **options,
        )

    return scores


def shared(rows: int, group_size: int, rules: ShardingRules | None) -> int:
    """How many consecutive rows of a micro-batch can share one prompt.

    Whole groups if they fit; parts of them where a micro-batch, or a device's part of it, is smaller.
    """
    devices = num_shards("batch", rules)
    sizes = range(1, math.gcd(rows, group_size) + 1)
    return max(
        (g for g in sizes if math.gcd(rows, group_size) % g == 0 and rows // g % devices == 0), default=1
    )


def policy_loss(c: ConfigDict, score: Callable[[Tree, Trajectories], Scores]) -> Loss:
    """The config's objective as a function of params and rows."""
    objective = make_objective(c)
    is_corrected = c.loss.importance_sampling_correction != "none"

    def loss(params: Tree, batch: PolicyBatch) -> tuple[WeightedSum, Metrics]:
        t = batch.trajectories
        mask = t.action_mask
        if is_corrected and batch.old_logp is None:
            raise ValueError("importance_sampling_correction compares the sampler with old_logp: give that")
        scores = score(params, t)
        # what truncation kept is a constant of the sampling step, so the trainer's log-prob is of the
        # distribution that was sampled from (and its ratio to the sampler's is 1 before an update)
        logp = scores.logp - t.log_kept
        old_logp = t.behaviour_logp if batch.old_logp is None else batch.old_logp - t.log_kept
        arrays = {"behaviour_logp": t.behaviour_logp, "entropy": scores.entropy}
        if batch.ref_logp is not None:
            arrays["ref_logp"] = batch.ref_logp - t.log_kept
        advantages = batch.advantages if batch.advantages.ndim == 2 else batch.advantages[:, None]
        total, metrics = objective(logp, old_logp, advantages, mask, **arrays)
        if not is_corrected:
            # the trainer's own log-prob of now shows how far the two have come apart
            metrics |= importance_sampling_correction(
                jax.lax.stop_gradient(logp), t.behaviour_logp, mask, mode="none"
            )[1]
        metrics |= entropy_bonus(scores.entropy, mask)[1]
        return total, metrics | ratio_statistics(logp, t.behaviour_logp, mask)

    return loss


def supervised_loss(score: Callable[..., Scores]) -> Loss:
    """Mean negative log-likelihood of the tokens under `loss_mask`."""

    def loss(params: Tree, batch: SupervisedBatch) -> tuple[WeightedSum, Metrics]:
        scores = score(
            params,
            batch.tokens,
            batch.loss_mask,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
        )
        token_loss, metrics = negative_log_likelihood(scores.logp, batch.loss_mask)
        return aggregate(token_loss, batch.loss_mask), metrics

    return loss


def reduce_stacked(metrics: Metrics) -> Metrics:
    """Metrics whose arrays have a leading axis of pieces, as those of the whole."""

    def one(metric: Metric) -> Metric:
        reduce = jnp.max if isinstance(metric, Max) else jnp.min if isinstance(metric, Min) else jnp.sum
        return type(metric)(*(reduce(x, axis=0) for x in metric))

    return {name: one(metric) for name, metric in metrics.items()}


def accumulate(loss: Loss, params: Tree, batch: Any, pieces: int) -> tuple[Tree, WeightedSum, Metrics]:
    """Gradient of the loss's sum over the batch, taken in `pieces` micro-batches of consecutive rows.

    Returns:
      Gradient of `total.sum` (not yet divided by `total.weight`), total, metrics.
    """

    def objective(params: Tree, piece: Any) -> tuple[Array, tuple[WeightedSum, Metrics]]:
        total, metrics = loss(params, piece)
        return total.sum, (total, metrics)

    def one(grads: Tree, piece: Any) -> tuple[Tree, tuple[WeightedSum, Metrics]]:
        more, aux = jax.grad(objective, has_aux=True)(params, piece)
        return jax.tree.map(jnp.add, grads, more), aux

    if pieces == 1:
        grads, (total, metrics) = jax.grad(objective, has_aux=True)(params, batch)
        return grads, total, metrics
    cut = jax.tree.map(lambda x: x.reshape(pieces, x.shape[0] // pieces, *x.shape[1:]), batch)
    grads, (totals, stacked) = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, params), cut)
    return grads, WeightedSum(*(jnp.sum(x) for x in totals)), reduce_stacked(stacked)


def make_update(
    loss: Loss, optimizer: optax.GradientTransformation, rate: optax.Schedule, *, pieces: int = 1
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """A jitted `update(state, batch) -> (state, metrics)`; the state is donated.

    An update whose loss or gradient is not finite changes nothing but the counters.
    """

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        grads, total, metrics = accumulate(loss, state.params, batch, pieces)
        grads = jax.tree.map(lambda g: g / jnp.maximum(total.weight, 1e-12), grads)
        norm = optax.global_norm(grads)
        good = jnp.isfinite(total.sum) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        def keep(new: Array, old: Array) -> Array:
            return jnp.where(good, new, old)

        one = jnp.ones((), jnp.float32)
        metrics = metrics | {
            "loss": total,
            "grad_norm": WeightedSum(norm, one),
            "learning_rate": WeightedSum(jnp.asarray(rate(state.version), jnp.float32), one),
        }
        return TrainState(
            params=jax.tree.map(keep, params, state.params),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            version=state.version + good,
            nonfinite=jnp.where(good, 0, state.nonfinite + 1),
            skipped=state.skipped + ~good,
            tracker=state.tracker,
        ), metrics

    return update


def make_scorer(
    score: Callable[[Tree, Trajectories], Scores], *, pieces: int = 1
) -> Callable[[Tree, Trajectories], Scores]:
    """A jitted `scores(params, trajectories)`, taken in micro-batches."""

    @jax.jit
    def scores(params: Tree, t: Trajectories) -> Scores:
        cut = jax.tree.map(lambda x: x.reshape(pieces, x.shape[0] // pieces, *x.shape[1:]), t)
        out = jax.lax.map(partial(score, params), cut)
        return jax.tree.map(lambda x: x.reshape(t.tokens.shape), out)

    return scores
