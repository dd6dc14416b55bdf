"""`clipped_policy_loss`: rewards or advantages and log-probs in, one loss with its metrics out."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_kernels import dispatch
from jaxrl_kernels.clipped_policy_loss import pallas_tpu, xla
from jaxrl_kernels.clipped_policy_loss.rules import Operands, Rule, TokenTerms, sequence_terms
from jaxrl_kernels.group_advantage import group_advantage

Array = jax.Array
Mean = tuple[Array, Array]
"""A mean before its division: (sum, weight)."""

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")


class Kind(NamedTuple):
    """A published method: what its name stands for unless the caller says otherwise."""

    surrogate: str
    mode: str | None
    aggregation: str
    epsilon: float = 0.2
    epsilon_high: float | None = None  # None = epsilon


KINDS = {
    "ppo": Kind("ppo_clip", None, "token_mean"),
    "grpo": Kind("ppo_clip", "grpo", "seq_mean_token_mean"),
    "dr_grpo": Kind("ppo_clip", "mean_only", "seq_mean_token_sum_norm"),
    "dapo": Kind("ppo_clip", "grpo", "token_mean", epsilon_high=0.28),
    "gspo": Kind("gspo", "grpo", "seq_mean_token_mean", epsilon=3e-4, epsilon_high=4e-4),
    "cispo": Kind("cispo", "grpo", "token_mean"),
    "dgpo": Kind("dgpo", "grpo", "token_mean"),
}


class PolicyLoss(NamedTuple):
    """What `clipped_policy_loss` returns; scalars, float32 or wider.

    Attributes:
      sum: the loss before its division; the gradient by logp flows here alone.
      weight: what to divide by; independent of params, so pieces of a batch add up.
      metrics: (sum, weight) by name. Shares of the tokens: `clip_ratio/{low,high,region}_mean`,
        `clip_ratio/dual_mean` with delta, `clamped_ratio`; with ref_logp the mean `kl` (nats) and
        `kl_clamped_ratio`; with rewards the metrics of `group_advantage`.
    """

    sum: Array
    weight: Array
    metrics: dict[str, Mean]


@dataclasses.dataclass(frozen=True)
class _Static:
    """The static half of a call."""

    rule: Rule
    aggregation: str
    norm: float
    implementation: str | None


class _Slopes(NamedTuple):
    """What the gradient is made of: factor·(token + row) at every token that counts.

    Attributes:
      token: f[N, T], or None for none.
      row: f[N], or None for none.
      factor: f[N] what a row's sum of token losses is multiplied by in the whole.
      mask: bool[N, T].
      like: of logp's dtype.
    """

    token: Array | None
    row: Array | None
    factor: Array
    mask: Array
    like: Array


def _run(static: _Static, with_slope: bool, operands: Operands) -> tuple[Array, TokenTerms, _Slopes]:
    """Loss (scalar), sums f[N] over the rows' tokens, and the slopes."""
    is_gspo = static.rule.surrogate == "gspo"
    options = static.rule, with_slope and not (is_gspo and operands.ref_logp is None)
    sums, slope = dispatch.run(
        static.implementation if operands.mask.size else "xla",
        operands,
        pallas_tpu=partial(pallas_tpu.token_pass, *options),
        xla=partial(xla.token_pass, *options),
    )
    row_slope = None
    if is_gspo:
        sums, row_slope = sequence_terms(static.rule, sums, operands.advantages[:, 0])
    if static.aggregation == "seq_mean_token_mean":
        factor = 1 / jnp.maximum(sums.tokens, 1)
    else:
        factor = jnp.full_like(sums.tokens, 1 / static.norm)
    like = jnp.zeros((0,), operands.logp.dtype)
    return jnp.sum(factor * sums.loss), sums, _Slopes(slope, row_slope, factor, operands.mask, like)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(static: _Static, operands: Operands) -> tuple[Array, TokenTerms]:
    return _run(static, False, operands)[:2]


def _loss_forward(static: _Static, operands: Operands) -> tuple[tuple[Array, TokenTerms], _Slopes]:
    total, sums, slopes = _run(static, True, operands)
    return (total, sums), slopes


def _loss_backward(static: _Static, slopes: _Slopes, cotangents: tuple[Array, TokenTerms]) -> tuple[Any]:
    row = 0 if slopes.row is None else jnp.where(slopes.mask, slopes.row[:, None], 0)
    token = 0 if slopes.token is None else slopes.token
    gradient = cotangents[0] * slopes.factor[:, None] * (token + row)
    return (Operands(gradient.astype(slopes.like.dtype), None, None, None, None),)  # type: ignore[arg-type]


