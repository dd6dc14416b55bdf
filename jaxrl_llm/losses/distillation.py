"""Distillation on tokens that the student sampled: from a teacher's log-probs, alone or beside a reward.

| method | loss                                                         | what the teacher is            |
|--------|--------------------------------------------------------------|--------------------------------|
| opd    | r·sg(log π − log π_T)                                        | an advantage, log π_T − log π  |
| aopd   | opd, and top-K forward KL where π_T − π ≤ τ                  | the same, or its top K tokens  |
| scope  | opd on wrong answers, the student's likelihood on right ones | the same, and weights of rows  |
| kdrl   | ppo_clip + β·(log π − log π_T)²/2                            | a reference of a KL            |
| rlad   | ppo_clip with the ratio `trrd_log_ratio`                     | part of the ratio's anchor     |

`scope` is in its own module; divergences over the whole vocabulary are in `divergences`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, masked, masked_sum
from jaxrl_llm.losses.divergences import aopd_top_k_kl, log_probs
from jaxrl_llm.losses.kl import kl_k2
from jaxrl_llm.losses.ratios import Ratio, log_ratio, trrd_log_ratio
from jaxrl_llm.losses.surrogates import ppo_clip


def opd(
    logp: Array, old_logp: Array, teacher_logp: Array, mask: Array, *, ratio: Ratio = log_ratio
) -> tuple[Array, Metrics]:
    """On-policy distillation: the policy gradient of the reverse KL, from the sampled tokens.

    ℓ = r·sg(log π − log π_T) with r = π/π_old; gradient r·(log π − log π_T)·∇log π

    In expectation over a token drawn from π_old both value and gradient are those of KL(π‖π_T) given the
    prefix. With old_logp = logp it is the on-policy form, whose gradient is that of −A·log π with
    A = log π_T − log π. It names no better token: at log π = log π_T there is no gradient, and a token that
    the teacher would hardly write has one without bound (compare `aopd`).

    Example:
      >>> logp, teacher_logp = jnp.array([[-1.0, -2.0]]), jnp.array([[-1.5, -1.0]])
      >>> opd(logp, logp, teacher_logp, jnp.ones((1, 2), bool))[0].tolist()
      [[0.5, -1.0]]

    Args:
      logp: f[N, T] log-probs (nats) under the student in training.
      old_logp: f[N, T] log-probs (nats) under the student that sampled the tokens; constants.
      teacher_logp: f[N, T] log-probs (nats) under the teacher, at the student's temperature; constants.
      mask: bool[N, T] tokens that count.
      ratio: the function that makes log r of logp, old_logp and mask (`RATIOS`).

    Returns:
      f[N, T] token loss (nats), 0 where masked, float32 or wider. Log-ratios are clamped to ±20 nats
      (`log_ratio`). Metrics: `distillation/reverse_kl`, the loss's mean over tokens, and the ratio's.

    Raises:
      ValueError: shapes that differ.

    References:
      2306.13649 (on-policy distillation); this form: 2605.06387 eq. 1.
    """
    check_same_shape(logp=logp, old_logp=old_logp, teacher_logp=teacher_logp, mask=mask)
    d, metrics = ratio(logp, old_logp, mask)
    excess = jax.lax.stop_gradient(masked(logp, mask) - masked(teacher_logp, mask))
    loss = masked(jnp.exp(d) * excess, mask)
    return loss, metrics | {"distillation/reverse_kl": masked_sum(loss, mask)}


def aopd(
    logp: Array,
    old_logp: Array,
    teacher_logp: Array,
    top_k_kl: Array,
    mask: Array,
    *,
    threshold: float = 0.0,
    ratio: Ratio = log_ratio,
) -> tuple[Array, Metrics]:
    """AOPD: policy gradient on tokens the teacher would rather write, its top tokens instead of the others.

    ℓ = G·ℓ_top_k + (1−G)·opd with G = 1[π_T − π ≤ τ] at the sampled token, in probabilities, a constant

    Where the teacher likes the token less than the student does, `opd` pushes it down without bound and names
    no replacement; the forward KL pulls towards the teacher's top tokens, and is bounded. τ < −1 is `opd`
    alone, τ ≥ 1 the forward KL alone, and at τ = 0 the gate is 1[log π_T ≤ log π]. The forward KL is a loss
    in its own right: as a detached advantage of the sampled token it would have no expected gradient at all.

    Example:
      >>> logp, teacher_logp = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 1.0]]))
      >>> loss, _ = aopd(logp, logp, teacher_logp, jnp.array([[7.0, 7.0]]), jnp.ones((1, 2), bool))
      >>> [round(x, 4) for x in loss[0].tolist()]  # the forward KL, then −ln 2
      [7.0, -0.6931]

    Args:
      logp, old_logp, teacher_logp, mask, ratio: as `opd`; the gate compares logp and teacher_logp.
      top_k_kl: f[N, T] forward KL over the teacher's top tokens, `aopd_top_k_kl`'s or from a fused kernel; a
        gradient flows here too.
      threshold: τ.

    Returns:
      f[N, T] token loss (nats), 0 where masked, float32 or wider; the paper takes its seq_mean_token_mean.
      The paper writes −A·log π for the second branch, with the same gradient (see `opd`). Metrics of `opd`,
      over all tokens, and `distillation/forward_kl_share`, the share of tokens with G = 1.

    Raises:
      ValueError: shapes that differ.

    References:
      2605.06387 eq. 9 and 10, as quoted by two independent implementations; the paper itself was not at hand.
    """
    check_same_shape(logp=logp, top_k_kl=top_k_kl, mask=mask)
    policy_gradient, metrics = opd(logp, old_logp, teacher_logp, mask, ratio=ratio)
    preference = jnp.exp(masked(teacher_logp, mask)) - jnp.exp(masked(logp, mask))
    is_worse = mask & (preference <= threshold)
    loss = jnp.where(is_worse, masked(top_k_kl, is_worse), policy_gradient)
    return loss, metrics | {"distillation/forward_kl_share": masked_sum(is_worse, mask)}


def aopd_from_logits(
    logits: Array,
    teacher_logits: Array,
    tokens: Array,
    mask: Array,
    *,
    old_logp: Array | None = None,
    k: int = 10,
    scale: float | None = None,
    threshold: float = 0.0,
    temperature: Array | float = 1.0,
    ratio: Ratio = log_ratio,
) -> tuple[Array, Metrics]:
    """`aopd` with the forward KL over the teacher's top k, from logits.

    Example:
      >>> logits, teacher_logits = jnp.zeros((1, 1, 2)), jnp.log(jnp.array([[[0.75, 0.25]]]))
      >>> for token in (0, 1):  # −ln 1.5; then 0.75·ln 1.5, scale 1/1
      ...     args = logits, teacher_logits, jnp.array([[token]]), jnp.ones((1, 1), bool)
      ...     print(round(float(aopd_from_logits(*args, k=1)[0][0, 0]), 4))
      -0.4055
      0.3041

    Args:
      logits: f[N, T, V] of the student; the gradient flows here.
      teacher_logits: f[N, T, V] of the teacher; constants.
      tokens: i[N, T] in [0, V), sampled by the student; any value where masked.
      mask: bool[N, T] positions that count.
      old_logp: f[N, T] log-probs (nats) under the student that sampled the tokens; None for this one.
      k: from 1 to V; the two implementations take 10 and 100, the paper's value is not known.
      scale: of the forward KL, None for 1/k (`aopd_top_k_kl`).
      threshold, ratio: as `aopd`.
      temperature: divides the logits of both; a scalar or f[N] by rows; a constant.

    Returns, Raises and References: as `aopd`; a ValueError too for k outside [1, V].
    """
    if not 1 <= k <= jnp.shape(logits)[-1]:
        raise ValueError(f"k={k} must be from 1 to V={jnp.shape(logits)[-1]}")
    check_same_shape(logits=logits, teacher_logits=teacher_logits)
    log_p = log_probs(logits, mask, temperature=temperature)
    log_q = log_probs(jax.lax.stop_gradient(teacher_logits), mask, temperature=temperature)
    sampled = jnp.where(mask, tokens, 0)[..., None]
    logp, teacher_logp = (jnp.take_along_axis(x, sampled, axis=-1)[..., 0] for x in (log_p, log_q))
    top_q, ids = jax.lax.top_k(log_q, k)
    kl, metrics = aopd_top_k_kl(jnp.take_along_axis(log_p, ids, axis=-1), top_q, mask, scale=scale)
    old_logp = jax.lax.stop_gradient(logp) if old_logp is None else old_logp
    loss, more = aopd(logp, old_logp, teacher_logp, kl, mask, threshold=threshold, ratio=ratio)
    return loss, metrics | more


def kdrl(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    teacher_logp: Array,
    beta: Array | float = 5e-3,
    surrogate: Callable[..., tuple[Array, Metrics]] = ppo_clip,
) -> tuple[Array, Metrics]:
    """KDRL: GRPO whose reference KL is k2 to a teacher, so that reward and teacher pull at the same time.

    ℓ = ppo_clip + β·(log π − log π_T)²/2

    On-policy the second part has the gradient of β·KL(π‖π_T) (`kl_k2`). It pulls where the advantage is 0,
    and also to a teacher that is wrong (compare `rlad`).

    Example:
      >>> logp, teacher_logp = jnp.array([[-1.0, -2.0]]), jnp.array([[-1.0, -1.0]])
      >>> kdrl(
      ...     logp, logp, jnp.array([[3.0]]), jnp.ones((1, 2), bool), teacher_logp=teacher_logp, beta=0.5
      ... )[0].tolist()  # −A, plus 0.5·1²/2
      [[-3.0, -2.75]]

    Args:
      logp, old_logp, advantages, mask: as `ppo_clip`.
      teacher_logp: f[N, T] log-probs (nats) under the teacher; constants.
      beta: β, a number or f[]; `kdrl_beta` is the paper's schedule.
      surrogate: of the same four arrays; `partial(ppo_clip, epsilon_high=0.28)` for other options.

    Returns:
      f[N, T] token loss, 0 where masked, float32 or wider. Metrics of the surrogate and `distillation/k2`,
      mean over tokens of the second part before β.

    Raises:
      ValueError: shapes that do not fit.

    References:
      2506.02208.
    """
    loss, metrics = surrogate(logp, old_logp, advantages, mask)
    kl, k2 = kl_k2(logp, teacher_logp, mask)
    beta = jnp.asarray(beta, kl.dtype)
    return loss + beta * kl, metrics | {"distillation/k2": k2["kl"]}


def kdrl_beta(step: Array | int, *, steps: int, start: float = 5e-3, end: float = 1e-3) -> Array:
    """f[] KDRL's coefficient at a step (from 0): a straight line from `start` to `end`, which is kept after.

    The paper's values. (Whether its line reaches the end with the last step could not be confirmed.)

    Example:
      >>> [round(float(kdrl_beta(step, steps=100)), 4) for step in (0, 50, 100, 300)]
      [0.005, 0.003, 0.001, 0.001]

    Raises:
      ValueError: steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    share = jnp.minimum(jnp.asarray(step, jnp.float32) / steps, 1)
    return start + (end - start) * share


