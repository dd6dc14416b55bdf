"""Policy surrogates: token losses whose gradient is the policy gradient, by name in `SURROGATES`.

Every surrogate is `(logp, old_logp, advantages, mask, *, options) -> (loss f[N, T], metrics)`, and
`losses.aggregate` reduces the loss. The published methods are choices of three things:

| method  | surrogate                   | advantage           | aggregation             | paper      |
|---------|-----------------------------|---------------------|-------------------------|------------|
| PPO     | ppo_clip                    | of a value function | token_mean              | 1707.06347 |
| GRPO    | ppo_clip (+ β·KL)           | group mean and std  | seq_mean_token_mean     | 2402.03300 |
| Dr.GRPO | ppo_clip                    | group mean          | seq_mean_token_sum_norm | 2503.20783 |
| DAPO    | ppo_clip, epsilon_high=0.28 | group mean and std  | token_mean              | 2503.14476 |
| RLOO    | reinforce                   | leave-one-out       | seq_mean_token_sum      | 2402.14740 |
| GSPO    | gspo                        | group mean and std  | seq_mean_token_mean     | 2507.18071 |
| CISPO   | cispo                       | group mean and std  | token_mean              | 2506.13585 |
| DGPO    | dgpo                        | group mean and std  | token_mean              | 2603.14389 |

How much a token counts: the loss's gradient is −A·w·∇log π, with w a function of r = π/π_old (under gspo
r is the sequence's and w is shared by its tokens). Inside the bounds w = r; outside them:

| surrogate | r < 1−ε, A < 0     | r > 1+ε_high, A > 0      | r outside, A of the other sign | r = 1 |
|-----------|--------------------|--------------------------|--------------------------------|-------|
| reinforce | 1                  | 1                        | 1                              | 1     |
| ppo_clip  | 0                  | 0                        | r; 0 beyond δ where A < 0      | 1     |
| gspo      | 0                  | 0                        | r                              | 1     |
| cispo     | 1−ε                | 1+ε_high                 | the bound                      | 1     |
| dgpo      | r^(n+1) / (1−ε)^n  | r^(1−1/m)·(1+ε_h)^(1/m)  | r                              | 1     |
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, masked, masked_sum
from jaxrl_llm.losses.ratios import log_ratio, sequence_log_ratio


def token_advantages(advantages: Array, mask: Array) -> Array:
    """Advantages as constants at every token: f[N, T] or f[N, 1] -> f[N, T], 0 where masked.

    Raises:
      ValueError: any other shape; f[N] in particular would be taken for a row of tokens when N = T.
    """
    if jnp.shape(advantages) not in (mask.shape, (mask.shape[0], 1)):
        raise ValueError(
            f"advantages {jnp.shape(advantages)} must be {mask.shape} like the mask, or "
            f"{(mask.shape[0], 1)}: one per sequence is passed as advantages[:, None]"
        )
    return masked(jax.lax.stop_gradient(advantages), mask)


def _bounds(epsilon: float, epsilon_high: float | None) -> tuple[float, float]:
    """The bounds 1−ε and 1+ε_high on the ratio.

    Raises:
      ValueError: a negative epsilon.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    if epsilon < 0 or high < 0:
        raise ValueError(f"epsilon={epsilon} and epsilon_high={epsilon_high} must not be negative")
    return 1 - epsilon, 1 + high


def _clip_shares(is_low: Array, is_high: Array, mask: Array) -> Metrics:
    """Shares of the tokens beyond the lower bound, the upper one, and either."""
    return {
        "clip_ratio/low_mean": masked_sum(is_low, mask),
        "clip_ratio/high_mean": masked_sum(is_high, mask),
        "clip_ratio/region_mean": masked_sum(is_low | is_high, mask),
    }


