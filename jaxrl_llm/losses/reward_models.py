"""Losses of reward models: autoregressive, for one objective or several, and refreshed during RL."""

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, masked, masked_sum
from jaxrl_llm.losses.preference import bradley_terry, check_rows, constant, negative_log_sigmoid
from jaxrl_llm.losses.segments import segment_ids, segment_max, segment_sum


def arm(
    chosen_logps: Array, rejected_logps: Array, mask: Array, *, beta: float = 0.01
) -> tuple[Array, Metrics]:
    """Autoregressive reward model: a language model whose log-prob of an answer is the answer's reward.

    ℓ = −log σ(β(log π_r(y_w) − log π_r(y_l))), sums over tokens, no reference policy

    Example:
      >>> one = jnp.array([True])
      >>> loss, _ = arm(jnp.log(jnp.array([0.6])), jnp.log(jnp.array([0.2])), one, beta=1.0)
      >>> round(float(loss[0]), 4)  # σ(ln 3) = 3/4
      0.2877

    Args:
      chosen_logps: f[N] log-probs (nats) of the chosen answers, summed over tokens (`sequence_logp`).
      rejected_logps: f[N] the same of the rejected ones.
      mask: bool[N] pairs that count.
      beta: β > 0; the default is PARM's.

    Returns:
      f[N] loss (nats), 0 where masked, float32 or wider; metrics `rewards/*` of β·log π_r.

    Raises:
      ValueError: shapes that do not fit.

    References:
      2410.08193 (GenARM).
    """
    check_rows(mask, chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    chosen, rejected = (beta * masked(x, mask) for x in (chosen_logps, rejected_logps))
    return bradley_terry(chosen, rejected, mask)


def uniarm(
    first_logps: Array,
    second_logps: Array,
    preferences: Array,
    weights: Array,
    mask: Array,
    *,
    beta: float = 0.01,
    global_weight: float = 0.5,
) -> tuple[Array, Metrics]:
    """UniARM: one autoregressive reward model for K objectives, asked with a preference vector p over them.

    ℓ = Σ_i p_i·ℓ_i + λ·|m|·[−log σ(sign(m)·βΔ)], ℓ_i = −log σ(z_i·βΔ), m = Σ_i p_i·z_i

    Δ = log π_r(y₁) − log π_r(y₂) under p, and z_i = 1 where objective i prefers y₁, −1 where it prefers y₂.
    The second term pulls towards the answer that the weighted objectives prefer together, the harder the
    more they agree, and is 0 where they balance. All mass on one objective gives (1+λ)·ℓ_i; where all
    objectives agree, p does not matter.

    Example:
      >>> logps, z, p = jnp.log(jnp.array([[3.0], [1.0]])), jnp.array([[1.0, -1.0]]), jnp.array([0.75, 0.25])
      >>> loss, _ = uniarm(*logps, z, p, jnp.array([True]), beta=1.0)
      >>> round(float(loss[0]), 4)  # ¾·ln(4/3) + ¼·ln 4 + ½·½·ln(4/3)
      0.6343

    Args:
      first_logps: f[N] log-probs (nats) of the first answers, summed over tokens (`sequence_logp`).
      second_logps: f[N] the same of the second ones.
      preferences: f[N, K] z, 1 or −1; 0 where an objective has no label, which adds a constant; constants.
      weights: f[K], or f[N, K]: p ≥ 0 with sum 1; constants.
      mask: bool[N] pairs that count.
      beta: β > 0 of all terms; the default is PARM's.
      global_weight: λ ≥ 0.

    Returns:
      f[N] loss (nats), 0 where masked, float32 or wider. Metrics over pairs with m ≠ 0: `rewards/margins`,
      sign(m)·βΔ, and `rewards/accuracies`, the share where it is positive.

    Raises:
      ValueError: shapes that do not fit.

    References:
      2602.09538; λ = 0 is PARM's loss (Lin et al., ICML 2025). The first paper's equations could not be read:
      the second term follows reviews of it, and the default of λ is ours.
    """
    check_rows(mask, first_logps=first_logps, second_logps=second_logps)
    shape = jnp.shape(preferences)
    if shape[:-1] != mask.shape or jnp.shape(weights) not in (shape, shape[-1:]):
        raise ValueError(
            f"preferences {shape} must be {(*mask.shape, 'K')}, one column per objective, "
            f"and weights {jnp.shape(weights)} be [K] or like them"
        )
    z = constant(preferences, mask[:, None])
    p = constant(jnp.broadcast_to(weights, shape), mask[:, None])
    margin = beta * (masked(first_logps, mask) - masked(second_logps, mask))
    balance = jnp.sum(p * z, axis=1)
    agreed = jnp.sign(balance) * margin
    loss = jnp.sum(p * negative_log_sigmoid(z * margin[:, None]), axis=1)
    loss += global_weight * jnp.abs(balance) * negative_log_sigmoid(agreed)
    is_agreed = mask & (balance != 0)
    return masked(loss, mask), {
        "rewards/accuracies": masked_sum(agreed > 0, is_agreed),
        "rewards/margins": masked_sum(agreed, is_agreed),
    }


def group_reward_entropy(
    rewards: Array, group: Array, valid: Array | None = None, *, epsilon: float = 1e-6, ddof: int = 1
) -> tuple[Array, Metrics]:
    """Entropy of the softmax of a group's standardised rewards: low where one row stands out from the rest.

    H = −Σ_j p_j·log p_j, p = softmax((r − mean)/√(var + ε²)) over the group's K rows

    H lies in [0, ln K] and does not change under r → a·r + b, a > 0 (but for ε). Two rows give a constant,
    and equal rewards ln K, both without gradient.

    Example:
      >>> entropy, _ = group_reward_entropy(jnp.array([5.0, 5.0, 5.0]), jnp.array([0, 0, 0]))
      >>> [round(h, 4) for h in entropy.tolist()]  # ln 3
      [1.0986, 1.0986, 1.0986]

    Args:
      rewards: f[N] of every row; the gradient flows here.
      group: i[N] any integers; rows with the same one are compared, wherever they stand.
      valid: bool[N] rows that count; None for all.
      epsilon: ε. Under the root, as √var + ε has no derivative at equal rewards.
      ddof: 1 for the sample variance, 0 for the population's; the paper does not say which.

    Returns:
      f[N] entropy (nats) of the row's group, at each of its valid rows; 0 at others; float32 or wider.
      Metric `reward_entropy`, its mean over groups.

    Raises:
      ValueError: shapes that differ.

    References:
      2601.22664 (R2M).
    """
    valid = jnp.ones(jnp.shape(rewards), bool) if valid is None else jnp.asarray(valid, bool)
    check_same_shape(rewards=rewards, group=group, valid=valid)
    r, ids = masked(rewards, valid), segment_ids(group)
    rows = segment_sum(jnp.ones_like(r), ids, valid)
    # Shifts that cancel are constants: by the smallest reward, and by the largest exponent below.
    deviation = r + jax.lax.stop_gradient(segment_max(-r, ids, valid))[ids]
    mean = segment_sum(deviation, ids, valid) / jnp.maximum(rows, 1)
    deviation = jnp.where(valid, deviation - mean[ids], 0)
    variance = segment_sum(deviation**2, ids, valid) / jnp.maximum(rows - ddof, 1)
    z = deviation / jnp.sqrt(variance + epsilon**2)[ids]
    z = jnp.where(valid, z - jax.lax.stop_gradient(segment_max(z, ids, valid))[ids], 0)
    total = jnp.where(rows > 0, segment_sum(jnp.exp(z), ids, valid), 1)
    log_p = z - jnp.log(total)[ids]
    entropy = segment_sum(-jnp.exp(log_p) * log_p, ids, valid)
    return masked(entropy[ids], valid), {"reward_entropy": masked_sum(entropy, rows > 0)}


def extreme_rows(rewards: Array, group: Array, valid: Array | None = None) -> tuple[Array, Array, Array]:
    """The rows of the highest and the lowest reward in every group; the first of several.

    Example:
      >>> rewards, group = jnp.array([1.0, 7.0, 3.0, 7.0]), jnp.array([4, 9, 4, 9])
      >>> high, low, is_pair = extreme_rows(rewards, group)
      >>> high.tolist(), low.tolist(), is_pair.tolist()
      ([2, 1, 2, 1], [0, 1, 0, 1], [True, False, True, False])

    Args:
      rewards: f[N] of every row.
      group: i[N] any integers.
      valid: bool[N] rows that count; None for all.

    Returns:
      high, low: i32[N] the two rows of the row's group; 0 at rows that do not count.
      is_pair: bool[N] the row counts and the two rewards differ.

    Raises:
      ValueError: shapes that differ.
    """
    valid = jnp.ones(jnp.shape(rewards), bool) if valid is None else jnp.asarray(valid, bool)
    check_same_shape(rewards=rewards, group=group, valid=valid)
    r, ids = constant(rewards, valid), segment_ids(group)
    place = jnp.arange(r.shape[0], dtype=jnp.int32)

    def first(is_it: Array) -> Array:
        """The first row of every id where `is_it`; some row where there is none."""
        rows = jax.ops.segment_min(jnp.where(is_it, place, r.shape[0]), ids, num_segments=r.shape[0])
        return jnp.where(valid, rows[ids], 0)

    high = first(valid & (r == segment_max(r, ids, valid)[ids]))
    low = first(valid & (r == -segment_max(-r, ids, valid)[ids]))
    return high, low, valid & (r[high] > r[low])


def r2m(
    rewards: Array,
    label_rewards: Array,
    group: Array,
    valid: Array | None = None,
    *,
    alpha: float = 0.3,
    epsilon: float = 1e-6,
) -> tuple[Array, Metrics]:
    """R2M: keeps a reward model in step with the policy on pairs that it labels itself.

    ℓ = (1−α)·[−log σ(r_w − r_l)] + α·H

    w and l are the rows of the group's highest and lowest label reward, r the rewards that the model gives
    now, and H their `group_reward_entropy`, whose descent sets the best apart from the rest.

    Example:
      >>> rewards, group = jnp.array([0.0, jnp.log(3.0)]), jnp.array([0, 0])
      >>> loss, _ = r2m(rewards, jnp.array([1.0, 2.0]), group, alpha=0.0)
      >>> [round(x, 4) for x in loss.tolist()]  # σ(ln 3) = 3/4, for both rows of the group
      [0.2877, 0.2877]

    Args:
      rewards: f[N] the model's rewards with the policy's present hidden states; the gradient flows here.
      label_rewards: f[N] rewards that choose the pair, in the paper those that the policy was just trained
        with; constants. A model's own labels can only sharpen its ranking: what is new comes from the states.
      group: i[N] any integers; rows with the same one are answers to the same prompt.
      valid: bool[N] rows that count; None for all.
      alpha: α in [0, 1].
      epsilon: that of `group_reward_entropy`.

    Returns:
      f[N] loss (nats) of the row's group, at each of its valid rows; 0 at others; float32 or wider. The mean
      over rows weighs groups by their sizes. A group of equal label rewards has no pair and no first term.
      Metrics: `reward_entropy`, mean over groups; over those with a pair `rewards/margins`, r_w − r_l, and
      `rewards/accuracies`, the share where it is positive.

    Raises:
      ValueError: shapes that differ, or α outside [0, 1].

    References:
      2601.22664.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} weighs two terms and must lie in [0, 1]")
    entropy, metrics = group_reward_entropy(rewards, group, valid, epsilon=epsilon)
    high, low, is_pair = extreme_rows(label_rewards, group, valid)
    r = masked(rewards, is_pair)
    margin = masked(r[high] - r[low], is_pair)
    loss = (1 - alpha) * masked(negative_log_sigmoid(margin), is_pair) + alpha * entropy
    is_winner = is_pair & (high == jnp.arange(high.shape[0]))  # one row of each group
    return loss, metrics | {
        "rewards/accuracies": masked_sum(margin > 0, is_winner),
        "rewards/margins": masked_sum(margin, is_winner),
    }
