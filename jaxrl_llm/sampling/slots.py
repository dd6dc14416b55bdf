"""Continuous batching on the device: a fixed number of slots that decode in step and are refilled one by one.

The cache is made of blocks of columns. What a slot has seen lies right-aligned before the last block, which
is written while decoding, the same column for every slot at every step:

    blocks of 4           slot 0    . . a b | c d x y | . . . .      lengths 6 and 2
                          slot 1    . . . . | . . e f | . . . .

    after 4 steps         slot 0    . . a b | c d x y | z $ - -      $ ends a row: what follows is no token
                          slot 1    . . . . | . . e f | g h i j

Then a new block is set behind the others. Slots that ended in between are free, so those that go on have
filled the block. A row's columns therefore depend on its own history alone, and blocks before it add exact
zeros: its tokens and their log-probs are the same, bit for bit, whoever its neighbours are, for one number of
slots.
"""

import dataclasses
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.params import Tree
from jaxrl_llm.parallel.sharding import ShardingRules, constrain
from jaxrl_llm.sampling import int8
from jaxrl_llm.sampling.autoregressive import lookup, next_logits
from jaxrl_llm.sampling.logits import Sampling, row_uniforms, sample
from jaxrl_llm.sampling.prefixes import Prefix, fit, kinds
from jaxrl_llm.sampling.prefixes import prefill as prefill
from jaxrl_llm.sampling.rules import Rules

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """S slots with n blocks of C columns, the last of them for new tokens.

    Attributes:
      keys: per layer f[n, S, K, h, C]; columns last, so that scores sum over h along contiguous columns.
      values: per layer f[n, S, K, C, h]. (Both in a dtype of their own: in int8 with h + 4 in place of h, see
        `sampling.int8`.)
      hidden: f[S, D] the last hidden state, from which the next token is drawn.
      lengths: i32[S] tokens in the cache.
      left: i32[S] tokens that may still be drawn; 0 = the slot is free.
      uids: i32[S] what a slot's draws depend on, beside key and position.
      sampling: parameters by slot.
      rules: state of the rules of decoding, by slot.
      sharding: how slots (as batch rows) and heads lie on the mesh in context; None = on one device.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    hidden: Array
    lengths: Array
    left: Array
    uids: Array
    sampling: Sampling
    rules: Any
    sharding: ShardingRules | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def block(self) -> int:
        """C, columns of a block: the steps of one chunk."""
        return self.keys[0].shape[4]

    @property
    def columns(self) -> int:
        """Columns before the block that is written."""
        return (len(self.keys[0]) - 1) * self.block


def in_blocks(x: Array, axis: int, columns: int, block: int) -> Array:
    """Right-aligned columns along `axis` as `columns` of them and an empty block behind: f[n, ...]."""
    x = fit(x, axis, columns, block)
    return jnp.stack(jnp.split(x, columns // block + 1, axis=axis))


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
    kv_dtype: Any = None,
    sharding: ShardingRules | None = None,
) -> Slots:
    """Free slots for contexts of `columns` tokens, in blocks of `block`.

    Args:
      dtype: of hidden states.  kv_dtype: of keys and values, floats or int8; None = `dtype`.
    """
    zeros = jnp.zeros(slots, jnp.int32)
    kv_dtype = jnp.dtype(dtype if kv_dtype is None else kv_dtype)
    size = cfg.head_dim + int8.SCALE_BYTES * (kv_dtype == jnp.int8)
    count = -(-columns // block) + 1

    def layers(*shape: int) -> tuple[Array, ...]:
        shape = (count, slots, cfg.num_kv_heads, *shape)
        return tuple(jnp.zeros(shape, kv_dtype) for _ in range(cfg.num_layers))

    new = Slots(
        keys=layers(size, block),
        values=layers(block, size),
        hidden=jnp.zeros((slots, cfg.hidden_size), dtype),
        lengths=zeros,
        left=zeros + 0,  # an array each: they are donated
        uids=zeros + 0,
        sampling=Sampling(jnp.ones(slots), jnp.ones(slots), zeros + 0, jnp.zeros(slots)),
        rules=jax.tree.map(jnp.copy, tuple(rule.init(slots) for rule in rules)),
        sharding=sharding,
    )
    return laid_out(new)


@jax.jit
def laid_out(slots: Slots) -> Slots:
    """The same slots, on the mesh as their `sharding` says."""

    def row(x: Array) -> Array:
        return constrain(x, ("batch", *[None] * (x.ndim - 1)), slots.sharding)

    def layer(x: Array) -> Array:
        return constrain(x, (None, "batch", "kv_heads", None, None), slots.sharding)

    rest = jax.tree.map(row, dataclasses.replace(slots, keys=(), values=()))
    keys, values = (tuple(map(layer, x)) for x in (slots.keys, slots.values))
    return dataclasses.replace(rest, keys=keys, values=values)


def with_blocks(slots: Slots, before: int, after: int) -> Slots:
    """Empty blocks: `before` more on the left (a negative number takes as many away), `after` more behind."""

    def extended(layers: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(_extend(layer, before, after) for layer in layers)

    return dataclasses.replace(slots, keys=extended(slots.keys), values=extended(slots.values))


@partial(jax.jit, static_argnames=("before", "after"))
def _extend(layer: Array, before: int, after: int) -> Array:
    """One layer at a time, so that two caches are never needed at once."""
    return jax.lax.pad(layer, jnp.zeros((), layer.dtype), [(before, after, 0)] + [(0, 0, 0)] * 4)


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

    def set_row(rows: Array, row: Array, axis: int = 0) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(rows, row, slot, axis)

    def set_layers(layers: tuple[Array, ...], rows: tuple[Array, ...], axis: int) -> tuple[Array, ...]:
        return tuple(
            set_row(layer, in_blocks(row, axis, slots.columns, slots.block), 1)
            for layer, row in zip(layers, rows)
        )

    def set_one(values: Array, value: Array) -> Array:
        return values.at[slot].set(value)

    placed = Slots(
        keys=set_layers(slots.keys, prefix.keys, 3),
        values=set_layers(slots.values, prefix.values, 2),
        hidden=set_row(slots.hidden, prefix.hidden),
        lengths=set_row(slots.lengths, prefix.lengths),
        left=set_one(slots.left, left),
        uids=set_one(slots.uids, uid),
        sampling=jax.tree.map(set_one, slots.sampling, sampling),
        rules=jax.tree.map(set_one, slots.rules, rules),
        sharding=slots.sharding,
    )
    return laid_out(placed)


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

    def join(layer: Array, axis: int) -> Array:
        blocks = jax.lax.dynamic_index_in_dim(layer, slot, 1)
        row = jnp.concatenate(list(blocks), axis=axis)
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


def rows_of(slots: Slots, rows: Array) -> Slots:
    """The slots i32[S'], one after another; some may come twice."""
    picked = jax.tree.map(lambda x: x[rows], dataclasses.replace(slots, keys=(), values=()))
    caches = {name: tuple(x[:, rows] for x in getattr(slots, name)) for name in ("keys", "values")}
    return dataclasses.replace(picked, **caches)


def attention_over_blocks(
    q: Array, keys: Array, values: Array, mask: Array, *, scale: float, softcap: float | None
) -> Array:
    """One query per slot over its columns, by multiply-and-reduce: there is no matrix product to speak of.

    Args:
      q: f[S, 1, H, h].  keys: f[n, S, K, h, C].  values: f[n, S, K, C, h].  mask: bool[n, S, C].
        Or keys and values in int8, from `int8.pack`.

    Returns:
      f[S, 1, H, h].
    """
    rows, _, heads, size = q.shape
    kv = keys.shape[2]
    queries = q.reshape(rows, kv, heads // kv, size).astype(jnp.float32) * scale
    keys, unit = int8.unpack(keys, 3)
    scores = jnp.sum(queries[..., None] * keys[:, :, :, None].astype(jnp.float32), axis=4) * unit
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, :, None, None], scores, -1e30)
    weights = jnp.exp(scores - jnp.max(scores, axis=(0, 4), keepdims=True))
    totals = jnp.sum(weights, axis=4)
    values, unit = int8.unpack(values, 4)
    weights = weights * unit.swapaxes(3, 4)
    sums = jnp.sum(weights[..., None] * values[:, :, :, None].astype(jnp.float32), axis=4)
    # The sums of blocks are added one by one: a reduction would round by their number, and so what is before
    # a row adds exact zeros.
    out = reduce(jnp.add, list(sums)) / reduce(jnp.add, list(totals))[..., None]
    return out.reshape(q.shape).astype(q.dtype)