def rlad(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    teacher_logp: Array,
    alpha: float = 0.5,
    clamp: float = 1.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = 0.28,
) -> tuple[Array, Metrics]:
    """RLAD: PPO's clip around an anchor between the old policy and a teacher.

    ℓ = −min(r·A, clip(r, 1−ε, 1+ε_high)·A), log r = α·(log π − log π_old) + (1−α)·clip(log π − log π_T, ±c)

    A token is imitated as far as its advantage agrees: with A > 0 only up to somewhat above the teacher's
    probability, with A < 0 only down to somewhat below it, with A = 0 not at all (compare `kdrl`). α = 1 is
    GRPO. The paper's objective has −β·KL(π‖π_ref) besides; add a KL estimator's loss for it.

    Example:
      >>> logp, teacher_logp = jnp.array([[-1.0, -1.0]]), jnp.array([[-4.0, -1.0]])
      >>> loss, _ = rlad(
      ...     logp, logp, jnp.array([[1.0]]), jnp.ones((1, 2), bool), teacher_logp=teacher_logp
      ... )
      >>> [round(x, 4) for x in loss[0].tolist()]  # r = e^0.5 is beyond 1.28; r = 1
      [-1.28, -1.0]

    Args:
      logp, old_logp, advantages, mask, epsilon, epsilon_high: as `ppo_clip`; the bounds are the paper's.
      teacher_logp: f[N, T] log-probs (nats) under the teacher; constants.
      alpha, clamp: α and c, as `trrd_log_ratio`.

    Returns:
      f[N, T] token loss, 0 where masked, float32 or wider; the paper takes its seq_mean_token_mean. Metrics
      of `ppo_clip` and `trrd_log_ratio`.

    Raises:
      ValueError: shapes that do not fit, a negative epsilon or clamp, or alpha outside [0, 1].

    References:
      2602.22495.
    """
    ratio = partial(trrd_log_ratio, teacher_logp=teacher_logp, alpha=alpha, clamp=clamp)
    return ppo_clip(logp, old_logp, advantages, mask, epsilon=epsilon, epsilon_high=epsilon_high, ratio=ratio)
