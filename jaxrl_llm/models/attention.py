"""Attention over explicit masks, and self-attention of whole rows. The kernels are JAX's own."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from jaxrl_llm.parallel.sharding import ShardingRules

Array = jax.Array

LANES = 128
"""Rows are padded to a multiple of this for the TPU kernel."""

ATTENTION = "attention"
"""Name of attention's outputs for `jax.checkpoint` policies."""

CHUNK, WIDE_CHUNK, MOST_CHUNKS = 64, 512, 8
"""Queries that are attended together elsewhere (without causality cutting saves memory alone: wider groups),
and how many such groups a row is cut into at most."""


def causal_mask(
    positions: Array,
    segment_ids: Array | None = None,
    window: Array | int | None = None,
    queries: int | None = None,
) -> Array:
    """Which keys each query sees in a row of S tokens.

    Args:
      positions: i32[N, S] position of each token in its own sequence.
      segment_ids: i32[N, S] which packed sequence a token belongs to; None = one per row.
      window: a token sees itself and window-1 tokens before it; None = all before it.
      queries: T, how many of the last tokens ask; None = all.

    Returns:
      bool[N, 1, T, S], True where the query (second to last axis) sees the key.
    """
    first = 0 if queries is None else positions.shape[1] - queries
    query, key = positions[:, None, first:, None], positions[:, None, None, :]
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    if segment_ids is not None:
        mask &= segment_ids[:, None, first:, None] == segment_ids[:, None, None, :]
    return mask


def attention(q: Array, k: Array, v: Array, mask: Array, *, scale: float, softcap: float | None) -> Array:
    """softmax(cap(q·k·scale) where mask)·v with grouped queries; scores and softmax in float32.

    Args:
      q: f[N, T, H, h];  k, v: f[N, S, K, h] with K dividing H;  mask: bool[N, 1, T, S] (or 1 for N).
      scale: multiplies the scores.  softcap: c of c·tanh(score/c); None = off.

    Returns:
      f[N, T, H, h] in q's dtype.
    """
    n, t, heads, width = q.shape
    q = q.reshape(n, t, k.shape[2], heads // k.shape[2], width).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("nkgth,nksh->nkgts", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, :, None], scores, -1e30)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("nkgts,nksh->nkgth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / total).transpose(0, 3, 1, 2, 4).reshape(n, t, heads, width).astype(v.dtype)


def row_attention(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    segment_ids: Array | None,
    local: Array | None,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    rules: ShardingRules | None,
    causal: bool = True,
) -> Array:
    """Attention of the last T tokens of rows over all S, with a window where the layer is local.

    On TPU this is JAX's splash-attention kernel, which never forms the T×T scores; elsewhere `attention`
    over a dense mask. The choice is made at lowering: a program compiled for a TPU gets the kernel wherever
    it is compiled. (Each branch leaves zeros for what the other one keeps for its gradient; XLA drops them.)

    Args:
      q: f[N, T, H, h];  k, v: f[N, S, K, h] with K dividing H.
      positions: i32[N, S], counting up by one within each sequence.
      segment_ids: i32[N, S] which packed sequence (contiguous) a token belongs to; None = one per row.
      local: bool[], whether `window` applies to this layer; None = it does if there is one.
      window: a token sees itself and window-1 tokens before it; None = all before it.
      scale, softcap: as `attention`.
      rules: how activations lie on the mesh in context; None = on one device.
      causal: whether a token sees those before it alone, or its whole sequence (then padding is hidden only
        by having a segment of its own).

    Returns:
      f[N, T, H, h] in q's dtype.

    Raises:
      ValueError: a window without causality.
    """
    if not causal and window is not None:
        raise ValueError(f"window={window} looks back only: bidirectional attention has none")

    def dense(
        q: Array, k: Array, v: Array, positions: Array, segments: Array | None, local: Array | None
    ) -> Array:
        queries, keys = q.shape[1], k.shape[1]
        if causal:
            width = window if local is None or window is None else jnp.where(local, window, keys)
            mask = causal_mask(positions, segments, width, queries)
        elif segments is None:
            mask = jnp.ones((1, 1, queries, keys), bool)
        else:
            mask = segments[:, None, keys - queries :, None] == segments[:, None, None, :]
        size = max(CHUNK if causal else WIDE_CHUNK, -(-queries // MOST_CHUNKS))
        out = []
        for begin in range(0, queries, size):  # causal: keys after a query's chunk are never looked at
            end = begin + size
            last = keys - queries + end if causal else keys
            rows, seen = q[:, begin:end], mask[:, :, begin:end, :last]
            out.append(attention(rows, k[:, :last], v[:, :last], seen, scale=scale, softcap=softcap))
        return checkpoint_name(jnp.concatenate(out, axis=1), ATTENTION)

    def tpu(
        q: Array, k: Array, v: Array, positions: Array, segments: Array | None, local: Array | None
    ) -> Array:
        run = partial(splash_rows, window=window, scale=scale, softcap=softcap, causal=causal)
        if rules is None:
            return run(q, k, v, segments, local)
        heads, kv_heads = (rules.spec(("batch", None, name, None)) for name in ("heads", "kv_heads"))
        if kv_heads != heads:  # fewer key-value heads than pieces: every query head brings its own
            k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        rows = rules.spec(("batch", None))
        specs = (heads, heads, heads, rows, jax.P())
        return jax.shard_map(run, in_specs=specs, out_specs=heads, check_vma=False)(q, k, v, segments, local)

    return jax.lax.platform_dependent(q, k, v, positions, segment_ids, local, tpu=tpu, default=dense)


def splash_rows(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    local: Array | None,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    causal: bool = True,
    interpret: bool = False,
) -> Array:
    """`row_attention` of the rows and heads of one TPU. Arguments and result are the same.

    Args:
      interpret: emulate the kernel, to test it on other devices.
    """
    _, length, heads, _ = q.shape
    before = k.shape[1] - length
    # after the last token causality hides padding, if there is any; elsewhere its segment does
    if (before or not causal) and segment_ids is None:
        segment_ids = jnp.ones(k.shape[:2], jnp.int32)
    room = -before % LANES, -length % LANES
    offset = before + room[0]

    def block(size: int) -> int:
        return next(b for b in (512, 256, 128) if size % b == 0)

    block_q, block_kv = block(length + room[1]), block(offset + length + room[1])
    blocks = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )

    def by_head(x: Array, first: int) -> Array:
        return jnp.pad(x, ((0, 0), (first, room[1]), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    segments = None
    if segment_ids is not None:
        padded = jnp.pad(segment_ids, ((0, 0), room), constant_values=-1)
        segments = splash.SegmentIds(padded[:, offset:], padded)

    def run(window: int | None, q: Array, k: Array, v: Array) -> Array:
        shape = q.shape[2], k.shape[2]
        if not causal:
            one: splash.Mask = splash.FullMask(shape)
        elif window is None:
            one = splash.CausalMask(shape, offset)
        else:
            one = splash.LocalMask(shape, (window - 1, 0), offset)
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([one] * heads),
            block_sizes=blocks,
            attn_logits_soft_cap=softcap,
            residual_checkpoint_name=ATTENTION,
            interpret=interpret,
        )
        return jax.vmap(kernel)(q, k, v, segments)

    args = by_head(q * scale, 0), by_head(k, room[0]), by_head(v, room[0])
    if window is None or local is None:
        out = run(window, *args)
    else:
        out = jax.lax.cond(local, partial(run, window), partial(run, None), *args)
    return out.transpose(0, 2, 1, 3)[:, :length]
