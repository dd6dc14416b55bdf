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
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, masked, masked_sum
from jaxrl_llm.losses.ratios import log_ratio


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
    high = epsilon if epsilon_high is None else epsilon_high
    if epsilon < 0 or high < 0:
        raise ValueError(f"epsilon={epsilon} and epsilon_high={epsilon_high} must not be negative")
    if delta is not None and delta <= 1:
        raise ValueError(f"delta={delta} bounds the ratio itself and must exceed 1; None for no dual clip")
    d, metrics = log_ratio(logp, old_logp, mask)
    a = token_advantages(advantages, mask)
    r = jnp.exp(d)
    # Gates rather than minimum/clip: at a tie JAX gives those half the gradient.
    is_low = (r < 1 - epsilon) & (a < 0)
    is_high = (r > 1 + high) & (a > 0)
    clipped = jnp.where(is_low, 1 - epsilon, jnp.where(is_high, 1 + high, r))
    metrics["clip_ratio/low_mean"] = masked_sum(is_low, mask)
    metrics["clip_ratio/high_mean"] = masked_sum(is_high, mask)
    metrics["clip_ratio/region_mean"] = masked_sum(is_low | is_high, mask)
    if delta is not None:
        is_dual = (r > delta) & (a < 0)
        clipped = jnp.where(is_dual, delta, clipped)
        metrics["clip_ratio/dual_mean"] = masked_sum(is_dual, mask)
    return -a * clipped, metrics


SURROGATES: dict[str, Callable[..., tuple[Array, Metrics]]] = {
    "reinforce": reinforce,
    "ppo_clip": ppo_clip,
}