_loss.defvjp(_loss_forward, _loss_backward)


def _check(
    kind: str, surrogate: str, low: float, high: float, delta: float | None, aggregation: str, norm: Any
) -> None:
    if low > 1 or high < 1:
        raise ValueError(f"epsilon and epsilon_high must not be negative: bounds {low} and {high}")
    if delta is not None and surrogate != "ppo_clip":
        raise ValueError(f"delta={delta}: kind {kind!r} has no dual clip")
    if delta is not None and delta <= 1:
        raise ValueError(f"delta={delta} bounds the ratio itself and must exceed 1; None for no dual clip")
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {aggregation!r}; one of {', '.join(AGGREGATIONS)}")
    if aggregation == "seq_mean_token_sum_norm" and norm is None:
        raise ValueError(f"{aggregation} needs norm, a constant length: pass the longest completion allowed")


def clipped_policy_loss(
    logp: Array,
    old_logp: Array,
    values: Array,
    group: Array | None,
    mask: Array,
    *,
    kind: str,
    epsilon: float | None = None,
    epsilon_high: float | None = None,
    delta: float | None = None,
    left_decay: float = 1.0,
    right_decay: float = 2.0,
    ref_logp: Array | None = None,
    beta: float = 0.0,
    aggregation: str | None = None,
    norm: float | None = None,
    mode: str | None = None,
    valid: Array | None = None,
    ddof: int = 1,
    advantage_epsilon: float = 1e-6,
    sample_weight: Array | None = None,
    anchor: Array | float | None = None,
    weight_scale: float = 1.3,
    implementation: str | None = None,
) -> PolicyLoss:
    """Advantage, ratio, clip, KL, aggregation and gradient of a policy objective, in one pass over [N, T].

    Equal to composing, from `jaxrl_llm`, the group advantage, the surrogate, `losses.kl_k3` times beta, and
    `losses.aggregate`; those are the definition. A kind is a choice of all of them, which the other keywords
    override:

      | kind    | surrogate | advantage | aggregation             | epsilon | epsilon_high |
      |---------|-----------|-----------|-------------------------|---------|--------------|
      | ppo     | ppo_clip  | given     | token_mean              | 0.2     | as epsilon   |
      | grpo    | ppo_clip  | grpo      | seq_mean_token_mean     | 0.2     | as epsilon   |
      | dr_grpo | ppo_clip  | mean_only | seq_mean_token_sum_norm | 0.2     | as epsilon   |
      | dapo    | ppo_clip  | grpo      | token_mean              | 0.2     | 0.28         |
      | gspo    | gspo      | grpo      | seq_mean_token_mean     | 3e-4    | 4e-4         |
      | cispo   | cispo     | grpo      | token_mean              | 0.2     | as epsilon   |
      | dgpo    | dgpo      | grpo      | token_mean              | 0.2     | as epsilon   |

    The derivative of every token's loss is in closed form and comes from the forward pass, which reads each
    log-prob once and, when differentiated, writes one float32 per token; the backward pass scales it.

    Under `jax.shard_map` over rows pass advantages, as groups may straddle devices (`group_advantage` of the
    gathered rewards), and add up `sum`, `weight` and the metrics over the row axes.

    Example:
      >>> logp, old_logp = jnp.full((4, 3), -1.0), jnp.full((4, 3), -1.1)
      >>> rewards, group = jnp.array([1.0, 0.0, 0.0, 2.0]), jnp.array([0, 0, 1, 1])
      >>> mask = jnp.arange(3) < jnp.array([[3], [2], [3], [1]])
      >>> loss = clipped_policy_loss(logp, old_logp, rewards, group, mask, kind="dapo")
      >>> round(float(loss.sum / loss.weight), 4)  # Σ −A·e^0.1·tokens over 9 tokens, A = ±√½
      0.0868

    Args:
      logp: f[N, T] log-probs (nats) under the policy in training; the one input with a gradient.
      old_logp: f[N, T] log-probs (nats) under the policy before this batch's updates.
      values: with `group`, rewards f[N]; without, advantages f[N], f[N, 1] or f[N, T] (gspo: not the last).
      group: int[N] any integers, rows with the same one are compared; or None.
      mask: bool[N, T] tokens that count; other places may hold anything, NaN too.
      kind: one of `KINDS`.
      epsilon: lower clip; inf switches it off.
      epsilon_high: upper clip.
      delta: the dual clip's bound on the ratio where A < 0 (ppo_clip); None for none.
      left_decay, right_decay: n and m of dgpo.
      ref_logp: f[N, T] log-probs (nats) under the reference policy; None for no KL.
      beta: weight of the KL in the loss.
      aggregation: one of `AGGREGATIONS`.
      norm: constant length (tokens) of seq_mean_token_sum_norm.
      mode, valid, ddof, advantage_epsilon (its epsilon), sample_weight, anchor, weight_scale: of
        `group_advantage`, with rewards.
      implementation: "xla", "pallas_tpu" (float32 inside), or None: the kernel where the program is compiled
        for a TPU.

    Raises:
      ValueError: unknown names, shapes that do not fit, options out of range, or rewards for a kind without
        a group advantage.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; one of {', '.join(KINDS)}")
    chosen = KINDS[kind]
    epsilon = chosen.epsilon if epsilon is None else epsilon
    epsilon_high = chosen.epsilon_high if epsilon_high is None else epsilon_high
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    aggregation = aggregation or chosen.aggregation
    _check(kind, chosen.surrogate, low, high, delta, aggregation, norm)
    if chosen.surrogate == "dgpo" and (left_decay < 0 or right_decay < 1):
        raise ValueError(f"left_decay={left_decay} and right_decay={right_decay} must be at least 0 and 1")
    tokens = {"logp": logp, "old_logp": old_logp, "mask": mask}
    tokens |= {} if ref_logp is None else {"ref_logp": ref_logp}
    if jnp.ndim(mask) != 2 or len({jnp.shape(x) for x in tokens.values()}) > 1:
        named = ", ".join(f"{name} {jnp.shape(x)}" for name, x in tokens.items())
        raise ValueError(f"shapes must all be [N, T]: {named}")

    rows = jnp.shape(mask)[:1]
    metrics: dict[str, Mean] = {}
    if group is None:
        of_rewards = {"mode": mode, "valid": valid, "sample_weight": sample_weight, "anchor": anchor}
        if unused := [name for name, x in of_rewards.items() if x is not None]:
            raise ValueError(f"{', '.join(unused)} turn rewards into advantages: pass rewards and group")
        allowed = [rows, (*rows, 1)] + ([] if chosen.surrogate == "gspo" else [jnp.shape(mask)])
        if jnp.shape(values) not in allowed:
            raise ValueError(
                f"advantages {jnp.shape(values)} of kind {kind!r}: one of {', '.join(map(str, allowed))}"
            )
        advantages = jnp.asarray(values)
    else:
        mode = mode or chosen.mode
        if mode is None:
            raise ValueError(f"kind {kind!r} has no group advantage: pass advantages, or a mode")
        if jnp.shape(values) != rows:
            raise ValueError(f"rewards {jnp.shape(values)} must be {rows}, one per row of the mask")
        found = group_advantage(
            values,
            group,
            valid,
            mode=mode,
            ddof=ddof,
            epsilon=advantage_epsilon,
            sample_weight=sample_weight,
            anchor=anchor,
            weight_scale=weight_scale,
            implementation=implementation,
        )
        advantages, metrics = found.advantages, dict(found.metrics)
    if advantages.ndim == 1:
        advantages = advantages[:, None]

    dual = float("inf") if delta is None else delta
    rule = Rule(chosen.surrogate, low, high, dual, left_decay, right_decay, beta)
    norm = norm if aggregation == "seq_mean_token_sum_norm" and norm is not None else 1.0
    static = _Static(rule, aggregation, norm, implementation)
    reference = None if ref_logp is None else jnp.asarray(ref_logp)
    mask = jnp.asarray(mask, bool)
    operands = Operands(jnp.asarray(logp), jnp.asarray(old_logp), reference, advantages, mask)
    total, sums = _loss(static, operands)
    sums = jax.lax.stop_gradient(sums)

    count = jnp.sum(sums.tokens)
    weight = count if aggregation == "token_mean" else jnp.sum(sums.tokens > 0, dtype=count.dtype)
    shares = {"low_mean": sums.low, "high_mean": sums.high, "region_mean": sums.low + sums.high}
    shares |= {} if delta is None else {"dual_mean": sums.dual}
    metrics |= {f"clip_ratio/{name}": (jnp.sum(x), count) for name, x in shares.items()}
    metrics["clamped_ratio"] = jnp.sum(sums.clamped), count
    if ref_logp is not None:
        metrics["kl"] = jnp.sum(sums.kl), count
        metrics["kl_clamped_ratio"] = jnp.sum(sums.kl_clamped), count
    return PolicyLoss(total, weight, metrics)
