"""The decoder: parameters, one layer, and the forward pass of training.

A layer is `block(layer, x, cfg, rope, attend)`: it projects, rotates, and hands queries, keys and values to
`attend`, which the caller supplies. Training attends over the row itself; the sampler attends over its
cache; both run the same layer.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.models import rope as rotary
from jaxrl_llm.models.attention import ATTENTION, row_attention
from jaxrl_llm.models.config import ModelConfig, require_causal
from jaxrl_llm.models.params import ParamSpec, Tree, map_specs
from jaxrl_llm.parallel.sharding import ShardingRules, constrain

Array = jax.Array
Attend = Callable[[Array, Array, Array], Array]
"""(q [N,T,H,h], k [N,T,K,h], v [N,T,K,h]) -> [N,T,H,h]."""

FEW = 128
"""Rows up to which a product takes as long as reading its weight."""

REMAT: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION),
    ),
}
"""What the backward pass keeps of a layer: all, nothing, or what weight products and attention gave."""


def layer_specs(cfg: ModelConfig) -> Tree:
    """`ParamSpec` of one layer."""
    d, f, h = cfg.hidden_size, cfg.intermediate_size, cfg.head_dim
    heads, kv = cfg.num_heads, cfg.num_kv_heads
    norm_init = "zeros" if cfg.norm_plus_one else "ones"

    def norm(size: int, axis: str | None) -> ParamSpec:
        return ParamSpec((size,), (axis,), norm_init)

    def bias(*sizes: int, axes: tuple[str | None, ...]) -> ParamSpec:
        return ParamSpec(sizes, axes, "zeros")

    specs = {
        "attn_norm": norm(d, None),
        "q": ParamSpec((d, heads, h), ("embed", "heads", "head_dim"), fan_in=d),
        "k": ParamSpec((d, kv, h), ("embed", "kv_heads", "head_dim"), fan_in=d),
        "v": ParamSpec((d, kv, h), ("embed", "kv_heads", "head_dim"), fan_in=d),
        "o": ParamSpec((heads, h, d), ("heads", "head_dim", "embed"), fan_in=heads * h),
        "mlp_norm": norm(d, None),
        "gate": ParamSpec((d, f), ("embed", "mlp"), fan_in=d),
        "up": ParamSpec((d, f), ("embed", "mlp"), fan_in=d),
        "down": ParamSpec((f, d), ("mlp", "embed"), fan_in=f),
    }
    if cfg.qkv_bias:
        specs["q_bias"] = bias(heads, h, axes=("heads", "head_dim"))
        specs["k_bias"] = bias(kv, h, axes=("kv_heads", "head_dim"))
        specs["v_bias"] = bias(kv, h, axes=("kv_heads", "head_dim"))
    if cfg.out_bias:
        specs["o_bias"] = bias(d, axes=(None,))
    if cfg.mlp_bias:
        specs["gate_bias"] = bias(f, axes=("mlp",))
        specs["up_bias"] = bias(f, axes=("mlp",))
        specs["down_bias"] = bias(d, axes=(None,))
    if cfg.qk_norm:
        specs["q_norm"] = norm(h, None)
        specs["k_norm"] = norm(h, None)
    if cfg.post_norms:
        specs["post_attn_norm"] = norm(d, None)
        specs["post_mlp_norm"] = norm(d, None)
    return specs


def param_specs(cfg: ModelConfig) -> Tree:
    """`ParamSpec` of every parameter; those of layers are stacked on a leading axis L."""
    head = ParamSpec((cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"), "embed")
    specs = {
        # as large as what the blocks add to it, else they drown it; but a head must start small
        "embed": head if cfg.tied_head else dataclasses.replace(head, init="normal"),
        "layers": map_specs(
            lambda s: ParamSpec((cfg.num_layers, *s.shape), ("layers", *s.axes), s.init, s.fan_in),
            layer_specs(cfg),
        ),
        "final_norm": ParamSpec((cfg.hidden_size,), (None,), "zeros" if cfg.norm_plus_one else "ones"),
    }
    if not cfg.tied_head:
        specs["head"] = head
    return specs


def head(params: Tree) -> Array:
    """The output matrix [V, D]: its own, or the embedding where tied."""
    return params["head"] if "head" in params else params["embed"]


def rms_norm(x: Array, weight: Array, cfg: ModelConfig) -> Array:
    """x / rms(x) · w over the last axis (Gemma: · (1 + w)), in float32, returned in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + cfg.norm_eps)
    if cfg.norm_plus_one:
        return (y * (1 + weight.astype(jnp.float32))).astype(x.dtype)
    return y.astype(x.dtype) * weight.astype(x.dtype)


