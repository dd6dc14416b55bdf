"""Surrogates that clip, and what all surrogates share: see `SURROGATES` in `losses` for the list."""

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, masked, masked_sum
from jaxrl_llm.losses.ratios import Ratio, log_ratio


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


def bounds(epsilon: float, epsilon_high: float | None) -> tuple[float, float]:
    """The bounds 1−ε and 1+ε_high on the ratio.

    Raises:
      ValueError: a negative epsilon.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    if epsilon < 0 or high < 0:
        raise ValueError(f"epsilon={epsilon} and epsilon_high={epsilon_high} must not be negative")
    return 1 - epsilon, 1 + high


def check_dual_clip(delta: float | None) -> None:
    """Raises a ValueError for a dual clip that would act at r = 1."""
    if delta is not None and delta <= 1:
        raise ValueError(f"delta={delta} bounds the ratio itself and must exceed 1; None for no dual clip")


def beyond_bounds(r: Array, a: Array, low: float, high: float) -> tuple[Array, Array]:
    """Where PPO clips ratios: r < low and A < 0, r > high and A > 0. A bound itself is inside.

    Gates rather than minimum or clip: at a tie JAX gives those half the gradient.
    """
    return (r < low) & (a < 0), (r > high) & (a > 0)


def clip_shares(is_low: Array, is_high: Array, mask: Array) -> Metrics:
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
    ratio: Ratio = log_ratio,
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
      ratio: the function that makes log r of logp, old_logp and mask (`RATIOS`).

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
    low, high = bounds(epsilon, epsilon_high)
    check_dual_clip(delta)
    d, metrics = ratio(logp, old_logp, mask)
    a = token_advantages(advantages, mask)
    r = jnp.exp(d)
    is_low, is_high = beyond_bounds(r, a, low, high)
    clipped = jnp.where(is_low, low, jnp.where(is_high, high, r))
    metrics |= clip_shares(is_low, is_high, mask)
    if delta is not None:
        is_dual = (r > delta) & (a < 0)
        clipped = jnp.where(is_dual, delta, clipped)
        metrics["clip_ratio/dual_mean"] = masked_sum(is_dual, mask)
    return -a * clipped, metrics


DIVERGENCE_BOUNDS = {"tv": 0.15, "kl": 0.05}
"""The bounds of `dppo` by its form, as in the paper's study of stability."""


def dppo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    form: str = "tv",
    epsilon: float | None = None,
    epsilon_high: float | None = None,
    cap: float = 20.0,
    ratio: Ratio = log_ratio,
) -> tuple[Array, Metrics]:
    """DPPO: a token is clipped by how far its probability has moved, not by the ratio.

    ℓ = −A·sg(min(r, cap))·log π, but without gradient where an update would move the policy further than
    the bound away from μ, the policy that wrote the tokens: π > μ, A > 0 and D > ε_high, or π < μ, A < 0
    and D > ε. D compares the token's probability with that of all other tokens together:

      tv: |π − μ|
      kl: μ·log(μ/π) + (1−μ)·log((1−μ)/(1−π))

    A rare token may so change its ratio by much, a frequent one only by little.

    Example:
      >>> logp, old_logp = jnp.log(jnp.array([[0.001, 0.6]])), jnp.log(jnp.array([[0.002, 0.9]]))
      >>> gradient = jax.grad(lambda x: dppo(x, old_logp, jnp.array([[-1.0]]), old_logp < 0)[0].sum())
      >>> [round(g, 4) for g in gradient(logp)[0].tolist()]  # r = 1/2 and 2/3; TV 0.001 and 0.3
      [0.5, 0.0]

    Args:
      logp: f[N, T] log-probs (nats) under the policy in training.
      old_logp: f[N, T] log-probs (nats) under μ: as the sampler recorded them, for the paper finds that with
        recomputed ones the two policies come apart. Constants.
      advantages: f[N, T], or f[N, 1] for one per sequence; constants.
      mask: bool[N, T] tokens that count.
      form: "tv" or "kl".
      epsilon: bound on D where π < μ, and where π > μ too unless `epsilon_high` is given; inf switches it
        off. None for 0.15 (tv; 0.2 in most of the paper's large experiments) or 0.05 nats (kl).
      epsilon_high: bound on D where π > μ.
      cap: largest weight, at least 1; 20 in the released code, inf and 5 in the paper's experiments.
      ratio: the function that makes log r of logp, old_logp and mask (`RATIOS`); D is of single tokens.

    Returns:
      f[N, T] token loss, 0 where masked or clipped, float32 or wider. Log-ratios are clamped to ±20 nats
      (`log_ratio`). Metrics, as shares of the tokens: `clip_ratio/low_mean`, `clip_ratio/high_mean` (clipped
      with A < 0, with A > 0), `clip_ratio/region_mean` (either), `truncated_ratio` (r > cap),
      `clamped_ratio`.

    Raises:
      ValueError: shapes that do not fit, an unknown form, a negative epsilon, or a cap below 1.

    References:
      2602.04879 eq. 12 to 14.
    """
    if form not in DIVERGENCE_BOUNDS:
        raise ValueError(f"unknown form {form!r}; one of {', '.join(DIVERGENCE_BOUNDS)}")
    if cap < 1:
        raise ValueError(f"cap={cap} must be at least 1, the weight on-policy; inf for no cap")
    epsilon = DIVERGENCE_BOUNDS[form] if epsilon is None else epsilon
    bounds(epsilon, epsilon_high)
    d, metrics = ratio(jax.lax.stop_gradient(logp), old_logp, mask)
    a = token_advantages(advantages, mask)
    policy, behaviour = masked(jax.lax.stop_gradient(logp), mask), masked(old_logp, mask)
    divergence = (binary_tv if form == "tv" else binary_kl)(behaviour, policy)
    is_low = (divergence > epsilon) & (policy < behaviour) & (a < 0)
    high = epsilon if epsilon_high is None else epsilon_high
    is_high = (divergence > high) & (policy > behaviour) & (a > 0)
    r = jnp.exp(d)
    is_truncated = r > cap
    weight = jnp.where(is_low | is_high, 0, jnp.where(is_truncated, cap, r))
    metrics |= clip_shares(is_low, is_high, mask) | {"truncated_ratio": masked_sum(is_truncated, mask)}
    return -a * weight * masked(logp, mask), metrics


def binary_tv(logp: Array, other_logp: Array) -> Array:
    """Total variation of two policies on {this token, any other}: |p − q| of log-probs (nats)."""
    return jnp.abs(jnp.exp(logp) - jnp.exp(other_logp))


def binary_kl(logp: Array, other_logp: Array) -> Array:
    """KL divergence (nats) of two policies on {this token, any other}: p·log(p/q) + (1−p)·log((1−p)/(1−q)).

    1−p and 1−q count as 1e-8 at least: in float32 a token's log-prob is 0 long before its probability is 1,
    and without that floor such a q would be infinitely far from any other policy.
    """
    rest, other_rest = (jnp.maximum(-jnp.expm1(x), 1e-8) for x in (logp, other_logp))
    return jnp.exp(logp) * (logp - other_logp) + rest * (jnp.log(rest) - jnp.log(other_rest))
