"""RL on masked-diffusion LMs: decode a group of responses to each prompt, reward them, learn from the best.

The methods differ in what stands for the log-prob of a response (`losses.diffusion_policy`):

    prompts ──► decode ──► Trajectories with commit steps ──► rewards ──► advantages ──► estimate ──► update
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_llm.advantages import ADVANTAGES
from jaxrl_llm.losses import (
    Metrics,
    Objective,
    WeightedSum,
    aggregate,
    coupled_logp,
    finalize,
    full_mask_logp,
    partial_logp,
    policy_objective,
    spg,
    spg_bounds,
    spread_shares,
    trace_logp,
)
from jaxrl_llm.losses.diffusion_policy import Traced
from jaxrl_llm.models.config import ModelConfig, require_denoiser
from jaxrl_llm.models.params import Tree
from jaxrl_llm.sampling.diffusion import decode
from jaxrl_llm.sampling.diffusion_options import Method, Settings
from jaxrl_llm.sampling.diffusion_state import of_model, to_trajectories
from jaxrl_llm.training.diffusion import masked_logp
from jaxrl_llm.training.state import TrainState, init_state
from jaxrl_llm.training.update import Loss, make_update
from jaxrl_llm.trajectory import Trajectories, length_mask

Array = jax.Array

METHODS = ("diffu_grpo", "unigrpo", "coupled_grpo", "trace", "spg")
Estimate = Callable[[Tree, Trajectories, Array, Array | None], Traced]
"""(params, trajectories, keys key[N], shares f32[N]) -> what stands for the log-prob of every token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiffusionBatch:
    """Rows to learn from.

    Attributes:
      trajectories: N rows, as `to_trajectories` makes them.
      advantages: f32[N].
      keys: key[N] of the masks.
      shares: f32[N] of `partial_logp`, for 'unigrpo'; None = drawn from the keys.
      old_logp: f32[N, T] the estimate, by the same keys, for the params before this batch's updates; None =
        the params as they are, whose ratio is 1. For the trace also behaviour_logp + log_kept of the sampler.
      ref_logp: f32[N, T] the same for the reference model; None without one.
    """

    trajectories: Trajectories
    advantages: Array
    keys: Array
    shares: Array | None = None
    old_logp: Array | None = None
    ref_logp: Array | None = None


def response_and_prompt(t: Trajectories) -> tuple[Array, Array]:
    """bool[N, T] each: the tokens that the policy wrote, and those before the first of them."""
    before = jnp.cumsum(t.action_mask, axis=1) == 0
    return t.action_mask, before & length_mask(t.lengths, t.tokens.shape[1])


def _scorer(params: Tree, t: Trajectories, cfg: ModelConfig) -> Callable[[Array, Array], Array]:
    """The model as `losses.diffusion` wants it, tempered as the rows were (greedy rows: not)."""
    temperature = jnp.where(t.temperature > 0, t.temperature, 1)
    inside = length_mask(t.lengths, t.tokens.shape[1]).astype(jnp.int32)

    def logp(noisy: Array, tokens: Array) -> Array:
        wanted = t.action_mask & (noisy == cfg.mask_id)
        return masked_logp(params, noisy, tokens, wanted, cfg, temperature=temperature, segment_ids=inside)

    return logp


def estimate_of(method: str, cfg: ModelConfig, *, num_steps: int | None = None, **options: Any) -> Estimate:
    """The log-probs that a method compares before and after an update.

    Args:
      method: of `METHODS`, all but 'spg'.
      cfg: of a masked-diffusion LM.
      num_steps: of 'trace': more rounds than any row was decoded in.
      options: of `full_mask_logp`, `partial_logp`, `coupled_logp` or `trace_logp`.

    Raises:
      ValueError: a method that has no such log-prob, a causal model, or 'trace' without `num_steps`.
    """
    require_denoiser(cfg, "RL by denoising")
    assert cfg.mask_id is not None
    if method not in METHODS[:-1]:
        raise ValueError(f"method={method!r} has no estimate of log-probs; one of {', '.join(METHODS[:-1])}")
    if (num_steps is None) == (method == "trace"):
        raise ValueError(f"num_steps={num_steps} is for method='trace' and needed there, got {method!r}")
    options |= {"mask_id": cfg.mask_id}

    def estimate(params: Tree, t: Trajectories, keys: Array, shares: Array | None = None) -> Traced:
        logp, (mask, prompt) = _scorer(params, t, cfg), response_and_prompt(t)
        if num_steps is not None:  # the trace
            if t.commit_step is None:
                raise ValueError("method='trace' needs every token's commit_step: decode with `diffusion`")
            return trace_logp(logp, t.tokens, mask, t.commit_step, keys, num_steps=num_steps, **options)
        if method == "coupled_grpo":
            values = coupled_logp(logp, t.tokens, mask, keys, **options)
        elif method == "unigrpo":
            values = partial_logp(logp, t.tokens, mask, keys, shares=shares, **options)
        else:
            values = full_mask_logp(logp, t.tokens, mask, prompt, keys, **options)
        return Traced(values, mask.astype(jnp.float32))

    return estimate


