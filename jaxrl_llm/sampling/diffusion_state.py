"""What decoding of masked diffusion models works on: a denoiser, inputs, a state, and what comes out."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.models import denoiser as model
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig, require_denoiser
from jaxrl_llm.sampling.diffusion_options import Settings
from jaxrl_llm.sampling.information import Memory
from jaxrl_llm.trajectory import Trajectories, length_mask

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A model that predicts masked tokens, as two functions. Those of a checkpoint: `of_model`.

    Attributes:
      states: (params, tokens i32[N, L], lengths i32[N], columns i32[N, W]) -> f[N, W, D], from which the head
        predicts the tokens in the columns. What is at and beyond a row's length is padding and must change
        nothing before it. Whatever shift a model makes is made in here.
      head: (params, f[..., D]) -> logits f32[..., V].
      mask_id: the mask token.
      window: (params, tokens i32[N, W], start i32[N], lengths i32[N], columns i32[N, C], cache) ->
        (f[N, C, D], cache), as `models.denoiser.window_states`; None = it cannot be cached.
      shifted: it predicts a token by the state before it, which the first of a window has not.

    Raises:
      ValueError: no mask token.
    """

    states: Callable[[Any, Array, Array, Array], Array]
    head: Callable[[Any, Array], Array]
    mask_id: int
    window: Callable[..., tuple[Array, Any]] | None = None
    shifted: bool = False

    def __post_init__(self) -> None:
        if self.mask_id is None or self.mask_id < 0:
            raise ValueError(
                f"mask_id={self.mask_id}: a model without a mask token cannot be decoded by unmasking"
            )