def reinforce(logp: Array, old_logp: Array, advantages: Array, mask: Array) -> tuple[Array, Metrics]:
    """REINFORCE: the plain policy gradient of tokens drawn from the policy itself.

    ℓ = −A·log π

    Example:
      >>> logp, advantages, mask = jnp.array([[-1.0, -2.0]]), jnp.array([[3.0]]), jnp.ones((1, 2), bool)
      >>> reinforce(logp, logp, advantages, mask)[0].tolist()
      [[3.0, 6.0]]

    Args:
      logp: f[N, T] log-probs (nats) under the policy in training.
      old_logp: f[N, T] not used, here because every surrogate takes the same four arrays. Where the tokens
        come from another policy, multiply the loss by `importance_sampling_correction`'s weights.
      advantages: f[N, T], or f[N, 1] for one per sequence; constants.
      mask: bool[N, T] tokens that count.

    Returns:
      f[N, T] token loss, 0 where masked, float32 or wider; no metrics.

    Raises:
      ValueError: shapes that do not fit.
    """
    check_same_shape(logp=logp, old_logp=old_logp, mask=mask)
    return -token_advantages(advantages, mask) * masked(logp, mask), {}


def ppo_clip(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> tuple[Array, Metrics]:
    """PPO's clipped surrogate with separate bounds and, on request, the dual clip.

    ℓ = −min(r·A, clip(r, 1−ε, 1+ε_high)·A) with r = π/π_old, and for A < 0 no more than −δ·A:

      A > 0: −A·r up to r = 1+ε_high, constant beyond
      A < 0: −A·r between r = 1−ε and r = δ, constant outside

    The gradient is −A·r·∇log π where ℓ is not constant, the bounds themselves included, and 0 elsewhere; at
    r = 1 it is that of `reinforce`. GRPO, DAPO and Dr.GRPO are this function with their own options,
    advantage and aggregation (table at the top of the module).

    Example:
      >>> r, advantages = jnp.array([[0.5, 2.0]]), jnp.array([[1.0]])
      >>> loss, metrics = ppo_clip(jnp.log(r), jnp.zeros((1, 2)), advantages, jnp.ones((1, 2), bool))
      >>> [round(x, 3) for x in loss[0].tolist()]
      [-0.5, -1.2]
      >>> float(metrics["clip_ratio/high_mean"].sum), float(metrics["clip_ratio/low_mean"].sum)
      (1.0, 0.0)

    Args:
      logp: f[N, T] log-probs (nats) under the policy in training.
      old_logp: f[N, T] log-probs (nats) under the policy before this batch's updates; constants.
      advantages: f[N, T], or f[N, 1] for one per sequence; constants.
      mask: bool[N, T] tokens that count.
      epsilon: lower clip, and upper clip too unless `epsilon_high` is given; inf switches it off.
      epsilon_high: upper clip (0.28 in DAPO).
      delta: the dual clip's bound on r where A < 0; greater than 1, 3 in the paper; None switches it off.

    Returns:
      f[N, T] token loss, 0 where masked, float32 or wider. Log-ratios are clamped to ±20 nats (`log_ratio`).
      Metrics, as shares of the tokens: `clip_ratio/low_mean` (r < 1−ε and A < 0), `clip_ratio/high_mean`
      (r > 1+ε_high and A > 0), `clip_ratio/region_mean` (either), `clip_ratio/dual_mean` (r > δ and A < 0;
      only with δ), `clamped_ratio`.

    Raises:
      ValueError: shapes that do not fit, a negative epsilon, or delta ≤ 1.

    References:
      1707.06347 eq. 7; two bounds: 2503.14476; dual clip: 1912.09729.
    """
    low, high = _bounds(epsilon, epsilon_high)
    if delta is not None and delta <= 1:
        raise ValueError(f"delta={delta} bounds the ratio itself and must exceed 1; None for no dual clip")
    d, metrics = log_ratio(logp, old_logp, mask)
    a = token_advantages(advantages, mask)
    r = jnp.exp(d)
    # Gates rather than minimum/clip: at a tie JAX gives those half the gradient.
    is_low, is_high = (r < low) & (a < 0), (r > high) & (a > 0)
    clipped = jnp.where(is_low, low, jnp.where(is_high, high, r))
    metrics |= _clip_shares(is_low, is_high, mask)
    if delta is not None:
        is_dual = (r > delta) & (a < 0)
        clipped = jnp.where(is_dual, delta, clipped)
        metrics["clip_ratio/dual_mean"] = masked_sum(is_dual, mask)
    return -a * clipped, metrics


def gspo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    epsilon: float = 3e-4,
    epsilon_high: float | None = 4e-4,
    form: str = "sequence",
) -> tuple[Array, Metrics]:
    """GSPO: PPO's clip of one ratio per sequence, the geometric mean of its tokens' ratios.

    ℓ_t = −min(s·A_t, clip(s, 1−ε, 1+ε_high)·A_t) at every token t, with s = exp(mean_t (log π − log π_old))

    The two forms have this value. In the sequence form the gradient flows through s, so a token u of n gets
    −(s/n)·Σ_t A_t from the row's sum of ℓ (t over what is not clipped); in the token form, whose ratio is
    s_t = sg(s)·π_t/sg(π_t), it gets −s·A_u. With one advantage per sequence the two are the same function;
    advantages that differ along the sequence ask for the token form.

    Example:
      >>> logp = jnp.log(jnp.array([[0.5, 2.0], [4.0, 1.0]]))  # ratios; s = 1 and 2
      >>> loss, _ = gspo(
      ...     logp, jnp.zeros((2, 2)), jnp.array([[1.0], [1.0]]), jnp.ones((2, 2), bool), epsilon_high=0.25
      ... )
      >>> [[round(x, 4) for x in row] for row in loss.tolist()]
      [[-1.0, -1.0], [-1.25, -1.25]]

    Args:
      logp: f[N, T] log-probs (nats) under the policy in training.
      old_logp: f[N, T] log-probs (nats) under the policy before this batch's updates; constants.
      advantages: f[N, T], or f[N, 1] for one per sequence; constants.
      mask: bool[N, T] tokens that count.
      epsilon: lower clip, and upper clip too if `epsilon_high` is None; inf switches it off. The defaults
        are the paper's, for ratios of whole sequences stay close to 1.
      epsilon_high: upper clip.
      form: "sequence" or "token".

    Returns:
      f[N, T] token loss, 0 where masked, float32 or wider; its mean over sequences is the paper's objective
      under the aggregation seq_mean_token_mean. The log of s is clamped to ±20 nats (`sequence_log_ratio`).
      Metrics: the clip ratios of `ppo_clip` and `clamped_ratio`, shares of the tokens too.

    Raises:
      ValueError: shapes that do not fit, a negative epsilon, or an unknown form.

    References:
      2507.18071 eq. 5 and 7 (sequence), 13 and 14 (token).
    """
    low, high = _bounds(epsilon, epsilon_high)
    d, metrics = sequence_log_ratio(logp, old_logp, mask, form=form)
    a = token_advantages(advantages, mask)
    s = jnp.exp(d)
    is_low, is_high = (s < low) & (a < 0), (s > high) & (a > 0)
    clipped = jnp.where(is_low, low, jnp.where(is_high, high, s))
    return -a * clipped, metrics | _clip_shares(is_low, is_high, mask)


