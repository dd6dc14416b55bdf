"""Decoding of masked diffusion language models, with guidance and acceleration, as one loop on the device.

A response starts as G masks behind its prompt. Every round the model predicts all masked positions of the
current block, the surest predictions are committed, and what is committed never changes. Rows go their own
way: each has its block, its step in it, and its end.

    a prompt of 2 tokens in 3 columns, G = 4, blocks of 2, one token a round (. = masked, _ = padding)

    round 0   a b . . . . _       commit_step  - - - -
          1   a b . x . . _                    - 0 - -
          2   a b w x . . _                    1 0 - -
          3   a b w x y . _                    1 0 2 -
              a b w x y z _                    1 0 2 3

The vocabulary matrix is applied to the current block alone, and to committed positions only where a detector
reads predictions there.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_kernels.denoising_step import log_prob
from jaxrl_llm.sampling import information
from jaxrl_llm.sampling.diffusion_cache import blank_cache
from jaxrl_llm.sampling.diffusion_commit import chosen, even_quota, grid_quota
from jaxrl_llm.sampling.diffusion_options import Method, Settings
from jaxrl_llm.sampling.diffusion_predict import banned_ids, candidate_positions, predict
from jaxrl_llm.sampling.diffusion_state import Decoded, Denoiser, Inputs, State, place, states_at
from jaxrl_llm.sampling.proposals import propose

Array = jax.Array


def decode(
    denoiser: Denoiser,
    params: Any,
    prompts: Array,
    lengths: Array,
    method: Method,
    settings: Settings,
    *,
    key: Array,
    uids: Array,
    lexical: Array | None = None,
) -> Decoded:
    """Fills G masks behind every prompt.

    A round, for each row that is not done:

      l = f(x);  l⁻ = f(x with what guidance hides masked)         skipped where nothing is hidden or w = 0
      l* = l + w(l - l⁻), then -inf for the mask token and others that must not be proposed
      propose a token for every masked position up to the block's end; commit the surest

    and with `Method.accelerate` every stable candidate near committed tokens, once the informative tokens
    have converged: while the row stays so, `Settings.skip_negative` decodes it without guidance. (l and l⁻
    of informative tokens come from one batch, so the pass itself is saved from the next round on.)

    Args:
      denoiser: two functions; hashed by identity, so keep it rather than making it anew for every call.
      params: what its functions take.
      prompts: i32[B, P] right-padded.  lengths: i32[B], 0 to P. Padding is told by lengths alone: a token
        inside the prompt that happens to be the pad token is a token like any other.
      key, uids i32[B]: a row's draws depend on the key, its uid and the round alone.
      lexical: bool[V] informative tokens, for detector='lexical'.

    Returns:
      `Decoded`. Positions of equal confidence are taken from the left, and so are tokens of equal logit.

    Raises:
      ValueError: a mask token in a prompt, lengths out of range, rows that do not match, a missing or
        superfluous `lexical`, or a model that the method cannot cache.
    """
    inputs = _inputs(denoiser, params, prompts, lengths, method, settings, key, uids, lexical)
    return _decode(inputs, denoiser, method)


def rounds(
    denoiser: Denoiser,
    params: Any,
    prompts: Array,
    lengths: Array,
    method: Method,
    settings: Settings,
    *,
    key: Array,
    uids: Array,
    lexical: Array | None = None,
) -> Iterator[Decoded]:
    """`decode` for people who watch: what there is after every round. The last is what `decode` returns (to
    rounding: it is another program). Arguments and errors are those of `decode`.
    """
    inputs = _inputs(denoiser, params, prompts, lengths, method, settings, key, uids, lexical)
    state = _first(inputs, denoiser, method)
    while not np.all(state.done):
        state = _next(inputs, state, denoiser, method)
        yield _closed(state.decoded, inputs.settings)


def _inputs(
    denoiser: Denoiser,
    params: Any,
    prompts: Array,
    lengths: Array,
    method: Method,
    settings: Settings,
    key: Array,
    uids: Array,
    lexical: Array | None,
) -> Inputs:
    """What `decode` is given, checked."""
    tokens, sizes = np.asarray(prompts), np.asarray(lengths)
    batch, columns = tokens.shape
    if sizes.shape != (batch,) or len(uids) != batch or settings.steps.shape != (batch,):
        raise ValueError(
            f"{batch} prompts need as many lengths, uids and settings, got {len(sizes)}, {len(uids)} and "
            f"{settings.steps.shape[0]}"
        )
    if settings.shares.shape[1] != method.max_new_tokens:
        raise ValueError(
            f"settings were made for {settings.shares.shape[1]} new tokens, the method has "
            f"{method.max_new_tokens}"
        )
    if np.any((sizes < 0) | (sizes > columns)):
        raise ValueError(f"lengths={sizes.tolist()} must lie between 0 and {columns}, the columns of prompts")
    if np.any(found := (tokens == denoiser.mask_id) & (np.arange(columns) < sizes[:, None])):
        raise ValueError(
            f"prompt {int(np.argmax(found.any(axis=1)))} contains the mask token {denoiser.mask_id}, which "
            "stands for what is to be written; take it out"
        )
    if (lexical is None) == (method.guidance == "high_information" and method.detector == "lexical"):
        raise ValueError("lexical, bool[V], is needed for detector='lexical' and only there")
    if method.cache != "none" and denoiser.window is None:
        raise ValueError(f"cache={method.cache!r} needs a denoiser with `window`; this one has none")
    if method.cache != "none" and denoiser.shifted and method.family != "dream":
        raise ValueError(
            f"cache={method.cache!r}: a model that predicts a token by the state before it needs "
            f"family='dream', which commits a block's first token by itself; got {method.family!r}"
        )
    return Inputs(
        params,
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(sizes, jnp.int32),
        settings,
        key,
        jnp.asarray(uids),
        lexical,
    )


@partial(jax.jit, static_argnames=("denoiser", "method"))
def _decode(inputs: Inputs, denoiser: Denoiser, method: Method) -> Decoded:
    """`decode`."""
    final = jax.lax.while_loop(
        lambda state: ~jnp.all(state.done),
        lambda state: _round(inputs, state, denoiser, method),
        _begin(inputs, denoiser, method),
    )
    return _closed(final.decoded, inputs.settings)


def _closed(decoded: Decoded, settings: Settings) -> Decoded:
    """With EOS for what rows that stopped there left masked."""
    beyond = settings.stop_at_eos[:, None] & decoded.finished[:, None] & (decoded.commit_step < 0)
    tokens = jnp.where(beyond, settings.eos_id[:, None], decoded.tokens)
    return dataclasses.replace(decoded, tokens=tokens)


def _begin(inputs: Inputs, denoiser: Denoiser, method: Method) -> State:
    """Nothing but masks."""
    batch, size = len(inputs.prompts), method.max_new_tokens
    flat, count, no = jnp.zeros((batch, size)), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool)
    masks = jnp.full((batch, size), denoiser.mask_id, jnp.int32)
    canvas = place(inputs.prompts, inputs.lengths, masks)
    everywhere = jnp.tile(jnp.arange(size), (batch, 1))
    memory = blank = pmi = None
    if method.compares_steps:
        vocab = jax.eval_shape(
            lambda params: denoiser.head(params, states_at(inputs, canvas, everywhere, denoiser)),
            inputs.params,
        ).shape[-1]
        memory = information.blank_memory(batch, size, min(method.tracked, vocab))
    nfe = count
    if method.guidance == "high_information" and method.detector == "pmi":
        blank = states_at(inputs, canvas, everywhere, denoiser)
        nfe, pmi = count + 1, flat
    decoded = Decoded(masks, jnp.full_like(masks, -1), flat, flat, flat, count, nfe, no, no)
    cache = None
    if method.cache != "none":
        copies = 1 if method.guidance == "none" else 2  # the negative inputs
        cache = blank_cache(inputs, jnp.tile(canvas, (copies, 1)), denoiser)
    return State(decoded, count, count, no, memory, blank, pmi, calm=count, ahead=no, cache=cache)


def _round(inputs: Inputs, state: State, denoiser: Denoiser, method: Method) -> State:
    """One forward pass, or one with its negative, and one commit."""
    settings, decoded, size = inputs.settings, state.decoded, method.max_new_tokens
    batch = len(inputs.prompts)
    rows = jnp.arange(batch)[:, None]
    masked = decoded.tokens == denoiser.mask_id
    live = jnp.logical_not(state.done)
    predicted = predict(inputs, state, denoiser, method)
    memory = predicted.memory

    first, where = candidate_positions(state, method)
    in_block = jnp.arange(size) < first + method.block
    candidates = (masked & in_block & live[:, None])[rows, where]
    draw = jax.vmap(lambda uid, step: _uniforms(inputs.key, uid, step, size))
    token_u, order_u, noise_u = (u[rows, where] for u in draw(inputs.uids, decoded.steps))
    banned = banned_ids(settings, denoiser, method)
    proposed = propose(
        predicted.plain, predicted.negative, predicted.weight, banned, method, settings, token_u
    )
    share = settings.shares[jnp.arange(batch), jnp.minimum(state.step, size - 1)]
    if method.family == "llada":
        quota = even_quota(jnp.int32(method.block), state.step, settings.steps)
    else:
        # the grid has nothing to do for a row ahead of it until time catches up: go on one by one
        quota = jnp.maximum(grid_quota(jnp.sum(candidates, axis=1), share), state.ahead)
    sureness = order_u if method.order == "random" else proposed.confidence
    now = chosen(sureness, candidates, method, settings, quota, share, noise_u)
    if method.cache != "none" and method.family == "dream":
        begins = (state.step == 0) & ((share < 1) | (method.commit != "quota"))
        now = jnp.where(begins[:, None], candidates & (where == first), now)
    ahead = state.ahead
    if method.accelerate:
        assert memory is not None
        near = information.near_committed(~masked, masked & in_block, settings.window)
        settled = near & (memory.stable >= settings.stable_steps[:, None])
        sure = proposed.probability >= settings.stable_probability[:, None]
        early = candidates & settled[rows, where] & sure & predicted.converged[:, None] & ~now
        now, ahead = now | early, ahead | jnp.any(early, axis=1)
    failed = jnp.any(candidates & jnp.isnan(proposed.raw_logp + proposed.logp + proposed.probability), axis=1)
    now &= ~failed[:, None] & (proposed.token != denoiser.mask_id)

    def put(old: Array, new: Array) -> Array:
        return old.at[rows, where].set(jnp.where(now, new, old[rows, where]))

    tokens = put(decoded.tokens, proposed.token)
    pmi = state.pmi
    if pmi is not None:
        assert state.blank is not None
        before = denoiser.head(inputs.params, state.blank[rows, where])
        pmi = put(pmi, proposed.raw_logp - log_prob(before, proposed.token))
    masked = tokens == denoiser.mask_id
    full, no_steps = ~jnp.any(masked & in_block, axis=1), state.step + 1 >= settings.steps
    if method.commit == "quota":
        # with masks proposed the public decoders use up their steps, whatever is left to do
        full = no_steps if method.allow_mask_proposal else full | no_steps
    ends = (tokens == settings.eos_id[:, None]) & (jnp.cumsum(masked, axis=1) == 0)
    finished = jnp.any(ends, axis=1)
    block = jnp.where(full & live, state.block + 1, state.block)
    return State(
        Decoded(
            tokens,
            put(decoded.commit_step, jnp.broadcast_to(decoded.steps[:, None], where.shape)),
            put(decoded.commit_logp, proposed.logp),
            put(decoded.raw_logp, proposed.raw_logp),
            put(decoded.log_kept, proposed.log_kept),
            decoded.steps + live,
            decoded.nfe + jnp.where(live, predicted.passes, 0),
            finished,
            decoded.failed | failed,
        ),
        block=block,
        step=jnp.where(full, 0, state.step + 1),
        done=state.done | failed | (block >= method.blocks) | (settings.stop_at_eos & finished),
        memory=memory,
        blank=state.blank,
        pmi=pmi,
        calm=predicted.calm,
        ahead=ahead & ~full,
        cache=predicted.cache,
    )


_first = jax.jit(_begin, static_argnames=("denoiser", "method"))
_next = jax.jit(_round, static_argnames=("denoiser", "method"))


def _uniforms(key: Array, uid: Array, step: Array, size: int) -> tuple[Array, ...]:
    """Three draws f32[G] in [0, 1) for a row's round: of tokens, of order, of chance commits."""
    return tuple(jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, uid), step), (3, size)))
