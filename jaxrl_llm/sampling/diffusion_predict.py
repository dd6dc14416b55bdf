"""A round's forward passes: what is read where, what the negative input hides, and guided logits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_kernels.denoising_step import denoising_step
from jaxrl_llm.sampling import information
from jaxrl_llm.sampling.diffusion_cache import cached_states
from jaxrl_llm.sampling.diffusion_options import Method, Settings
from jaxrl_llm.sampling.diffusion_state import Denoiser, Inputs, State, place, states_at
from jaxrl_llm.sampling.guidance import highest, share_down, share_up
from jaxrl_llm.sampling.information import Memory

Array = jax.Array


class Prediction(NamedTuple):
    """What a round's forward passes gave.

    Attributes:
      plain: f32[B, W, V] logits at the candidates' positions.
      negative: f32[B, W, V] those of the negative input, where a row is guided; None without guidance.
      weight: f32[B] of the guidance, 0 in rows that are not guided.
      memory, calm: as in `State`, brought up to date.
      converged: bool[B].
      passes: i32[B] forward passes of the row, 1 or 2.
      cache: as in `State`.
    """

    plain: Array
    negative: Array | None
    weight: Array
    memory: Memory | None
    calm: Array
    converged: Array
    passes: Array
    cache: Any


def predict(inputs: Inputs, state: State, denoiser: Denoiser, method: Method) -> Prediction:
    """The forward passes of a round, and what they say about informative tokens."""
    settings, decoded = inputs.settings, state.decoded
    masked = decoded.tokens == denoiser.mask_id
    batch, size = masked.shape
    rows = jnp.arange(batch)[:, None]
    first, where = candidate_positions(state, method)
    span = where.shape[1]
    done_share = jnp.mean(~masked, axis=1, dtype=jnp.float32)
    weight = settings.guidance_weight + (settings.guidance_end - settings.guidance_weight) * done_share
    canvas = place(inputs.prompts, inputs.lengths, decoded.tokens)

    def negative(hide: Array) -> Array:
        """The canvas with committed tokens masked, bool[B, G], and the prompt as the method says."""
        prompts = inputs.prompts
        if method.guidance == "prompt" or method.negative_prompt == "mask":
            prompts = jnp.full_like(prompts, denoiser.mask_id)
        return place(prompts, inputs.lengths, jnp.where(hide, denoiser.mask_id, decoded.tokens))

    hide = jnp.zeros_like(masked)
    if method.guidance == "high_information":
        hide = _informative(inputs, state, masked, method)
    watched = _watched_positions(where, hide, method)
    asked = ~state.done & (weight > 0)
    cache = None
    if method.cache != "none":
        ever = (settings.guidance_weight > 0) | (settings.guidance_end > 0)  # its cache may be wanted later
        wanted = ~state.done & ever & (method.guidance == "prompt")
        pair = canvas if method.guidance == "none" else jnp.concatenate([canvas, negative(hide)])
        hidden, cache = cached_states(inputs, state, pair, first, where, denoiser, method)
        hidden, hidden_negative = hidden[:batch], hidden[-batch:]
    elif method.guidance in ("prompt", "high_information"):
        # what to hide is known before the pass: both inputs make one batch
        something = jnp.any(hide, axis=1) | (method.guidance == "prompt")
        wanted = asked & something & ~(settings.skip_negative & _converged(state.calm, settings, method))

        def both(_: None) -> tuple[Array, Array]:
            pair = jnp.concatenate([canvas, negative(hide)])
            out = states_at(inputs, pair, jnp.tile(watched, (2, 1)), denoiser)
            return out[:batch], out[batch:, :span]

        def one(_: None) -> tuple[Array, Array]:
            out = states_at(inputs, canvas, watched, denoiser)
            return out, out[:, :span]

        hidden, hidden_negative = jax.lax.cond(jnp.any(wanted), both, one, None)
    else:
        hidden = states_at(inputs, canvas, watched, denoiser)
        hidden_negative = hidden
        wanted = jnp.zeros_like(asked)
    logits = denoiser.head(inputs.params, hidden)
    plain = logits[:, :span]
    if method.guidance == "low_confidence":
        hide = _unsure(logits, watched, masked, settings)
        wanted = asked & jnp.any(hide, axis=1)
        hidden_negative = jax.lax.cond(
            jnp.any(wanted),
            lambda _: states_at(inputs, negative(hide), where, denoiser),
            lambda _: hidden[:, :span],
            None,
        )

    memory, calm = state.memory, state.calm
    if memory is not None:
        inside, banned = jnp.minimum(watched, size - 1), banned_ids(settings, denoiser, method)
        seen = information.look(
            jax.tree.map(lambda x: x[rows, inside], memory), logits, masked[rows, inside], banned
        )
        memory = jax.tree.map(lambda x, new: x.at[rows, watched].set(new, mode="drop"), memory, seen)
        calm = jnp.where(_still(memory, hide, decoded.tokens, settings), calm + 1, 0)
    converged = _converged(calm, settings, method)
    guided = wanted & ~(settings.skip_negative & converged)
    negative_logits = None
    if method.guidance != "none":
        negative_logits = jax.lax.cond(
            jnp.any(guided), lambda _: denoiser.head(inputs.params, hidden_negative), lambda _: plain, None
        )
    weight = jnp.where(guided, weight, 0)
    passes = 1 + wanted.astype(jnp.int32)
    return Prediction(plain, negative_logits, weight, memory, calm, converged, passes, cache)


def _watched_positions(where: Array, hide: Array, method: Method) -> Array:
    """i32[B, W']: those of `where` i32[B, W], then committed ones that are watched; G = none."""
    size = hide.shape[1]
    if method.sees_all and where.shape[1] < size:
        return (where[:, :1] + jnp.arange(size)) % size
    if method.accelerate and where.shape[1] < size:
        index = jnp.sort(jnp.where(hide, jnp.arange(size), size), axis=1)
        return jnp.concatenate([where, index[:, : method.max_informative]], axis=1)
    return where


def _informative(inputs: Inputs, state: State, masked: Array, method: Method) -> Array:
    """bool[B, G]: committed tokens that the negative input is to hide."""
    settings, memory = inputs.settings, state.memory
    among = ~masked
    if method.detector_scope == "block":
        first, _ = candidate_positions(state, method)
        index = jnp.arange(masked.shape[1])
        among &= (index >= first) & (index < first + method.block)
    if method.detector == "early":
        scores = information.earliness(state.decoded.commit_step, state.decoded.steps, settings.radius)
    elif method.detector == "lexical":
        assert inputs.lexical is not None
        scores = jnp.where(inputs.lexical[state.decoded.tokens], 0.0, -jnp.inf)
    elif method.detector == "pmi":
        assert state.pmi is not None
        scores = state.pmi
    else:
        assert memory is not None
        scores = memory.peak if method.detector == "resolve" else -memory.change
    count = share_up(jnp.sum(among, axis=1), settings.informative_share)
    if method.max_informative is not None:
        count = jnp.minimum(count, method.max_informative)
    return highest(scores, among, count)


def _unsure(logits: Array, positions: Array, masked: Array, settings: Settings) -> Array:
    """bool[B, G]: committed tokens that the model is least sure of now; logits at positions i32[B, G]."""
    peak = denoising_step(logits).probability
    rows = jnp.arange(len(masked))[:, None]
    scores = jnp.zeros(masked.shape).at[rows, positions].set(-peak)
    return highest(scores, ~masked, share_down(jnp.sum(~masked, axis=1), settings.informative_share))


def _still(memory: Memory, hidden: Array, tokens: Array, settings: Settings) -> Array:
    """bool[B]: informative tokens, of which there are some, changed little and are still the most likely."""
    count = jnp.sum(hidden, axis=1)
    change = jnp.sum(jnp.where(hidden, memory.change, 0), axis=1) / jnp.maximum(count, 1)
    same = jnp.all(~hidden | (memory.ids[..., 0] == tokens), axis=1)
    return (count > 0) & (change < settings.change_limit) & same


def _converged(calm: Array, settings: Settings, method: Method) -> Array:
    """bool[B]."""
    return (calm >= settings.patience) if method.accelerate else jnp.zeros_like(calm, bool)


def candidate_positions(state: State, method: Method) -> tuple[Array, Array]:
    """The block's first position i32[B, 1], and the positions where tokens may be proposed i32[B, W]."""
    first = jnp.minimum(state.block, method.blocks - 1)[:, None] * method.block
    if method.allow_mask_proposal:  # masks may be left in earlier blocks
        return first, jnp.tile(jnp.arange(method.max_new_tokens), (len(first), 1))
    return first, first + jnp.arange(method.block)


def banned_ids(settings: Settings, denoiser: Denoiser, method: Method) -> Array:
    """i32[B, 2] tokens that must not be proposed; -1 = none."""
    eos = jnp.where(settings.forbid_eos, settings.eos_id, -1)
    return jnp.stack(
        [jnp.full_like(eos, -1 if method.allow_mask_proposal else denoiser.mask_id), eos], axis=1
    )