def cispo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> tuple[Array, Metrics]:
    """CISPO: REINFORCE under a clipped importance weight, so that no token loses its gradient.

    ℓ = −sg(clip(r, 1−ε, 1+ε_high))·A·log π with r = π/π_old

    Example:
      >>> logp, old_logp = jnp.log(jnp.array([[0.5, 0.25]])), jnp.log(jnp.array([[0.25, 0.25]]))
      >>> loss, _ = cispo(logp, old_logp, jnp.array([[1.0]]), jnp.ones((1, 2), bool))
      >>> [round(x, 4) for x in loss[0].tolist()]  # r = 2 and 1: 1.2·ln 2 and ln 4
      [0.8318, 1.3863]

    Args:
      logp: f[N, T] log-probs (nats) under the policy in training.
      old_logp: f[N, T] log-probs (nats) under the policy before this batch's updates; constants.
      advantages: f[N, T], or f[N, 1] for one per sequence; constants.
      mask: bool[N, T] tokens that count.
      epsilon: lower bound 1−ε of the weight, and upper bound 1+ε unless `epsilon_high` is given; 1 or more
        for no lower bound, as in the paper's experiments.
      epsilon_high: upper bound 1+ε_high. (TRL's option of that name is the bound itself, not this one.)

    Returns:
      f[N, T] token loss, 0 where masked, float32 or wider. Log-ratios are clamped to ±20 nats (`log_ratio`).
      Metrics, as shares of the tokens whatever the advantage: `clip_ratio/low_mean` (r < 1−ε),
      `clip_ratio/high_mean` (r > 1+ε_high), `clip_ratio/region_mean` (either), `clamped_ratio`.

    Raises:
      ValueError: shapes that do not fit, or a negative epsilon.

    References:
      2506.13585 eq. 4 and 5.
    """
    low, high = _bounds(epsilon, epsilon_high)
    d, metrics = log_ratio(jax.lax.stop_gradient(logp), old_logp, mask)
    r = jnp.exp(d)
    is_low, is_high = r < low, r > high
    weight = jnp.where(is_low, low, jnp.where(is_high, high, r))
    loss = -weight * token_advantages(advantages, mask) * masked(logp, mask)
    return loss, metrics | _clip_shares(is_low, is_high, mask)


