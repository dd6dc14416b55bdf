"""Training masked-diffusion LMs on given texts: pre-training, where any token may be masked, and fine-tuning.

The noise is drawn for a whole batch, whose examples share its strata, and the update then may cut the batch.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_kernels.linear_logprob import linear_logprob
from jaxrl_llm.losses import (
    Metrics,
    WeightedSum,
    add_noise,
    aggregate,
    example_mean,
    finalize,
    masked_cross_entropy,
)
from jaxrl_llm.models import denoiser, transformer
from jaxrl_llm.models import params as params_lib
from jaxrl_llm.models.config import ModelConfig, require_denoiser
from jaxrl_llm.models.params import Tree
from jaxrl_llm.models.scoring import logprob_axes
from jaxrl_llm.parallel.sharding import ShardingRules
from jaxrl_llm.training.config import optimizer as optimizer_config
from jaxrl_llm.training.state import TrainState, init_state, make_optimizer, schedule
from jaxrl_llm.training.update import Loss, SupervisedBatch, make_update

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoisyBatch:
    """Packed rows with masks, from `with_noise`: see `data.supervised.Packed` and `losses.add_noise`.

    Attributes, [N, T] each:
      tokens, segment_ids, positions: i32; the tokens as they are to be predicted.
      loss_mask: bool, tokens that could be masked.
      noisy: i32, what the model sees.  masked: bool, where that is a mask.  rate: f32.
    """

    tokens: Array
    segment_ids: Array
    positions: Array
    loss_mask: Array
    noisy: Array
    masked: Array
    rate: Array


@partial(jax.jit, static_argnames=("mask_id", "everywhere", "least"))
def with_noise(
    batch: SupervisedBatch, key: Array, *, mask_id: int, everywhere: bool = False, least: float = 1e-3
) -> NoisyBatch:
    """Masks some of the tokens under `loss_mask`, so the prompt never; or, to pre-train, `everywhere`."""
    mask = batch.segment_ids > 0 if everywhere else batch.loss_mask
    noisy = add_noise(key, batch.tokens, mask, mask_id=mask_id, segment_ids=batch.segment_ids, least=least)
    return NoisyBatch(
        batch.tokens,
        batch.segment_ids,
        batch.positions,
        mask,
        noisy=noisy.tokens,
        masked=noisy.masked,
        rate=noisy.rate,
    )


def masked_logp(
    params: Tree,
    noisy: Array,
    tokens: Array,
    wanted: Array,
    cfg: ModelConfig,
    *,
    temperature: Array | float = 1.0,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    dtype: Any = jnp.float32,
    remat: str = "none",
    rules: ShardingRules | None = None,
) -> Array:
    """ln p of `tokens` given what of `noisy` is not masked, without an array over the vocabulary.

    Args:
      params, cfg, positions, segment_ids, dtype, remat, rules: as `denoiser.states`.
      noisy, tokens: i32[N, T] with and without masks.
      wanted: bool[N, T] tokens whose log-probs are wanted.
      temperature: scalar or f32[N], above 0.

    Returns:
      f32[N, T] (nats), 0 where not wanted.

    Raises:
      ValueError: a causal model, or one without a mask token.
    """
    hidden = denoiser.states(
        params,
        noisy,
        cfg,
        positions=positions,
        segment_ids=segment_ids,
        dtype=dtype,
        remat=remat,
        rules=rules,
    )
    rows, width = tokens.shape
    stats = linear_logprob(
        hidden.reshape(rows * width, -1),
        transformer.head(params),
        tokens.reshape(-1),
        temperature=jnp.repeat(jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), rows), width),
        softcap=cfg.logit_softcap,
        active=wanted.reshape(-1),
        **logprob_axes(rules),
    )
    return stats.logp.reshape(rows, width)


def denoising_loss(cfg: ModelConfig, *, by_example: bool = False, **options: Any) -> Loss:
    """The 1/p-weighted cross-entropy of `NoisyBatch`es.

    Args:
      cfg: of a masked-diffusion LM.
      by_example: the mean over examples of each one's mean, as LLaDA is fine-tuned, instead of the mean over
        all tokens that could be masked.
      options: dtype, remat, rules of `masked_logp`.

    Raises:
      ValueError: a causal model, or one without a mask token.
    """
    require_denoiser(cfg, "training by denoising")

    def loss(params: Tree, batch: NoisyBatch) -> tuple[WeightedSum, Metrics]:
        logp = masked_logp(
            params,
            batch.noisy,
            batch.tokens,
            batch.masked,
            cfg,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            **options,
        )
        mask = batch.loss_mask
        token_loss, metrics = masked_cross_entropy(logp, batch.masked, batch.rate, mask)
        if by_example:
            return example_mean(token_loss, mask, batch.segment_ids), metrics
        return aggregate(token_loss, mask), metrics

    return loss


def rows_of(tokens: np.ndarray, prompt_length: int = 0) -> SupervisedBatch:
    """Unpacked rows i32[N, T] without padding; all but the first `prompt_length` tokens are learned."""
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return SupervisedBatch(
        tokens=jnp.asarray(tokens, jnp.int32),
        segment_ids=jnp.ones_like(places),
        positions=places,
        loss_mask=places >= prompt_length,
    )


def fit(
    cfg: ModelConfig,
    examples: Callable[[np.random.Generator], SupervisedBatch],
    *,
    num_steps: int,
    learning_rate: float = 2e-3,
    seed: int = 0,
    params: Tree | None = None,
    on_step: Callable[[int, dict[str, float], Tree], None] | None = None,
) -> tuple[Tree, list[float]]:
    """Trains a small model on examples that are made as it goes: AdamW, cosine schedule, gradients clipped.

    A run with a tokenizer, files, checkpoints and metrics is `jaxrl_llm.train`'s.

    Args:
      cfg: of a masked-diffusion LM.
      examples: the next batch, from a generator; batches have one shape.
      num_steps: updates; the learning rate falls to 0 over them.
      seed: of params, examples and noise.
      params: to start from; None = random ones. They are not changed.
      on_step: called with the number of updates made, the metrics and the params, which must not be kept:
        the next update reuses their memory.

    Returns:
      The params, and the loss (nats per token) at every step.

    Raises:
      ValueError: a causal model, or one without a mask token.
    """
    require_denoiser(cfg, "training by denoising")
    assert cfg.mask_id is not None
    of_params, of_noise = jax.random.split(jax.random.key(seed))
    start = params_lib.init(of_params, transformer.param_specs(cfg)) if params is None else params
    c = optimizer_config(learning_rate)
    c.schedule = "cosine"
    optimizer = make_optimizer(c, num_steps)
    state: TrainState = init_state(jax.tree.map(jnp.copy, start), optimizer, None)
    update = make_update(denoising_loss(cfg), optimizer, schedule(c, num_steps))
    rng = np.random.default_rng(seed)
    history = []
    for step in range(num_steps):
        batch = with_noise(examples(rng), jax.random.fold_in(of_noise, step), mask_id=cfg.mask_id)
        state, metrics = update(state, batch)
        numbers = finalize(metrics)
        history.append(numbers["loss"])
        if on_step is not None:
            on_step(step + 1, numbers, state.params)
    return state.params, history