def ratio_loss(estimate: Estimate, objective: Objective | None = None) -> Loss:
    """Any policy objective on estimated log-probs, as a loss of `DiffusionBatch`es.

    Args:
      estimate: of `estimate_of`.
      objective: of `policy_objective`; None = PPO's clip at 0.2, mean over tokens. Of tokens whose step was
        not drawn only the number counts, so a KL term is that of the steps drawn.
    """
    objective = policy_objective() if objective is None else objective

    def loss(params: Tree, batch: DiffusionBatch) -> tuple[WeightedSum, Metrics]:
        mask = batch.trajectories.action_mask
        logp, weight = estimate(params, batch.trajectories, batch.keys, batch.shares)
        old_logp = jax.lax.stop_gradient(logp) if batch.old_logp is None else batch.old_logp
        arrays = {} if batch.ref_logp is None else {"ref_logp": batch.ref_logp}
        return objective(logp, old_logp, batch.advantages[:, None] * weight, mask, **arrays)

    return loss


def spg_loss(cfg: ModelConfig, *, upper_share: float = 0.5, **options: Any) -> Loss:
    """SPG as a loss of `DiffusionBatch`es.

    Args:
      cfg: of a masked-diffusion LM.
      upper_share: of `spg`.
      options: num_draws, block_size, beta, prompt_rate of `spg_bounds`.

    Raises:
      ValueError: a causal model, or one without a mask token.
    """
    require_denoiser(cfg, "RL by denoising")
    assert cfg.mask_id is not None
    options |= {"mask_id": cfg.mask_id}

    def loss(params: Tree, batch: DiffusionBatch) -> tuple[WeightedSum, Metrics]:
        t = batch.trajectories
        mask, prompt = response_and_prompt(t)
        bounds = spg_bounds(_scorer(params, t, cfg), t.tokens, mask, prompt, batch.keys, **options)
        token_loss, metrics = spg(*bounds, batch.advantages[:, None], mask, upper_share=upper_share)
        return aggregate(token_loss, mask), metrics

    return loss


Reward = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(prompts i32[N, P], responses i32[N, G]) -> f[N]."""


def improve(
    params: Tree,
    cfg: ModelConfig,
    prompts: Callable[[np.random.Generator], np.ndarray],
    reward: Reward,
    decoder: Method,
    settings: Callable[[int], Settings],
    *,
    method: str,
    num_steps: int,
    num_generations: int = 8,
    num_iterations: int = 1,
    learning_rate: float = 1e-3,
    scale: str = "none",
    objective: Objective | None = None,
    seed: int = 0,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    **options: Any,
) -> tuple[Tree, list[float]]:
    """A short run of RL on one task, all prompts of one length.

    Args:
      params, cfg: the policy; `params` are not changed.
      prompts: the next i32[M, P], from a generator; batches have one shape.
      reward: of responses.
      decoder, settings: how to sample; settings(N) are those of N rows, with a temperature above 0.
      method: of `METHODS`.
      num_steps: batches of M·num_generations responses.
      num_iterations: updates on each, with masks of their own; SPG takes 1.
      scale: of the group's advantages; "none" is r − mean.
      objective: as `ratio_loss`; the paper of 'unigrpo' has "seq_mean_token_mean" for aggregation.
      on_step: called with the number of batches done and their metrics.
      options: of the method: see `estimate_of` and `spg_loss`.

    Returns:
      The params, and the mean reward of each batch.

    Raises:
      ValueError: an unknown method, a model that is no masked-diffusion LM, or several iterations of SPG.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; one of {', '.join(METHODS)}")
    if method == "spg" and num_iterations != 1:
        raise ValueError(f"num_iterations={num_iterations}: SPG has no ratio, so a batch takes one update")
    denoiser = of_model(cfg)
    estimate = None
    if method == "spg":
        loss = spg_loss(cfg, **options)
    else:
        if method == "trace":
            options = {"num_steps": decoder.max_new_tokens} | options
        estimate = estimate_of(method, cfg, **options)
        loss = ratio_loss(estimate, objective)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
    state: TrainState = init_state(jax.tree.map(jnp.copy, params), optimizer, None)
    update = make_update(loss, optimizer, optax.constant_schedule(learning_rate))
    old = None if estimate is None else jax.jit(estimate)
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    history: list[float] = []
    for step in range(num_steps):
        asked = np.repeat(prompts(rng), num_generations, axis=0)
        rows = len(asked)
        lengths, numbers = np.full(rows, asked.shape[1]), settings(rows)
        of_decoder, of_masks, of_shares = jax.random.split(jax.random.fold_in(key, step), 3)
        decoded = decode(
            denoiser,
            state.params,
            jnp.asarray(asked),
            jnp.asarray(lengths),
            decoder,
            numbers,
            key=of_decoder,
            uids=jnp.arange(rows),
        )
        group = jnp.arange(rows) // num_generations
        # masks drawn anew need nothing behind the end; the trace needs all that the decoder saw
        cut = method != "trace"
        t = to_trajectories(
            decoded, jnp.asarray(asked), jnp.asarray(lengths), numbers, group=group, cut_at_eos=cut
        )
        rewards = jnp.asarray(reward(asked, np.asarray(decoded.tokens)), jnp.float32)
        advantages, metrics = ADVANTAGES["group"](rewards, group, scale=scale)
        batches = []
        each = jax.random.split(of_masks, (num_iterations, rows))
        for keys, shares in zip(each, spread_shares(jax.random.split(of_shares, rows), num_iterations)):
            batch = DiffusionBatch(t, advantages, keys, shares)
            if old is not None and num_iterations > 1:
                batch = dataclasses.replace(batch, old_logp=old(state.params, t, keys, shares).logp)
            batches.append(batch)
        for batch in batches:
            state, more = update(state, batch)
        history.append(float(jnp.mean(rewards)))
        if on_step is not None:
            on_step(step + 1, finalize(metrics | more) | {"reward": history[-1]})
    return state.params, history
