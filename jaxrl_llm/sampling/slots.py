"""Continuous batching on the device: a fixed number of slots that decode in step and are refilled one by one.

The cache is made of blocks of columns. What a slot has seen lies right-aligned before the last block, which
is written while decoding, the same column for every slot at every step:

    blocks of 4           slot 0    . . a b | c d x y | . . . .      lengths 6 and 2
                          slot 1    . . . . | . . e f | . . . .

    after 4 steps         slot 0    . . a b | c d x y | z $ - -      $ ends a row: what follows is no token
                          slot 1    . . . . | . . e f | g h i j

Then a new block is set behind the others, and nothing moves. Slots that ended in between are free, so those
that go on have filled the block. A row's columns therefore depend on its own history alone, and blocks before
it add exact zeros: its tokens and their log-probs are the same, bit for bit, whoever its neighbours are, for
one number of slots.
"""

import dataclasses
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.params import Tree
from jaxrl_llm.sampling import int8
from jaxrl_llm.sampling.autoregressive import next_logits
from jaxrl_llm.sampling.logits import Sampling, row_uniforms, sample
from jaxrl_llm.sampling.prefixes import Prefix, fit, kinds
from jaxrl_llm.sampling.prefixes import prefill as prefill
from jaxrl_llm.sampling.rules import Rules

Array = jax.Array