def advance(
    prepared: Tree, slots: Slots, tokens: Array, step: Array, ropes: Tree, cfg: ModelConfig
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """Feeds tokens i32[S], written to column `step` of the last block: hidden f[S, D] and the cache."""
    block, count = slots.block, len(slots.keys[0])
    position = slots.lengths
    column = jnp.arange(slots.columns + block) - slots.columns - step
    at = column + position[:, None]  # the position that a column stands for
    seen = (at >= 0) & (column <= 0)
    ropes = jax.tree.map(lambda table: table[0, position[:, None]], ropes)
    x = lookup(prepared, tokens, cfg)
    keys, values = list(slots.keys), list(slots.values)
    for index, (layer, kind) in enumerate(zip(prepared["layers"], kinds(cfg))):
        mask = seen
        if kind == "local" and cfg.window is not None:
            mask = mask & (at > position[:, None] - cfg.window)
        mask = jnp.stack(jnp.split(mask, count, axis=1))

        def attend(q: Array, k: Array, v: Array, index: int = index, mask: Array = mask) -> Array:
            update = jax.lax.dynamic_update_slice
            k = int8.stored(k.transpose(0, 2, 3, 1), 2, keys[index].dtype)
            v = int8.stored(v.transpose(0, 2, 1, 3), 3, values[index].dtype)
            keys[index] = update(keys[index], k[None], (count - 1, 0, 0, 0, step))
            values[index] = update(values[index], v[None], (count - 1, 0, 0, step, 0))
            scale = transformer.score_scale(cfg)
            return attention_over_blocks(
                q, keys[index], values[index], mask, scale=scale, softcap=cfg.attention_softcap
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
    return laid_out(slots), chunk
