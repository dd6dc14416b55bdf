"""Autoregressive sampling: prefill once per prompt, then decode on the device until every row is done.

A row's cache has two parts. Its prompt, right-padded to P slots, is kept once for all rows of the prompt's
group. What it writes itself goes to slots 0, 1, …, the same slot for every row at every step. Writing is then
one contiguous update, while a token's position (for rotary embedding and windows) still counts only real
tokens: there is no left padding.

    P = 4, prompts of 2 and 4 tokens, 2 rows each, after 3 steps:

    prompt 0   a b . .      row 0   x y z .      positions 0 1 - - | 2 3 4
                            row 1   x u v .
    prompt 1   a b c d      row 2   x y z .      positions 0 1 2 3 | 4 5 6
                            row 3   u v w .

The host looks in between chunks of steps: it stops early when all rows are done, checks stop strings, and
doubles the cache when it is full: a step attends over whole arrays, for a slice of them would be a copy.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models import transformer
from jaxrl_llm.models.attention import attention, causal_mask
from jaxrl_llm.models.config import ModelConfig, require_causal
from jaxrl_llm.models.params import Tree
from jaxrl_llm.parallel.sharding import ShardingRules, constrain
from jaxrl_llm.sampling.logits import Sampling, row_uniforms, sample
from jaxrl_llm.trajectory import Trajectories, length_mask

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """B = M·G rows in the middle of decoding. C = most new tokens; R of them have room in the cache by now.

    Attributes:
      prompt_keys, prompt_values: per layer f[M, K, h, P] and f[M, K, P, h]; zero beyond a prompt.
      keys: per layer f[B, K, h, R]; slots last, so that scores sum over h along contiguous slots.
      values: per layer f[B, K, R, h].
      hidden: f[B, D] last hidden state, from which the next token is drawn.
      prompt_lengths: i32[B].
      step: i32 scalar, tokens drawn so far.
      done: bool[B].
      tokens, behaviour_logp, raw_logp, log_kept: [B, C] what was drawn and its log-probs (nats).
      counts: i32[B] tokens drawn before and including EOS.
    """

    prompt_keys: tuple[Array, ...]
    prompt_values: tuple[Array, ...]
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    hidden: Array
    prompt_lengths: Array
    step: Array
    done: Array
    tokens: Array
    behaviour_logp: Array
    raw_logp: Array
    log_kept: Array
    counts: Array


@partial(jax.jit, static_argnames=("cfg", "dtype"))
def prepare(params: Tree, cfg: ModelConfig, dtype: Any = jnp.float32) -> Tree:
    """Params as decoding wants them: a tuple of layers, in the compute dtype. Once per params version.

    Training scans stacked layers; a decode step that did would move the whole cache through the scan.
    """
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    layers = tuple(
        transformer.fuse(jax.tree.map(lambda x, i=i: x[i], params["layers"])) for i in range(cfg.num_layers)
    )
    return params | {"layers": layers}


def _kinds(cfg: ModelConfig) -> tuple[str, ...]:
    return cfg.layer_kinds or ("global",) * cfg.num_layers


@partial(jax.jit, static_argnames=("cfg", "num_generations", "max_new_tokens", "room", "rules"))
def prefill(
    prepared: Tree,
    tokens: Array,
    lengths: Array,
    cfg: ModelConfig,
    *,
    num_generations: int,
    max_new_tokens: int,
    room: int,
    rules: ShardingRules | None = None,
) -> State:
    """Runs the prompts, once for all rows that continue them.

    Args:
      prepared: from `prepare`.  tokens: i32[M, P] right-padded prompts.  lengths: i32[M], at least 1.
      num_generations: G rows per prompt; row i·G + j continues prompt i.
      max_new_tokens: C.  room: R, new tokens that the cache has slots for; `grow` makes more.
      rules: as `generate`.

    Returns:
      `State` of B = M·G rows.

    Raises:
      ValueError: a bidirectional model.
    """
    require_causal(cfg, "autoregressive sampling")
    dtype = prepared["final_norm"].dtype
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    ropes = transformer.rope_tables(cfg, positions)
    x = transformer.embed(prepared, tokens, cfg, dtype)
    keys: list[Array] = []
    values: list[Array] = []

    def repeat(x: Array) -> Array:
        return jnp.repeat(x, num_generations, axis=0)

    for layer, kind in zip(prepared["layers"], _kinds(cfg)):
        mask = causal_mask(positions, window=cfg.window if kind == "local" else None)

        def attend(q: Array, k: Array, v: Array, mask: Array = mask) -> Array:
            # padded slots are written as zeros: what lies beyond a prompt must not be able to poison it
            real = length_mask(lengths, k.shape[1])[:, :, None, None]
            keys.append(jnp.where(real, k, 0).transpose(0, 2, 3, 1))
            values.append(jnp.where(real, v, 0).transpose(0, 2, 1, 3))
            scale = transformer.score_scale(cfg)
            return attention(q, k, v, mask, scale=scale, softcap=cfg.attention_softcap)

        x = transformer.block(layer, x, cfg, ropes[kind], attend)
    x = transformer.rms_norm(x, prepared["final_norm"], cfg)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    batch = tokens.shape[0] * num_generations
    zeros = jnp.zeros((batch, max_new_tokens), jnp.float32)
    kv, width = cfg.num_kv_heads, cfg.head_dim

    def empty(*sizes: int) -> Array:
        # the compiler would keep a copy of constants on every device
        return constrain(jnp.zeros((batch, kv, *sizes), dtype), ("batch", "kv_heads", None, None), rules)

    return State(
        prompt_keys=tuple(keys),
        prompt_values=tuple(values),
        keys=(empty(width, room),) * cfg.num_layers,
        values=(empty(room, width),) * cfg.num_layers,
        hidden=repeat(last),
        prompt_lengths=repeat(lengths),
        step=jnp.zeros((), jnp.int32),
        done=jnp.zeros(batch, bool),
        tokens=jnp.zeros((batch, max_new_tokens), jnp.int32),
        behaviour_logp=zeros,
        raw_logp=zeros,
        log_kept=zeros,
        counts=jnp.zeros(batch, jnp.int32),
    )


@partial(jax.jit, static_argnames=("room",))
def grow(state: State, room: int) -> State:
    """Adds slots for `room` more tokens to the cache."""
    keys = tuple(jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, room))) for x in state.keys)
    values = tuple(jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0))) for x in state.values)
    return dataclasses.replace(state, keys=keys, values=values)


def cached_attention(
    q: Array,
    prompts: tuple[Array, Array],
    own: tuple[Array, Array],
    mask: Array,
    *,
    scale: float,
    softcap: float | None,
) -> Array:
    """Attention of one query per row over its prompt and over what it has written.

    The rows of a group meet their prompt in one matrix product. Over a row's own slots it is written as
    multiply-and-reduce: with one query per row there is no matrix product to speak of.

    Args:
      q: f[B, 1, H, h].
      prompts: keys f[M, K, h, P] and values f[M, K, P, h]; row i continues prompt i·M//B.
      own: keys f[B, K, h, R] and values f[B, K, R, h].
      mask: bool[B, P + R].

    Returns:
      f[B, 1, H, h].
    """
    batch, _, heads, width = q.shape
    count, kv, _, slots = prompts[0].shape
    queries = q.reshape(batch, kv, heads // kv, width).astype(jnp.float32) * scale

    def by_prompt(x: Array) -> Array:
        """[B, K, H/K, n] -> [M, K, B/M·H/K, n]"""
        x = x.reshape(count, batch // count, kv, heads // kv, x.shape[-1])
        return x.swapaxes(1, 2).reshape(count, kv, -1, x.shape[-1])

    def by_row(x: Array) -> Array:
        x = x.reshape(count, kv, batch // count, heads // kv, x.shape[-1])
        return x.swapaxes(1, 2).reshape(batch, kv, heads // kv, x.shape[-1])

    shared = by_row(jnp.matmul(by_prompt(queries), prompts[0].astype(jnp.float32)))
    scores = jnp.sum(queries[..., None] * own[0][:, :, None].astype(jnp.float32), axis=3)
    scores = jnp.concatenate([shared, scores], axis=3)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1)
    out = by_row(jnp.matmul(by_prompt(weights[..., :slots]), prompts[1].astype(jnp.float32)))
    out += jnp.sum(weights[..., slots:, None] * own[1][:, :, None].astype(jnp.float32), axis=3)
    return out.reshape(q.shape).astype(q.dtype)


def _advance(
    prepared: Tree, state: State, tokens: Array, ropes: Tree, cfg: ModelConfig
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """Feeds the tokens i32[B] drawn at `state.step`, given rope tables of every position.

    Returns:
      Hidden states f[B, D] and the caches.
    """
    prompt_slots, room = state.prompt_keys[0].shape[3], state.keys[0].shape[3]
    position = state.prompt_lengths + state.step
    prompt, own = jnp.arange(prompt_slots), jnp.arange(room)
    written = jnp.concatenate(
        [prompt < state.prompt_lengths[:, None], jnp.broadcast_to(own <= state.step, (len(tokens), room))],
        axis=1,
    )
    slot_positions = jnp.concatenate(
        [jnp.broadcast_to(prompt, (len(tokens), prompt_slots)), state.prompt_lengths[:, None] + own], axis=1
    )
    ropes = jax.tree.map(lambda table: table[0, position[:, None]], ropes)
    x = lookup(prepared, tokens, cfg)
    keys, values = list(state.keys), list(state.values)
    for index, (layer, kind) in enumerate(zip(prepared["layers"], _kinds(cfg))):
        mask = written
        if kind == "local" and cfg.window is not None:
            mask = mask & (slot_positions > position[:, None] - cfg.window)

        def attend(q: Array, k: Array, v: Array, index: int = index, mask: Array = mask) -> Array:
            update = jax.lax.dynamic_update_slice
            keys[index] = update(keys[index], k.transpose(0, 2, 3, 1), (0, 0, 0, state.step))
            values[index] = update(values[index], v.transpose(0, 2, 1, 3), (0, 0, state.step, 0))
            return cached_attention(
                q,
                (state.prompt_keys[index], state.prompt_values[index]),
                (keys[index], values[index]),
                mask,
                scale=transformer.score_scale(cfg),
                softcap=cfg.attention_softcap,
            )

        x = transformer.block(layer, x, cfg, ropes[kind], attend)
    x = transformer.rms_norm(x, prepared["final_norm"], cfg)
    return x[:, 0], tuple(keys), tuple(values)


def lookup(prepared: Tree, tokens: Array, cfg: ModelConfig) -> Array:
    """Tokens i32[B] -> what the layers read of them, f[B, 1, D], in a loop of steps.

    Under a condition that always holds, where the table is narrower than float32: the CPU's compiler looks up
    in float32, and would make a float32 copy of the whole table before the loop. Out of a branch it takes
    nothing.
    """
    dtype = prepared["final_norm"].dtype

    def embed(tokens: Array) -> Array:
        return transformer.embed(prepared, tokens[:, None], cfg, dtype)

    def zeros(tokens: Array) -> Array:
        return jnp.zeros((len(tokens), 1, cfg.hidden_size), dtype)

    if dtype == jnp.float32:
        return embed(tokens)
    return jax.lax.cond(jnp.any(tokens >= 0), embed, zeros, tokens)


def next_logits(prepared: Tree, hidden: Array, cfg: ModelConfig) -> Array:
    """hidden f[B, D] -> f32[B, V]."""
    return transformer.cap_logits(transformer.times_transposed(hidden, transformer.head(prepared)), cfg)


@partial(jax.jit, static_argnames=("cfg",), donate_argnames=("state",))
def decode(
    prepared: Tree,
    state: State,
    sampling: Sampling,
    uniforms: Array,
    stop_ids: Array,
    until: Array,
    cfg: ModelConfig,
) -> State:
    """Draws tokens until step `until`, or until every row is done.

    Args:
      prepared: from `prepare`.  state: donated.  sampling: per row.
      uniforms: f32[B, C] in [0, 1): what decides each draw, from `row_uniforms`.
      stop_ids: i32[E] tokens that end a row (-1 = none).
      until: i32 scalar, at most the room in the cache.
    """

    # one table for all steps: the compiler would work out sines again for every head of every layer
    positions = jnp.arange(state.prompt_keys[0].shape[3] + state.keys[0].shape[3], dtype=jnp.int32)
    ropes = transformer.rope_tables(cfg, positions[None])

    def more(state: State) -> Array:
        return (state.step < until) & ~jnp.all(state.done)

    def one(state: State) -> State:
        logits = next_logits(prepared, state.hidden, cfg)
        uniform = jax.lax.dynamic_index_in_dim(uniforms, state.step, axis=1, keepdims=False)
        drawn = sample(logits, sampling, uniform)
        live = ~state.done
        token = jnp.where(live, drawn.token, 0)

        def put(array: Array, value: Array) -> Array:
            return jax.lax.dynamic_update_slice(array, value[:, None], (0, state.step))

        hidden, keys, values = _advance(prepared, state, token, ropes, cfg)
        return dataclasses.replace(
            state,
            keys=keys,
            values=values,
            hidden=hidden,
            step=state.step + 1,
            done=state.done | jnp.any(drawn.token[:, None] == stop_ids, axis=1),
            tokens=put(state.tokens, token),
            behaviour_logp=put(state.behaviour_logp, jnp.where(live, drawn.behaviour_logp, 0)),
            raw_logp=put(state.raw_logp, jnp.where(live, drawn.raw_logp, 0)),
            log_kept=put(state.log_kept, jnp.where(live, drawn.log_kept, 0)),
            counts=state.counts + live,
        )

    return jax.lax.while_loop(more, one, state)


@jax.jit
def stop(state: State, rows: Array, counts: Array) -> State:
    """Ends the given rows (bool[B]) after `counts` (i32[B]) tokens; what they drew later is dropped."""
    return dataclasses.replace(
        state, done=state.done | rows, counts=jnp.where(rows, jnp.minimum(counts, state.counts), state.counts)
    )


@jax.jit
def collect(
    state: State, prompts: Array, temperature: Array, group: Array, policy_version: Array
) -> Trajectories:
    """Joins prompts i32[B, P] and completions into left-aligned rows of P + C tokens."""
    capacity = state.tokens.shape[1]
    size = prompts.shape[1] + capacity
    lengths = state.prompt_lengths + state.counts
    column = jnp.broadcast_to(jnp.arange(size), (prompts.shape[0], size))
    drawn_at = jnp.clip(column - state.prompt_lengths[:, None], 0, capacity - 1)
    action_mask = (column >= state.prompt_lengths[:, None]) & (column < lengths[:, None])

    def place(drawn: Array) -> Array:
        return jnp.where(action_mask, jnp.take_along_axis(drawn, drawn_at, axis=1), 0)

    padded = jnp.pad(prompts, ((0, 0), (0, capacity)))
    return Trajectories(
        tokens=jnp.where(column < state.prompt_lengths[:, None], padded, place(state.tokens)),
        lengths=lengths,
        action_mask=action_mask,
        behaviour_logp=place(state.behaviour_logp),
        raw_logp=place(state.raw_logp),
        log_kept=place(state.log_kept),
        temperature=temperature,
        finished=state.done,
        group=group,
        policy_version=jnp.where(action_mask, policy_version, -1),
    )


def rooms(max_new_tokens: int, first: int = 64) -> list[int]:
    """How much room for new tokens the cache has, stage by stage: it doubles, so a long completion costs few
    compilations and a step reads at most twice what it needs."""
    ends = [min(first, max_new_tokens)]
    while ends[-1] < max_new_tokens:
        ends.append(min(2 * ends[-1], max_new_tokens))
    return ends


def generate(
    prepared: Tree,
    cfg: ModelConfig,
    prompts: np.ndarray,
    prompt_lengths: np.ndarray,
    *,
    num_generations: int,
    max_new_tokens: int,
    sampling: Sampling,
    key: Array,
    uids: np.ndarray,
    stop_ids: Sequence[int],
    policy_version: int = 0,
    find_stop: Callable[[np.ndarray], int | None] | None = None,
    check_every: int = 32,
    rules: ShardingRules | None = None,
) -> Trajectories:
    """Samples `num_generations` completions of each prompt.

    Args:
      prepared: from `prepare`.
      prompts: i32[M, P] right-padded.  prompt_lengths: i32[M], at least 1.
      num_generations: G; row i·G + j of the result continues prompt i and has group i.
      max_new_tokens: C, a static shape.
      sampling: parameters of the M·G rows (traced).
      key, uids: i32[M·G]; a row's draws depend on the key, its uid and the position alone.
      stop_ids: tokens that end a completion and belong to it.
      policy_version: written to every token.
      find_stop: given a row's new token ids i32[n], how many of them to keep if a stop string ends the
        row, else None. Called on the host every `check_every` tokens for rows that have drawn since.
      rules: how rows and heads lie on the mesh in context; None = on the default device.

    Returns:
      `Trajectories` of M·G rows and P + C columns.

    Raises:
      ValueError: an empty prompt, arguments of the wrong length, or a bidirectional model.
    """
    count = len(prompts)
    if np.min(prompt_lengths) < 1:
        raise ValueError(f"prompt {int(np.argmin(prompt_lengths))} is empty; a prompt needs a token")
    batch = count * num_generations
    if len(uids) != batch or sampling.temperature.shape != (batch,):
        raise ValueError(
            f"{count} prompts × {num_generations} generations need {batch} uids and sampling rows, "
            f"got {len(uids)} and {sampling.temperature.shape[0]}"
        )
    ids = jnp.asarray([*stop_ids, -1], jnp.int32)
    tokens, lengths, row_ids = (
        jax.device_put(np.asarray(x, np.int32), None if rules is None else rules.spec(("batch",)))
        for x in (prompts, prompt_lengths, uids)
    )
    uniforms = row_uniforms(key, row_ids, jnp.repeat(lengths, num_generations), max_new_tokens)
    stages = rooms(max_new_tokens)
    state = prefill(
        prepared,
        tokens,
        lengths,
        cfg,
        num_generations=num_generations,
        max_new_tokens=max_new_tokens,
        room=stages[0],
        rules=rules,
    )
    step = 0
    for room in stages:
        state = grow(state, room - step) if step else state
        while step < room:
            step = min(step + check_every, room) if find_stop else room
            until = jnp.asarray(step, jnp.int32)
            live = ~state.done
            state = decode(prepared, state, sampling, uniforms, ids, until, cfg)
            if find_stop is not None:
                state = _stop_strings(state, find_stop, live)
        if bool(jnp.all(state.done)):
            break
    return collect(
        state,
        jnp.repeat(tokens, num_generations, axis=0),
        sampling.temperature,
        jnp.repeat(jnp.arange(count, dtype=jnp.int32), num_generations),
        jnp.asarray(policy_version, jnp.int32),
    )


def _stop_strings(state: State, find_stop: Callable[[np.ndarray], int | None], live: Array) -> State:
    """Ends rows at their stop strings; live bool[B]: those that have drawn since the last look."""
    tokens, counts, live = jax.device_get((state.tokens, state.counts, live))
    rows = np.zeros(len(counts), bool)
    keep = counts.copy()
    for row in np.flatnonzero(live):
        end = find_stop(tokens[row, : counts[row]])
        if end is not None:
            rows[row], keep[row] = True, end
    return stop(state, jnp.asarray(rows), jnp.asarray(keep)) if rows.any() else state
