"""A masked-diffusion LM: at every position of a row, which token could stand there, given all the others.

Decoders and losses mask some tokens and ask about those positions alone, so the vocabulary matrix, whose
output is most of the memory, is applied there and nowhere else.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.models import transformer
from jaxrl_llm.models.attention import row_attention
from jaxrl_llm.models.config import ModelConfig, require_denoiser
from jaxrl_llm.models.params import Tree
from jaxrl_llm.parallel.sharding import ShardingRules

Array = jax.Array
Cache = tuple[tuple[Array, Array], ...]
"""Keys (rotated) and values of each layer, f[N, L, K, h]."""


def prepare(params: Tree, cfg: ModelConfig, dtype: Any = jnp.float32) -> Tree:
    """Params as decoding wants them: a tuple of layers, in the compute dtype. Once per params version.

    A pass has a whole row or more to multiply, so weights stay as training has them: those that
    `transformer.fuse` lays out for a token at a time took 15% longer (CPU, one row of 80), stacked ones 40%.
    """
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    return params | {"layers": _apart(params["layers"], cfg)}


def _apart(layers: Tree, cfg: ModelConfig) -> tuple[Tree, ...]:
    """Each layer by itself."""
    if isinstance(layers, tuple):
        return layers
    return tuple(jax.tree.map(lambda x, i=i: x[i], layers) for i in range(cfg.num_layers))


def predictors(cfg: ModelConfig, columns: Array, positions: Array | None = None) -> Array:
    """Where the states stand that predict the tokens in `columns`.

    A model with cfg.logits_shift predicts token j by its output at j - 1, and the first token of a sequence,
    which has nothing before it, by that token's own output (as Dream's decoder does).

    Args:
      columns: i32[N, C] of a row, or of a window of it that a decoder runs by itself.
      positions: i32[N, T] within each sequence of packed rows; None = one sequence per row.

    Returns:
      i32[N, C].
    """
    if not cfg.logits_shift:
        return columns
    at = columns if positions is None else jnp.take_along_axis(positions, columns, axis=1)
    return columns - (at > 0)


def states(
    params: Tree,
    tokens: Array,
    cfg: ModelConfig,
    *,
    columns: Array | None = None,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    dtype: Any = jnp.float32,
    remat: str = "none",
    rules: ShardingRules | None = None,
) -> Array:
    """The states from which the head predicts the tokens in `columns`.

    Args:
      params, tokens i32[N, T], cfg, positions, dtype, remat, rules: as `transformer.forward`.
      columns: i32[N, C], each in 0..T-1; None = all of them, in order.
      segment_ids: i32[N, T] as `transformer.forward`. A row with padding needs them (1 for a token, 0 for
        padding): without, padding is looked at like any other token.

    Returns:
      f[N, C, D] in `dtype`, for `transformer.logits` or a fused log-prob.

    Raises:
      ValueError: a causal model, or one without a mask token.
    """
    require_denoiser(cfg, "denoising")
    hidden = transformer.forward(
        params,
        tokens,
        cfg,
        positions=positions,
        segment_ids=segment_ids,
        dtype=dtype,
        remat=remat,
        rules=rules,
    )
    if columns is None:
        if not cfg.logits_shift:
            return hidden
        columns = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return jnp.take_along_axis(hidden, predictors(cfg, columns, positions)[:, :, None], axis=1)


def denoise(
    params: Tree,
    tokens: Array,
    cfg: ModelConfig,
    *,
    columns: Array | None = None,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    dtype: Any = jnp.float32,
    rules: ShardingRules | None = None,
) -> Array:
    """Logits of the tokens in `columns`. Arguments and errors are those of `states`.

    The mask token has a logit like any other: whether it may be proposed is the decoder's choice.

    Returns:
      f32[N, C, V].
    """
    hidden = states(
        params,
        tokens,
        cfg,
        columns=columns,
        positions=positions,
        segment_ids=segment_ids,
        dtype=dtype,
        rules=rules,
    )
    return transformer.logits(params, hidden, cfg)


def window_states(
    params: Tree,
    tokens: Array,
    cfg: ModelConfig,
    *,
    start: Array,
    lengths: Array,
    columns: Array,
    cache: Cache | None = None,
    dtype: Any = jnp.float32,
) -> tuple[Array, Cache]:
    """`states` of a window of each row, which looks at itself and at the rest of the row as it was cached.

    What is cached of the window's own columns is not looked at, so a cache of the whole row serves every
    window. Keys are cached as rotated to their places, which do not change.

    Args:
      params: stacked, or better as `prepare` gives them: the layers are unrolled here.
      tokens: i32[N, W], from column start i32[N] on. What lies at and beyond lengths i32[N] is padding.
      columns: i32[N, C] of the window whose tokens are to be predicted, each in 0..W-1. A model with
        logits_shift predicts the window's first token by that token's own output, as Fast-dLLM does.
      cache: of a pass over the whole rows (start 0, W = L); None = there is nothing but the window.

    Returns:
      f[N, C, D] as `states`, and the window's keys and values.

    Raises:
      ValueError: a causal model, or one without a mask token.
    """
    require_denoiser(cfg, "denoising")
    own = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    inside = own < lengths[:, None]
    if cache is not None:
        rest = jnp.broadcast_to(jnp.arange(cache[0][0].shape[1]), (len(tokens), cache[0][0].shape[1]))
        seen = ((rest < start[:, None]) | (rest > own[:, -1:])) & (rest < lengths[:, None])
        inside = jnp.concatenate([seen, inside], axis=1)
    (rope,) = transformer.rope_tables(cfg, own).values()
    new: list[tuple[Array, Array]] = []

    def attend(q: Array, k: Array, v: Array) -> Array:
        new.append((k, v))
        if cache is not None:
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(cache[len(new) - 1], (k, v)))
        return row_attention(
            q,
            k,
            v,
            own,
            inside.astype(jnp.int32),
            None,
            window=None,
            scale=transformer.score_scale(cfg),
            softcap=cfg.attention_softcap,
            rules=None,
            causal=False,
        )

    x = transformer.embed(params, tokens, cfg, dtype)
    for layer in _apart(params["layers"], cfg):
        x = transformer.block(layer, x, cfg, rope, attend)
    hidden = transformer.rms_norm(x, params["final_norm"], cfg)
    return jnp.take_along_axis(hidden, predictors(cfg, columns)[:, :, None], axis=1), tuple(new)