Blocks = tuple[tuple[Array, ...], ...]
"""Arrays by layer and block."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """S slots with blocks of C columns, the last of them for new tokens.

    Attributes:
      keys: f[S, K, h, C] each; columns last, so that scores sum over h along contiguous columns.
      values: f[S, K, C, h] each. (Both may be in int8, with h + 4 in place of h: `sampling.int8`.)
      hidden: f[S, D] the last hidden state, from which the next token is drawn.
      lengths: i32[S] tokens in the cache.
      left: i32[S] tokens that may still be drawn; 0 = the slot is free.
      uids: i32[S] what a slot's draws depend on, beside key and position.
      sampling: parameters by slot.
      rules: state of the rules of decoding, by slot.
    """

    keys: Blocks
    values: Blocks
    hidden: Array
    lengths: Array
    left: Array
    uids: Array
    sampling: Sampling
    rules: Any

    @property
    def block(self) -> int:
        """C, columns of a block: the steps of one chunk."""
        return self.keys[0][0].shape[3]

    @property
    def columns(self) -> int:
        """Columns before the block that is written."""
        return (len(self.keys[0]) - 1) * self.block


class Chunk(NamedTuple):
    """What slots drew in the C steps of a block: [S, C] each, and [S].

    Attributes:
      tokens: i32.  behaviour_logp, raw_logp, log_kept: f32 (nats), as `logits.Sampled`.
      counts: i32[S] how many of them are tokens.
      stopped: bool[S] ended by a stop token.
      failed: bool[S] there was nothing to draw from: NaN or infinite logits, or rules that forbid all tokens.
    """

    tokens: Array
    behaviour_logp: Array
    raw_logp: Array
    log_kept: Array
    counts: Array
    stopped: Array
    failed: Array


def empty(
    cfg: ModelConfig,
    slots: int,
    columns: int,
    block: int,
    dtype: Any,
    rules: Rules = (),
    *,
    int8_cache: bool = False,
) -> Slots:
    """Free slots for contexts of `columns` tokens, in blocks of `block`; the cache in `dtype` or in int8."""
    zeros = jnp.zeros(slots, jnp.int32)
    size = cfg.head_dim + int8.SCALE_BYTES * int8_cache
    count = -(-columns // block) + 1

    def blocks(*shape: int) -> Blocks:
        def one() -> Array:
            return jnp.zeros((slots, cfg.num_kv_heads, *shape), jnp.int8 if int8_cache else dtype)

        return tuple(tuple(one() for _ in range(count)) for _ in range(cfg.num_layers))

    return Slots(
        keys=blocks(size, block),
        values=blocks(block, size),
        hidden=jnp.zeros((slots, cfg.hidden_size), dtype),
        lengths=zeros,
        left=zeros + 0,  # an array each: they are donated
        uids=zeros + 0,
        sampling=Sampling(jnp.ones(slots), jnp.ones(slots), zeros + 0, jnp.zeros(slots)),
        rules=jax.tree.map(jnp.copy, tuple(rule.init(slots) for rule in rules)),
    )


def with_blocks(slots: Slots, before: int, after: int) -> Slots:
    """Empty blocks: `before` more on the left (a negative number takes as many away), `after` more behind."""

    def extend(blocks: tuple[Array, ...]) -> tuple[Array, ...]:
        def new(number: int) -> tuple[Array, ...]:
            return tuple(jnp.zeros_like(blocks[0]) for _ in range(number))

        return new(before) + blocks[max(0, -before) :] + new(after)

    return dataclasses.replace(
        slots, keys=tuple(map(extend, slots.keys)), values=tuple(map(extend, slots.values))
    )


@partial(jax.jit, donate_argnames=("slots",))
def place(
    slots: Slots, prefix: Prefix, slot: Array, left: Array, uid: Array, sampling: Sampling, rules: Any
) -> Slots:
    """Puts the one row of `prefix` into a slot, all of whose columns it overwrites.

    Args:
      prefix: of a length that fits before the last block; empty columns beyond it are cut off.
      slot: i32 scalar.  left: i32 scalar, tokens that may be drawn.  uid: i32 scalar.
      sampling, rules: of this row, without the slot axis.
    """

    def set_row(rows: Array, row: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(rows, row, slot, 0)

    def set_blocks(blocks: Blocks, rows: tuple[Array, ...], axis: int) -> Blocks:
        out = []
        for layer, row in zip(blocks, rows):
            row = fit(row, axis, slots.columns, slots.block)
            parts = jnp.split(row, len(layer), axis=axis)
            out.append(tuple(map(set_row, layer, parts)))
        return tuple(out)

    def set_one(values: Array, value: Array) -> Array:
        return values.at[slot].set(value)

    return Slots(
        keys=set_blocks(slots.keys, prefix.keys, 3),
        values=set_blocks(slots.values, prefix.values, 2),
        hidden=set_row(slots.hidden, prefix.hidden),
        lengths=set_row(slots.lengths, prefix.lengths),
        left=set_one(slots.left, left),
        uids=set_one(slots.uids, uid),
        sampling=jax.tree.map(set_one, slots.sampling, sampling),
        rules=jax.tree.map(set_one, slots.rules, rules),
    )


@jax.jit
def take(slots: Slots, slot: Array, drawn: Array) -> Prefix:
    """The context of one slot after a chunk in which it drew `drawn` tokens, before a new block is set.

    Args:
      slot, drawn: i32 scalars.

    Returns:
      One row in as many columns as the slots have.
    """
    width = slots.columns + slots.block
    length = slots.lengths[slot]
    real = jnp.arange(width) >= width - length

    def join(layer: tuple[Array, ...], axis: int) -> Array:
        row = jnp.concatenate(
            [jax.lax.dynamic_index_in_dim(x, slot, keepdims=True) for x in layer], axis=axis
        )
        row = jnp.roll(row, slots.block - drawn, axis=axis)
        return jnp.where(jnp.expand_dims(real, [a for a in range(4) if a != axis]), row, 0)

    return Prefix(
        keys=tuple(join(layer, 3) for layer in slots.keys),
        values=tuple(join(layer, 2) for layer in slots.values),
        hidden=slots.hidden[slot][None],
        lengths=length[None],
    )


@jax.jit
def release(slots: Slots, rows: Array) -> Slots:
    """Frees slots: rows bool[S]."""
    return dataclasses.replace(slots, left=jnp.where(rows, 0, slots.left))


def attention_over_blocks(
    q: Array,
    keys: tuple[Array, ...],
    values: tuple[Array, ...],
    masks: list[Array],
    *,
    scale: float,
    softcap: float | None,
) -> Array:
    """One query per slot over its columns, by multiply-and-reduce: there is no matrix product to speak of.

    Args:
      q: f[S, 1, H, h].  By block, keys: f[S, K, h, C].  values: f[S, K, C, h].  masks: bool[S, C].
        Or keys and values in int8, from `int8.pack`.

    Returns:
      f[S, 1, H, h].
    """
    rows, _, heads, size = q.shape
    kv = keys[0].shape[1]
    queries = q.reshape(rows, kv, heads // kv, size).astype(jnp.float32) * scale
    # Blocks that are only read are taken together, [n, S, ...]: few operations, and the loop over steps
    # keeps them so. The sums of single blocks are added one by one: what is before a row adds exact zeros.
    parts = [tuple(jnp.stack(x[-1:]) for x in (keys, values, masks))]
    if len(keys) > 1:
        parts.insert(0, tuple(jnp.stack(x[:-1]) for x in (keys, values, masks)))
    scores = []
    for key, _, mask in parts:
        key, unit = int8.unpack(key, 3)
        score = jnp.sum(queries[..., None] * key[:, :, :, None].astype(jnp.float32), axis=4) * unit
        if softcap is not None:
            score = softcap * jnp.tanh(score / softcap)
        scores.append(jnp.where(mask[:, :, None, None], score, -1e30))
    peak = reduce(jnp.maximum, [jnp.max(score, axis=(0, 4))[..., None] for score in scores])
    totals: list[Array] = []
    sums: list[Array] = []
    for score, (_, value, _) in zip(scores, parts):
        weights = jnp.exp(score - peak)
        totals += list(jnp.sum(weights, axis=4))
        value, unit = int8.unpack(value, 4)
        weights = weights * unit.swapaxes(3, 4)
        sums += list(jnp.sum(weights[..., None] * value[:, :, :, None].astype(jnp.float32), axis=4))
    return (reduce(jnp.add, sums) / reduce(jnp.add, totals)[..., None]).reshape(q.shape).astype(q.dtype)


def advance(
    prepared: Tree, slots: Slots, tokens: Array, step: Array, ropes: Tree, cfg: ModelConfig
) -> tuple[Array, Blocks, Blocks]:
    """Feeds tokens i32[S], written to column `step` of the last block: hidden f[S, D] and the cache."""
    block, count = slots.block, len(slots.keys[0])
    position = slots.lengths
    column = jnp.arange(slots.columns + block) - slots.columns - step
    at = column + position[:, None]  # the position that a column stands for
    seen = (at >= 0) & (column <= 0)
    ropes = jax.tree.map(lambda table: table[0, position[:, None]], ropes)
    x = transformer.embed(prepared, tokens[:, None], cfg, prepared["final_norm"].dtype)
    keys, values = list(slots.keys), list(slots.values)
    for index, (layer, kind) in enumerate(zip(prepared["layers"], kinds(cfg))):
        mask = seen
        if kind == "local" and cfg.window is not None:
            mask = mask & (at > position[:, None] - cfg.window)
        masks = jnp.split(mask, count, axis=1)

        def attend(q: Array, k: Array, v: Array, index: int = index, masks: list[Array] = masks) -> Array:
            update = jax.lax.dynamic_update_slice
            k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
            if keys[index][0].dtype == jnp.int8:
                k, v = int8.pack(k, 2), int8.pack(v, 3)
            *read, last = keys[index]
            keys[index] = (*read, update(last, k, (0, 0, 0, step)))
            *read, last = values[index]
            values[index] = (*read, update(last, v, (0, 0, step, 0)))
            scale = transformer.score_scale(cfg)
            return attention_over_blocks(
                q, keys[index], values[index], masks, scale=scale, softcap=cfg.attention_softcap
            )

        x = transformer.block(layer, x, cfg, ropes[kind], attend)
    x = transformer.rms_norm(x, prepared["final_norm"], cfg)
    return x[:, 0], tuple(keys), tuple(values)


def empty_chunk(count: int, room: int) -> Chunk:
    """Nothing drawn yet in any of `room` steps."""
    f32 = jnp.zeros((count, room), jnp.float32)
    i32 = jnp.zeros((count, room), jnp.int32)
    no = jnp.zeros(count, bool)
    return Chunk(i32, f32, f32, f32, jnp.zeros(count, jnp.int32), no, no)


def draw(
    logits: Array,
    model_logits: Array,
    slots: Slots,
    chunk: Chunk,
    step: Array,
    uniform: Array,
    stop_ids: Array,
    rules: Rules,
) -> tuple[Array, Array, Slots, Chunk]:
    """One token per slot, under the rules of decoding.

    Args:
      logits: f32[S, V] to draw from.  model_logits: the same, or those that raw_logp and log_kept are about.
      chunk: what was drawn before `step`.  uniform: f32[S].

    Returns:
      Tokens i32[S], which slots drew one bool[S], slots that have `left` and `rules` moved on, and the chunk.
    """
    states = list(slots.rules)
    for index, rule in enumerate(rules):
        logits = rule.apply(states[index], logits)
    changed = logits is not model_logits
    drawn = sample(logits, slots.sampling, uniform, model_logits if changed else None)
    failed = (slots.left > 0) & ~jnp.isfinite(drawn.raw_logp + drawn.behaviour_logp)
    live = (slots.left > 0) & ~failed
    token = jnp.where(live, drawn.token, 0)
    for index, rule in enumerate(rules):
        states[index] = rule.advance(states[index], token, live)
    stopped = live & jnp.any(token[:, None] == stop_ids, axis=1)

    def put(array: Array, value: Array) -> Array:
        return jax.lax.dynamic_update_slice(array, jnp.where(live, value, 0)[:, None], (0, step))

    chunk = Chunk(
        tokens=put(chunk.tokens, token),
        behaviour_logp=put(chunk.behaviour_logp, drawn.behaviour_logp),
        raw_logp=put(chunk.raw_logp, drawn.raw_logp),
        log_kept=put(chunk.log_kept, drawn.log_kept),
        counts=chunk.counts + live,
        stopped=chunk.stopped | stopped,
        failed=chunk.failed | failed,
    )
    left = jnp.where(failed | stopped, 0, slots.left - live)
    return token, live, dataclasses.replace(slots, left=left, rules=tuple(states)), chunk


@partial(jax.jit, static_argnames=("cfg", "rules"), donate_argnames=("slots",))
def decode(
    prepared: Tree, slots: Slots, key: Array, stop_ids: Array, cfg: ModelConfig, *, rules: Rules = ()
) -> tuple[Slots, Chunk]:
    """Fills the last block: draws up to C tokens in every slot that is in use.

    Args:
      prepared: from `autoregressive.prepare`.  slots: donated; their last block is empty.
      stop_ids: i32[E] tokens that end a row and belong to it (-1 = none).
    """
    count, room = slots.lengths.shape[0], slots.block
    # one table for all steps: the compiler would work out sines again for every head of every layer
    ropes = transformer.rope_tables(cfg, jnp.arange(slots.columns + room, dtype=jnp.int32)[None])
    uniforms = row_uniforms(key, slots.uids, slots.lengths, room)

    def more(carry: tuple[Array, Slots, Chunk]) -> Array:
        step, slots, _ = carry
        return (step < room) & jnp.any(slots.left > 0)

    def one(carry: tuple[Array, Slots, Chunk]) -> tuple[Array, Slots, Chunk]:
        step, slots, chunk = carry
        logits = next_logits(prepared, slots.hidden, cfg)
        token, live, slots, chunk = draw(
            logits, logits, slots, chunk, step, uniforms[:, step], stop_ids, rules
        )
        hidden, keys, values = advance(prepared, slots, token, step, ropes, cfg)
        slots = dataclasses.replace(
            slots,
            keys=keys,
            values=values,
            hidden=jnp.where(live[:, None], hidden, slots.hidden),
            lengths=slots.lengths + live,
        )
        return step + 1, slots, chunk

    start = (jnp.zeros((), jnp.int32), slots, empty_chunk(count, room))
    _, slots, chunk = jax.lax.while_loop(more, one, start)
    return slots, chunk