def project(x: Array, weight: Array, bias: Array | None = None, *, inputs: int = 1) -> Array:
    """x f[..., *in] times weight [*in, *out] with float32 accumulation, in x's dtype: f[..., *out].

    As a product of two matrices: contracting over rows and positions at once in the backward pass would
    make the CPU compiler transpose activations (five times slower, measured).

    Args:
      inputs: number of dimensions in `in`.
    """
    size = math.prod(weight.shape[:inputs])
    y = jnp.dot(
        x.reshape(-1, size), weight.astype(x.dtype).reshape(size, -1), preferred_element_type=jnp.float32
    )
    y = y.astype(x.dtype).reshape(*x.shape[:-inputs], *weight.shape[inputs:])
    return y if bias is None else y + bias.astype(x.dtype)


def project_fused(x: Array, weight: Array, bias: Array | None = None, *, inputs: int = 1) -> Array:
    """As `project`, with a weight [*out, *in] from `fuse`."""
    size = math.prod(weight.shape[weight.ndim - inputs :])
    y = times_transposed(x.reshape(-1, size), weight.reshape(-1, size)).astype(x.dtype)
    y = y.reshape(*x.shape[:-inputs], *weight.shape[: weight.ndim - inputs])
    return y if bias is None else y + bias.astype(x.dtype)