def dgpo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    left_decay: float = 1.0,
    right_decay: float = 2.0,
) -> tuple[Array, Metrics]:
    """DGPO: beyond the bounds the gradient decays with the probability itself instead of stopping.

    ℓ = −A·r̃, where one factor π of r̃ carries the gradient, so that r̃ is also the weight of −A·∇log π:

      r < 1−ε and A < 0:       r̃ = r^(n+1) / (1−ε)^n
      r > 1+ε_high and A > 0:  r̃ = r^(1−1/m)·(1+ε_high)^(1/m)
      else:                    r̃ = r = π/π_old

    r̃ is continuous at both bounds. n = 0 or m → ∞ is no clip on that side, n → ∞ the hard clip, and m = 1
    the constant weight 1+ε_high of GPPO and CISPO. Of the gradient by π itself, −A·r̃/π, the left part
    vanishes as π → 0 once n ≥ 1, and the right part falls as π grows.

    Example:
      >>> r, advantages = jnp.array([[0.1, 4.8]]), jnp.array([[-1.0, 1.0]])
      >>> loss, _ = dgpo(jnp.log(r), jnp.zeros((1, 2)), advantages, jnp.ones((1, 2), bool))
      >>> [round(x, 4) for x in loss[0].tolist()]  # 0.1² / 0.8 and −√(4.8 · 1.2)
      [0.0125, -2.4]

    Args:
      logp: f[N, T] log-probs (nats) under the policy in training.
      old_logp: f[N, T] log-probs (nats) under the policy before this batch's updates; constants.
      advantages: f[N, T], or f[N, 1] for one per sequence; constants.
      mask: bool[N, T] tokens that count.
      epsilon: lower bound 1−ε, and upper bound 1+ε unless `epsilon_high` is given; inf switches it off.
      epsilon_high: upper bound 1+ε_high.
      left_decay: n ≥ 0, any real number; 1 in the released scripts, 2 for their smallest model.
      right_decay: m ≥ 1, any real number; 2 in the released scripts.

    Returns:
      f[N, T] token loss, 0 where masked, float32 or wider. Log-ratios are clamped to ±20 nats (`log_ratio`).
      Metrics, as shares of the tokens: `clip_ratio/low_mean` and `clip_ratio/high_mean` (the two regions),
      `clip_ratio/region_mean` (either), `clamped_ratio`.

    Raises:
      ValueError: shapes that do not fit, a negative epsilon, n < 0 or m < 1.

    References:
      2603.14389, in the form of the authors' code.
    """
    low, high = _bounds(epsilon, epsilon_high)
    if left_decay < 0 or right_decay < 1:
        raise ValueError(
            f"left_decay={left_decay} must be at least 0 and right_decay={right_decay} at least 1"
        )
    d, metrics = log_ratio(logp, old_logp, mask)
    a = token_advantages(advantages, mask)
    r = jnp.exp(d)
    is_low, is_high = (r < low) & (a < 0), (r > high) & (a > 0)
    # (r/(1−ε))^n and (r/(1+ε_high))^(−1/m), as constants; no ratio is below a bound that is not above 0
    constant = jax.lax.stop_gradient(d)
    left = jnp.exp(left_decay * (constant - (math.log(low) if low > 0 else 0.0)))
    right = jnp.exp((math.log(high) - constant) / right_decay)
    decay = jnp.where(is_low, left, jnp.where(is_high, right, 1))
    return -a * r * decay, metrics | _clip_shares(is_low, is_high, mask)


SURROGATES: dict[str, Callable[..., tuple[Array, Metrics]]] = {
    "reinforce": reinforce,
    "ppo_clip": ppo_clip,
    "gspo": gspo,
    "cispo": cispo,
    "dgpo": dgpo,
}
