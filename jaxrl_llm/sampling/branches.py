"""Decoding from several distributions at once: branches that read one completion after contexts of their own.

Every step, each branch gives logits for the next token, one token is drawn from their combination, and every
branch reads it. With l_0 the logits of the first branch, which says what is plausible:

    l = Σ_b w_b l_b,    l_v := -inf where l_0,v < max l_0 + log β

    contrast (PND)      w = (1, α, -γ), as released (0, α, -γ)     original, positive, negative
    contrast (VCD)      w = (1 + a, -a)                            original, negative
    reward-guided       w = (1, α, ...), or that over its sum      base, autoregressive reward models

Adding a constant to a branch's logits changes nothing, so w_b l_b may be read as w_b log π_b: the product of
experts π ∝ π_base · π_r^α. Branches are contexts of one model or of several with one vocabulary; those of one
model are rows of one batch.

What is recorded is as in `sampling.rules`: behaviour_logp is of the distribution that was drawn from,
raw_logp of the first branch alone, and log_kept its tempered log-prob minus behaviour_logp.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.params import Tree
from jaxrl_llm.sampling import slots as device
from jaxrl_llm.sampling.autoregressive import next_logits
from jaxrl_llm.sampling.logits import Sampling, row_uniforms
from jaxrl_llm.sampling.prefixes import Prefix, prefill
from jaxrl_llm.sampling.rules import Rules
from jaxrl_llm.sampling.slots import Chunk, Slots

Array = jax.Array


def combine(logits: Array, weights: Array, beta: Array | float = 0.0) -> Array:
    """l = Σ_b w_b l_b over the tokens that the first branch finds plausible.

    Args:
      logits: f32[B, S, V] of the branches.
      weights: f32[B] or f32[B, S].
      beta: scalar or f32[S] in [0, 1]; tokens less likely than this fraction of the first branch's most
        likely one get -inf. 0 = off, 1 = its most likely alone.

    Returns:
      f32[S, V].
    """
    weights = weights.reshape(*weights.shape, *(1,) * (3 - weights.ndim))
    # a sum of products, not a product of matrices, which some devices would round to bfloat16
    combined = jnp.sum(weights * logits, axis=0)
    first = logits[0]
    least = jnp.max(first, axis=1) + jnp.log(jnp.asarray(beta, jnp.float32))
    return jnp.where(first >= least[:, None], combined, -jnp.inf)


def contrast_weights(alpha: float, gamma: float, *, form: str = "paper") -> np.ndarray:
    """f32[3] for an original, a positive and a negative branch: Positive-and-Negative Decoding.

    Args:
      alpha: of the positive branch.  gamma: of the negative one.
      form: 'paper' = l_orig + α l_pos - γ l_neg; 'code' leaves l_orig out, as the released code does once
        there is a negative branch.

    Raises:
      ValueError: an unknown form.
    """
    if form not in ("paper", "code"):
        raise ValueError(f"unknown form {form!r}; one of paper, code")
    return np.array([form == "paper" or gamma == 0, alpha, -gamma], np.float32)


def guidance_weights(alpha: Sequence[float], *, normalise: bool = False) -> np.ndarray:
    """f32[1 + A] for a base model and A autoregressive reward models: π ∝ π_base · Π_a π_a^α_a (GenARM).

    Args:
      alpha: of each reward model.
      normalise: divide by 1 + Σ α, so that the weights sum to 1: a temperature of 1 + Σ α, in whose limit
        of large α the reward model decides alone.

    Raises:
      ValueError: weights whose sum is not above 0 can't be normalised.
    """
    weights = np.array([1.0, *alpha], np.float32)
    if normalise:
        if weights.sum() <= 0:
            raise ValueError(f"1 + Σ alpha = {weights.sum()} must be above 0 to normalise by it")
        weights /= weights.sum()
    return weights


class Branches(NamedTuple):
    """Contexts of one model: K branches of S rows.

    Attributes:
      prepared: from `autoregressive.prepare`.  cfg: of the model.
      tokens: K sequences of S contexts, ids each.
    """

    prepared: Tree
    cfg: ModelConfig
    tokens: Sequence[Sequence[Sequence[int]]]


def generate(
    models: Sequence[Branches],
    weights: ArrayLike,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    key: Array,
    uids: ArrayLike,
    beta: ArrayLike = 0.0,
    stop_ids: Sequence[int] = (),
    rules: Rules = (),
    states: Sequence[tuple[Any, ...]] = (),
) -> Chunk:
    """Writes S completions, each from its B branches in lock-step.

    Args:
      models: the branches, in order; the first one of the first model is l_0. Contexts are padded to a
        multiple of 32 tokens: nothing is compiled again within one.
      weights: f32[B] or f32[B, S].  beta: scalar or f32[S].  Both as `combine`.
      max_new_tokens: C.
      sampling: parameters of S rows.
      key, uids i32[S]: a row's draws depend on key, uid and its position in the first branch alone.
      stop_ids: tokens that end a row and belong to it.
      rules: of decoding, applied to the combination.  states: of each row; () = they do nothing.

    Returns:
      `Chunk` [S, C].

    Raises:
      ValueError: branches, weights or states that don't fit together, a context that is empty or has an id
        outside the vocabulary.
    """
    weights, beta = jnp.asarray(weights, jnp.float32), jnp.asarray(beta, jnp.float32)
    _check(models, weights, beta, sampling, max_new_tokens, len(rules), states)
    rows = len(models[0].tokens[0])
    caches = tuple(_read(model, max_new_tokens) for model in models)
    own = tuple(rule.init(rows) for rule in rules)
    if states:
        own = jax.tree.map(lambda *xs: jnp.stack([jnp.asarray(x) for x in xs]), *states)
    first = dataclasses.replace(
        caches[0],
        left=jnp.full(rows, max_new_tokens, jnp.int32),
        uids=jnp.asarray(uids, jnp.int32),
        sampling=sampling,
        rules=own,
    )
    return decode(
        tuple(model.prepared for model in models),
        (first, *caches[1:]),
        weights,
        beta,
        key,
        jnp.asarray([*stop_ids, -1], jnp.int32),
        tuple(model.cfg for model in models),
        rules=rules,
    )


def _check(
    models: Sequence[Branches],
    weights: Array,
    beta: Array,
    sampling: Sampling,
    max_new_tokens: int,
    rules: int,
    states: Sequence[tuple[Any, ...]],
) -> None:
    if not models or not all(model.tokens for model in models):
        raise ValueError("no branches: every model needs contexts to read")
    rows, count = len(models[0].tokens[0]), sum(len(model.tokens) for model in models)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if weights.shape not in ((count,), (count, rows)):
        raise ValueError(f"weights {weights.shape} are not for {count} branches, or those of {rows} rows")
    if beta.shape not in ((), (rows,)) or not bool(jnp.all((beta >= 0) & (beta <= 1))):
        raise ValueError(f"beta={beta} must be in [0, 1], one number or one for each of {rows} rows")
    if sampling.temperature.shape != (rows,):
        raise ValueError(f"sampling parameters of {sampling.temperature.shape} rows for {rows}")
    if states and (len(states) != rows or any(len(state) != rules for state in states)):
        raise ValueError(f"states must be one for each of {rules} rules, of each of {rows} rows")
    vocab = models[0].cfg.vocab_size
    for model in models:
        if model.cfg.vocab_size != vocab:
            raise ValueError(f"vocabularies of {vocab} and {model.cfg.vocab_size} tokens can't be combined")
        for branch in model.tokens:
            if len(branch) != rows:
                raise ValueError(f"a branch has {len(branch)} contexts and another {rows}")
            for ids in branch:
                if not len(ids):
                    raise ValueError("an empty context: a branch needs a token to continue")
                if min(ids) < 0 or max(ids) >= vocab:
                    bad = min(ids) if min(ids) < 0 else max(ids)
                    raise ValueError(f"token id {bad} is outside the vocabulary of {vocab}")


def _read(model: Branches, room: int) -> Slots:
    """The contexts of one model, read: K·S rows with room for new tokens."""
    contexts = [ids for branch in model.tokens for ids in branch]
    width = -(-max(map(len, contexts)) // 32) * 32
    tokens = np.zeros((len(contexts), width), np.int32)
    for row, ids in zip(tokens, contexts):
        row[width - len(ids) :] = ids
    counts = jnp.asarray([len(ids) for ids in contexts], jnp.int32)
    prefix = prefill(model.prepared, None, jnp.asarray(tokens), counts, model.cfg)
    return with_room(prefix, model.cfg, room=room)


@partial(jax.jit, static_argnames=("cfg", "room"))
def with_room(prefix: Prefix, cfg: ModelConfig, *, room: int) -> Slots:
    """Slots of exactly these rows, with one block of `room` columns for new tokens; nothing is drawn yet."""
    rows, columns = prefix.keys[0].shape[0], prefix.keys[0].shape[3]
    columns = -(-columns // room) * room
    slots = device.empty(cfg, rows, columns, room, prefix.hidden.dtype)

    def blocks(layers: tuple[Array, ...], axis: int) -> tuple[Array, ...]:
        return tuple(device.in_blocks(layer, axis, columns, room) for layer in layers)

    return dataclasses.replace(
        slots,
        keys=blocks(prefix.keys, 3),
        values=blocks(prefix.values, 2),
        hidden=prefix.hidden,
        lengths=prefix.lengths,
    )


@partial(jax.jit, static_argnames=("cfgs", "rules"))
def decode(
    prepared: tuple[Tree, ...],
    caches: tuple[Slots, ...],
    weights: Array,
    beta: Array,
    key: Array,
    stop_ids: Array,
    cfgs: tuple[ModelConfig, ...],
    *,
    rules: Rules = (),
) -> Chunk:
    """Draws until every row has ended or the block is full.

    Args:
      prepared, caches, cfgs: by model; a cache has its K branches one after another, S rows each. The first
        one's `left`, `uids`, `sampling` and `rules` are those of the S rows.
      weights, beta: as `combine`.  stop_ids: i32[E] (-1 = none).
    """
    first = caches[0]
    rows, room = first.left.shape[0], first.block
    uniforms = row_uniforms(key, first.uids, first.lengths[:rows], room)
    ropes = [
        transformer.rope_tables(cfg, jnp.arange(cache.columns + room, dtype=jnp.int32)[None])
        for cfg, cache in zip(cfgs, caches)
    ]
    Carry = tuple[Array, tuple[Slots, ...], Chunk]

    def more(carry: Carry) -> Array:
        step, caches, _ = carry
        return (step < room) & jnp.any(caches[0].left > 0)

    def one(carry: Carry) -> Carry:
        step, caches, chunk = carry
        by_model = [
            next_logits(params, cache.hidden, cfg) for params, cache, cfg in zip(prepared, caches, cfgs)
        ]
        logits = jnp.concatenate([x.reshape(-1, rows, x.shape[1]) for x in by_model])
        combined = combine(logits, weights, beta)
        token, _, drawn_from, chunk = device.draw(
            combined, logits[0], caches[0], chunk, step, uniforms[:, step], stop_ids, rules
        )
        read = []
        for params, cache, cfg, rope in zip(prepared, (drawn_from, *caches[1:]), cfgs, ropes):
            tokens = jnp.tile(token, len(cache.lengths) // rows)
            hidden, keys, values = device.advance(params, cache, tokens, step, rope, cfg)
            read.append(
                dataclasses.replace(
                    cache,
                    keys=keys,
                    values=values,
                    hidden=hidden,
                    lengths=cache.lengths + 1,
                )
            )
        return step + 1, tuple(read), chunk

    start = (jnp.zeros((), jnp.int32), caches, device.empty_chunk(rows, room))
    return jax.lax.while_loop(more, one, start)[2]