def times_transposed(x: Array, weight: Array) -> Array:
    """x f[B, D] times the transpose of weight f[N, D]: f32[B, N].

    Of few rows with the weight on the left: the CPU's product the other way round takes up to twice as long,
    and the compiler would turn this one round but for the barrier.
    """
    contract = (((1,), (1,)), ((), ()))
    if len(x) > FEW:
        return jax.lax.dot_general(x, weight, contract, preferred_element_type=jnp.float32)
    y = jax.lax.dot_general(weight, x, contract, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(y).T


def embed(
    params: Tree,
    tokens: Array,
    cfg: ModelConfig,
    dtype: Any = jnp.float32,
    rules: ShardingRules | None = None,
) -> Array:
    """tokens i32[...] -> f[..., D] in the compute dtype."""
    # whole rows before the lookup: from columns spread over 'fsdp' the partitioner replicates the result
    table = constrain(params["embed"], ("vocab", None), rules)
    x = jnp.take(table, tokens, axis=0).astype(dtype)
    return x * jnp.asarray(cfg.hidden_size**0.5, dtype) if cfg.embed_scale else x


def rope_tables(cfg: ModelConfig, positions: Array) -> dict[str, tuple[Array, Array]]:
    """cos and sin at `positions` i32[N, T] for each kind of layer that the model has."""
    kinds = sorted(set(cfg.layer_kinds) or {"global"})
    ropes = {kind: cfg.rope_local or cfg.rope if kind == "local" else cfg.rope for kind in kinds}
    return {kind: rotary.table(rope, cfg.head_dim, positions) for kind, rope in ropes.items()}


def score_scale(cfg: ModelConfig) -> float:
    """What attention scores are multiplied by."""
    return cfg.head_dim**-0.5 if cfg.query_scale is None else cfg.query_scale


def fuse(layer: Tree) -> Tree:
    """A layer's params with q, k, v in one matrix and gate, up in another, all as [*out, *in]: fewer, larger
    products, and each output's weights lie together.

    For decoding, where a step is bound by reading weights; training keeps them apart so that each can
    be sharded by its own axis.
    """
    out = {name: x for name, x in layer.items() if name.split("_")[0] not in ("q", "k", "v", "gate", "up")}
    out |= {name: layer[name] for name in ("q_norm", "k_norm") if name in layer}
    for fused, parts in (("qkv", ("q", "k", "v")), ("gate_up", ("gate", "up"))):
        axis = -2 if fused == "qkv" else -1
        for suffix in ("", "_bias"):
            if parts[0] + suffix in layer:
                out[fused + suffix] = jnp.concatenate([layer[part + suffix] for part in parts], axis=axis)
    for name, inputs in (("qkv", 1), ("o", 2), ("gate_up", 1), ("down", 1)):
        axes = range(out[name].ndim)
        out[name] = out[name].transpose(*axes[inputs:], *axes[:inputs])
    return out


def block(layer: Tree, x: Array, cfg: ModelConfig, rope: tuple[Array, Array], attend: Attend) -> Array:
    """One decoder layer.

    Args:
      layer: its params (unstacked), as `layer_specs` or as `fuse` lays them out.
      x: f[N, T, D].  rope: cos and sin f32[N, T, 1, h].
      attend: what the queries look at.

    Returns:
      f[N, T, D].
    """
    fused = "qkv" in layer
    back = project_fused if fused else project
    y = rms_norm(x, layer["attn_norm"], cfg)
    if fused:
        qkv = project_fused(y, layer["qkv"], layer.get("qkv_bias"))
        q, k, v = jnp.split(qkv, (cfg.num_heads, cfg.num_heads + cfg.num_kv_heads), axis=2)
    else:
        q = project(y, layer["q"], layer.get("q_bias"))
        k = project(y, layer["k"], layer.get("k_bias"))
        v = project(y, layer["v"], layer.get("v_bias"))
    if cfg.qk_norm:
        q, k = rms_norm(q, layer["q_norm"], cfg), rms_norm(k, layer["k_norm"], cfg)
    y = attend(rotary.rotate(q, *rope), rotary.rotate(k, *rope), v)
    y = back(y, layer["o"], layer.get("o_bias"), inputs=2)
    x = x + (rms_norm(y, layer["post_attn_norm"], cfg) if cfg.post_norms else y)

    y = rms_norm(x, layer["mlp_norm"], cfg)
    if fused:
        gate_up = project_fused(y, layer["gate_up"], layer.get("gate_up_bias"))
        gate, up = jnp.split(gate_up, 2, axis=-1)
    else:
        gate = project(y, layer["gate"], layer.get("gate_bias"))
        up = project(y, layer["up"], layer.get("up_bias"))
    y = up * (jax.nn.silu(gate) if cfg.activation == "silu" else jax.nn.gelu(gate, approximate=True))
    y = back(y, layer["down"], layer.get("down_bias"))
    return x + (rms_norm(y, layer["post_mlp_norm"], cfg) if cfg.post_norms else y)


def forward(
    params: Tree,
    tokens: Array,
    cfg: ModelConfig,
    *,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    dtype: Any = jnp.float32,
    remat: str = "none",
    rules: ShardingRules | None = None,
) -> Array:
    """Hidden states after the final norm; `logits` or a fused log-prob turns them into predictions.

    Rows are right-padded: padding comes after every real token, so a causal mask alone hides it. A model
    with cfg.causal=False looks ahead, so its padding needs a segment of its own.

    Args:
      params: as `param_specs` describes; or with a tuple of layers, each fused or not, which are unrolled
        instead of scanned.
      tokens: i32[N, T].
      positions: i32[N, T] within each sequence; None = 0..T-1.
      segment_ids: i32[N, T] of packed rows (0 = padding); None = one sequence per row.
      dtype: compute dtype; params are cast to it where they are used.
      remat: a key of `REMAT`.
      rules: how activations are laid out on the mesh in context; None = wherever the compiler likes.

    Returns:
      f[N, T, D] in `dtype`.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    ropes = rope_tables(cfg, positions)

    def layer(weights: Tree, local: Array, x: Array) -> Array:
        def attend(q: Array, k: Array, v: Array) -> Array:
            return _attend_row(cfg, rules)(q, k, v, positions, segment_ids, local)

        x = block(weights, x, cfg, _rope_of(ropes, local), attend)
        return constrain(x, ("batch", "length", None), rules)

    x = constrain(embed(params, tokens, cfg, dtype, rules), ("batch", "length", None), rules)
    return rms_norm(_scan_layers(params, cfg, layer, x, remat), params["final_norm"], cfg)


def forward_groups(
    params: Tree,
    prompts: Array,
    prompt_lengths: Array,
    tokens: Array,
    cfg: ModelConfig,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    rules: ShardingRules | None = None,
) -> tuple[Array, Array]:
    """`forward` of rows that continue a common prompt, which is computed once for all of them.

    Args:
      prompts: i32[M, P], each ending in the last column, where its continuations begin; what stands before
        it is not looked at.
      prompt_lengths: i32[M].
      tokens: i32[N, C]; row i continues prompt i·M//N. Padded on the right.
      params, cfg, dtype, remat, rules: as `forward`.

    Returns:
      Hidden states f[M, P, D] of the prompts and f[N, C, D] of the continuations.

    Raises:
      ValueError: a bidirectional model, whose prompts look at what continues them.
    """
    require_causal(cfg, "a prompt that is computed once for a group")
    slots, width = prompts.shape[1], tokens.shape[1]

    def spread(x: Array) -> Array:
        return jnp.repeat(x, len(tokens) // len(prompts), axis=0)

    columns = jnp.arange(slots, dtype=jnp.int32) - slots + prompt_lengths[:, None]
    positions, segments = jnp.maximum(columns, 0), (columns >= 0).astype(jnp.int32)
    own = spread(prompt_lengths)[:, None] + jnp.arange(width, dtype=jnp.int32)
    both_positions = jnp.concatenate([spread(positions), own], axis=1)
    both_segments = jnp.concatenate([spread(segments), jnp.ones_like(own)], axis=1)
    ropes, own_ropes = rope_tables(cfg, positions), rope_tables(cfg, own)
    axes = ("batch", "length", None)

    def layer(weights: Tree, local: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        prompt, x = carry
        seen: list[Array] = []

        def attend_prompt(q: Array, k: Array, v: Array) -> Array:
            seen.extend((k, v))
            return _attend_row(cfg, rules)(q, k, v, positions, segments, local)

        def attend(q: Array, k: Array, v: Array) -> Array:
            k, v = (jnp.concatenate([spread(a), b], axis=1) for a, b in zip(seen, (k, v)))
            return _attend_row(cfg, rules)(q, k, v, both_positions, both_segments, local)

        prompt = block(weights, prompt, cfg, _rope_of(ropes, local), attend_prompt)
        x = block(weights, x, cfg, _rope_of(own_ropes, local), attend)
        return constrain(prompt, axes, rules), constrain(x, axes, rules)

    start = tuple(constrain(embed(params, x, cfg, dtype, rules), axes, rules) for x in (prompts, tokens))
    prompt, x = _scan_layers(params, cfg, layer, start, remat)
    return rms_norm(prompt, params["final_norm"], cfg), rms_norm(x, params["final_norm"], cfg)


def _rope_of(ropes: dict[str, tuple[Array, Array]], local: Array) -> tuple[Array, Array]:
    """The table of a layer that is local or not."""
    if len(ropes) > 1:
        return jax.tree.map(lambda a, b: jnp.where(local, a, b), ropes["local"], ropes["global"])
    (rope,) = ropes.values()
    return rope


def _attend_row(cfg: ModelConfig, rules: ShardingRules | None) -> Callable[..., Array]:
    """`row_attention` of this model: (q, k, v, positions, segment_ids, local) -> f[N, T, H, h]."""
    kinds = set(cfg.layer_kinds)

    def attend(q: Array, k: Array, v: Array, positions: Array, segments: Array | None, local: Array) -> Array:
        return row_attention(
            q,
            k,
            v,
            positions,
            segments,
            local if len(kinds) > 1 else None,
            window=cfg.window if "local" in kinds else None,
            scale=score_scale(cfg),
            softcap=cfg.attention_softcap,
            rules=rules,
            causal=cfg.causal,
        )

    return attend


def _scan_layers(
    params: Tree, cfg: ModelConfig, layer: Callable[[Tree, Array, Any], Any], x: Any, remat: str
) -> Any:
    """Applies `layer(weights, is_local, x)` for every layer in turn."""

    def step(x: Any, scanned: tuple[Tree, Array]) -> tuple[Any, None]:
        return layer(*scanned, x), None

    if remat != "none":
        step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=False)
    local = jnp.array([kind == "local" for kind in cfg.layer_kinds or ("global",) * cfg.num_layers])
    if isinstance(params["layers"], tuple):
        for index, weights in enumerate(params["layers"]):
            x, _ = step(x, (weights, local[index]))
        return x
    return jax.lax.scan(step, x, (params["layers"], local))[0]


def cap_logits(logits: Array, cfg: ModelConfig) -> Array:
    """c·tanh(z/c) where the family has it."""
    c = cfg.logit_softcap
    return logits if c is None else c * jnp.tanh(logits / c)


def logits(params: Tree, hidden: Array, cfg: ModelConfig) -> Array:
    """hidden f[..., D] -> float32 logits [..., V]."""
    weight = head(params).astype(hidden.dtype)
    return cap_logits(jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32), cfg)