@functools.cache
def of_model(cfg: ModelConfig, dtype: Any = jnp.float32) -> Denoiser:
    """The denoiser of a checkpoint, computing in `dtype`; `params` are the model's own.

    Raises:
      ValueError: a causal model, or one without a mask token.
    """
    require_denoiser(cfg, "decoding by unmasking")
    assert cfg.mask_id is not None

    def states(params: Any, tokens: Array, lengths: Array, columns: Array) -> Array:
        inside = length_mask(lengths, tokens.shape[1]).astype(jnp.int32)
        return model.states(params, tokens, cfg, columns=columns, segment_ids=inside, dtype=dtype)

    def head(params: Any, hidden: Array) -> Array:
        return transformer.logits(params, hidden, cfg)

    def window(
        params: Any, tokens: Array, start: Array, lengths: Array, columns: Array, cache: Any
    ) -> tuple[Array, Any]:
        return model.window_states(
            params, tokens, cfg, start=start, lengths=lengths, columns=columns, cache=cache, dtype=dtype
        )

    return Denoiser(states, head, cfg.mask_id, window, shifted=cfg.logits_shift > 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """B responses and how they came to be. Log-probs in nats, 0 where nothing was committed.

    Attributes:
      tokens: i32[B, G]; what a row that stopped at EOS left masked is EOS, other masks left are masks.
      commit_step: i32[B, G] the round that committed the token, from 0; -1 = never committed.
      commit_logp: f32[B, G] under the distribution that the token was drawn from then: guided, tempered,
        truncated, without forbidden tokens; 0 for greedy rows.
      raw_logp: f32[B, G] under the plain, untempered model then.
      log_kept: f32[B, G] log of the plain tempered mass on the tokens that could be drawn; where nothing was
        guided, commit_logp = log softmax(l / temperature) - log_kept.
      steps: i32[B] rounds.
      nfe: i32[B] forward passes of the row, those of negative inputs counted too.
      finished: bool[B] has an EOS with no mask before it.
      failed: bool[B] the model gave NaN; the row ended there.
    """

    tokens: Array
    commit_step: Array
    commit_logp: Array
    raw_logp: Array
    log_kept: Array
    steps: Array
    nfe: Array
    finished: Array
    failed: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """What stays the same over the rounds; see `decode`."""

    params: Any
    prompts: Array
    lengths: Array
    settings: Settings
    key: Array
    uids: Array
    lexical: Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """B rows in the middle of decoding.

    Attributes:
      decoded: so far.
      block, step: i32[B] current block and step in it.
      done: bool[B].
      memory: of predictions, where steps are compared; else None.
      blank: f[B, G, D] hidden states of the masked response and pmi: f32[B, G] scores, for that detector.
      calm: i32[B] rounds in a row in which informative tokens kept still.
      ahead: bool[B] has committed more of the block than its schedule asked for.
      cache: keys and values of each row from where its block began, then those of the negative inputs where
        there is guidance; None without one.
    """

    decoded: Decoded
    block: Array
    step: Array
    done: Array
    memory: Memory | None
    blank: Array | None
    pmi: Array | None
    calm: Array
    ahead: Array
    cache: Any = None


def place(prompts: Array, lengths: Array, response: Array) -> Array:
    """i32[B, P + G]: each response i32[B, G] right behind its prompt i32[B, P], zeros behind both."""
    size = response.shape[1]
    padded = jnp.pad(prompts, ((0, 0), (0, size)))
    offset = jnp.arange(padded.shape[1]) - lengths[:, None]
    own = jnp.take_along_axis(response, jnp.clip(offset, 0, size - 1), axis=1)
    return jnp.where(offset < 0, padded, jnp.where(offset < size, own, 0))


def states_at(inputs: Inputs, canvas: Array, positions: Array, denoiser: Denoiser) -> Array:
    """f[N, W, D] of canvases i32[N, P + G] at positions i32[N, W] of the response; N a multiple of B."""
    size = canvas.shape[1] - inputs.prompts.shape[1]
    lengths = jnp.tile(inputs.lengths, len(canvas) // len(inputs.lengths))
    columns = lengths[:, None] + jnp.minimum(positions, size - 1)
    return denoiser.states(inputs.params, canvas, lengths + size, columns)


def to_trajectories(
    decoded: Decoded,
    prompts: Array,
    lengths: Array,
    settings: Settings,
    *,
    group: Array | None = None,
    policy_version: int | None = None,
    cut_at_eos: bool = False,
) -> Trajectories:
    """Responses as rows to learn from.

    A row is its prompt and its whole response, whatever comes after the first EOS included: it was there
    when other tokens were committed, so their log-probs cannot be recomputed without it. The policy's own
    tokens are those that were committed.

    Args:
      group: i32[B] prompt instances; None = every row its own.
      policy_version: which update of the params wrote the tokens; None = unknown.
      cut_at_eos: end a row with its first EOS instead, for losses that mask tokens anew.
    """
    prompts, lengths = jnp.asarray(prompts, jnp.int32), jnp.asarray(lengths, jnp.int32)
    size = decoded.tokens.shape[1]
    ids = decoded.tokens
    kept = decoded.commit_step >= 0
    count = jnp.full_like(lengths, size)
    if cut_at_eos:
        is_eos = ids == settings.eos_id[:, None]
        count = jnp.where(decoded.finished, jnp.argmax(is_eos, axis=1) + 1, size)
        inside = jnp.arange(size) < count[:, None]
        ids, kept = jnp.where(inside, ids, 0), kept & inside
    blank = jnp.zeros_like(prompts)

    def behind(x: Array, fill: Any = 0) -> Array:
        moved = place(blank, lengths, jnp.where(kept, x - fill, 0))
        return moved + fill

    mask = place(blank, lengths, kept.astype(jnp.int32)) > 0
    version = None if policy_version is None else jnp.where(mask, policy_version, 0)
    return Trajectories(
        tokens=place(prompts * (jnp.arange(prompts.shape[1]) < lengths[:, None]), lengths, ids),
        lengths=lengths + count,
        action_mask=mask,
        behaviour_logp=behind(decoded.commit_logp),
        raw_logp=behind(decoded.raw_logp),
        log_kept=behind(decoded.log_kept),
        temperature=settings.temperature,
        finished=decoded.finished,
        group=jnp.arange(len(lengths)) if group is None else jnp.asarray(group),
        policy_version=version,
        commit_step=behind(decoded.commit_step, -1),
    )
