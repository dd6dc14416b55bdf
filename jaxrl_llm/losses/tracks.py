"""Two rewards for two spans of one answer: the whole of it, and a prefix (Dual-Track GRPO, 2603.16448).

TRUST-SQL rewards the final answer at every token, and the schema that the policy proposes on the way at the
tokens up to that proposal. `dual_track` adds two losses; the other two functions make one array of advantages
for a single loss, the alternatives in the released code.
"""

from collections.abc import Callable

import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape
from jaxrl_llm.losses.surrogates import ppo_clip, token_advantages


def prefix_mask(mask: Array, prefix_end: Array) -> Array:
    """bool[N, T] tokens of `mask` (bool[N, T]) in columns before their row's `prefix_end` (i[N]).

    Raises:
      ValueError: shapes that do not fit.
    """
    check_same_shape(prefix_end=prefix_end, rows=mask[:, 0])
    return mask & (jnp.arange(mask.shape[1]) < prefix_end[:, None])


def dual_track(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    prefix_advantages: Array,
    prefix_end: Array,
    coefficient: float = 0.25,
    surrogate: Callable[..., tuple[Array, Metrics]] = ppo_clip,
) -> tuple[Array, Metrics]:
    """Dual-Track GRPO: the loss of the whole answer, plus λ times that of its prefix by another reward.

    L = L(A; mask) + λ·L(A_prefix; mask·1[t < end]), each a row's mean over the tokens of its own mask:

    ℓ_t = ℓ_t(A) + λ·(length/prefix length)·1[t < end]·ℓ_t(A_prefix), whose row mean is L

    Two answers of equal reward whose prefixes differ are told apart there and nowhere else. A row whose end
    is 0 has the first loss alone. As advantages of groups have a scale of their own, λ alone weighs the
    prefix's reward.

    Example:
      >>> logp, mask = jnp.zeros((1, 4)), jnp.ones((1, 4), bool)
      >>> loss, _ = dual_track(  # ratios of 1; length / prefix length = 2
      ...     logp, logp, jnp.array([[1.0]]), mask,
      ...     prefix_advantages=jnp.array([[-3.0]]), prefix_end=jnp.array([2]), coefficient=0.5
      ... )
      >>> loss.tolist()  # −1 + 0.5·2·3 before the end
      [[2.0, 2.0, -1.0, -1.0]]

    Args:
      logp: f[N, T] log-probs (nats) under the policy in training.
      old_logp: f[N, T] log-probs (nats) under the policy before this batch's updates; constants.
      advantages: f[N, T], or f[N, 1] for one per sequence, of the whole answer's reward; constants.
      mask: bool[N, T] tokens that count.
      prefix_advantages: f[N, T] or f[N, 1], of the prefix's reward; constants.
      prefix_end: i[N] the column after the prefix's last token; 0 for none.
      coefficient: λ; 0.25 in the released training script.
      surrogate: of `SURROGATES`, with its options bound. One with a ratio per sequence takes the prefix's
        ratio over the prefix, as in the released code.

    Returns:
      f[N, T] token loss, 0 where masked, float32 or wider, for the aggregation seq_mean_token_mean. Metrics
      of the surrogate on the whole answer, and under `prefix/` on the prefix.

    Raises:
      ValueError: shapes that do not fit.

    References:
      2603.16448, in the form of the released code.
    """
    prefix = prefix_mask(mask, prefix_end)
    loss, metrics = surrogate(logp, old_logp, advantages, mask)
    extra, more = surrogate(logp, old_logp, prefix_advantages, prefix)
    length, prefix_length = (jnp.sum(m, axis=1, keepdims=True, dtype=loss.dtype) for m in (mask, prefix))
    extra *= coefficient * length / jnp.maximum(prefix_length, 1)
    return loss + extra, metrics | {f"prefix/{name}": value for name, value in more.items()}


def summed_advantages(
    advantages: Array, mask: Array, *, prefix_advantages: Array, prefix_end: Array, coefficient: float = 0.25
) -> Array:
    """Both tracks' advantages in one array, for a single loss: the first alternative to `dual_track`.

    A_t + λ·A_prefix,t·1[t < end]

    One clip then judges the sum, and a prefix counts by its share of the answer's tokens, so that λ means
    less than in `dual_track`; the released code's default for it is 1.

    Example:
      >>> a, b, end = jnp.array([[1.0]]), jnp.array([[-2.0]]), jnp.array([1])
      >>> mask = jnp.array([[True, True, False]])
      >>> summed_advantages(a, mask, prefix_advantages=b, prefix_end=end).tolist()  # 1 − 0.25·2
      [[0.5, 1.0, 0.0]]

    Args and Raises: as `dual_track`.

    Returns:
      f[N, T] without gradient, 0 where masked, float32 or wider.
    """
    prefix = prefix_mask(mask, prefix_end)
    return token_advantages(advantages, mask) + coefficient * token_advantages(prefix_advantages, prefix)


def segmented_whitening(advantages: Array, mask: Array, *, prefix_end: Array, epsilon: float = 1e-6) -> Array:
    """Token advantages standardised over the batch, prefixes and remainders apart: the second alternative.

    (A_t − mean)/(std + ε), with mean and sample standard deviation over all prefix tokens of the batch where
    t < end, and over all others elsewhere. Fewer than two tokens, or equal ones, get 0.

    Example:
      >>> a, mask = jnp.array([[1.0, 5, 8], [3, 5, 2]]), jnp.ones((2, 3), bool)
      >>> end = jnp.array([1, 1])  # prefixes 1 and 3: mean 2, std √2; others 5, 8, 5, 2: mean 5, std √6
      >>> [[round(x, 3) for x in row] for row in segmented_whitening(a, mask, prefix_end=end).tolist()]
      [[-0.707, 0.0, 1.225], [0.707, 0.0, -1.225]]

    Args:
      advantages: f[N, T], or f[N, 1] for one per sequence; constants. Of the global batch.
      mask: bool[N, T] tokens that count.
      prefix_end: i[N] the column after the prefix's last token; 0 for none.
      epsilon: added to the standard deviations.

    Returns:
      f[N, T] without gradient, 0 where masked, float32 or wider.

    Raises:
      ValueError: shapes that do not fit.

    References:
      The released code of 2603.16448, which whitens discounted returns in this way.
    """
    a, prefix = token_advantages(advantages, mask), prefix_mask(mask, prefix_end)
    return _standardised(a, prefix, epsilon) + _standardised(a, mask & ~prefix, epsilon)


def _standardised(x: Array, where: Array, epsilon: float) -> Array:
    """(x − mean)/(std + ε) over `where`, 0 elsewhere."""
    count = jnp.sum(where, dtype=x.dtype)
    # Differences from the smallest: of equal values they are exactly 0, and their mean too.
    low = jnp.min(jnp.where(where, x, jnp.inf), initial=jnp.inf)
    deviation = jnp.where(where, x - low, 0)
    deviation = jnp.where(where, deviation - jnp.sum(deviation) / jnp.maximum(count, 1), 0)
    std = jnp.sqrt(jnp.sum(deviation**2) / jnp.maximum(count - 1, 1))
    return deviation / (std + epsilon)
