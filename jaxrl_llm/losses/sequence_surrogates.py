"""Surrogates with one ratio per sequence: every token of a row has the row's value."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, masked, masked_sum, merge
from jaxrl_llm.losses.ratios import clamp_log_ratio, sequence_log_ratio
from jaxrl_llm.losses.surrogates import bounds, clip_shares, ppo_clip, token_advantages


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
    ratio = partial(sequence_log_ratio, form=form)
    return ppo_clip(logp, old_logp, advantages, mask, epsilon=epsilon, epsilon_high=epsilon_high, ratio=ratio)


def luspo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    epsilon: float = 2e-3,
    epsilon_high: float | None = 2.5e-3,
    form: str = "sequence",
) -> tuple[Array, Metrics]:
    """LUSPO: GSPO with every sequence weighted by its length, so that long answers are not held back.

    Σ_t ℓ_t = −length·min(s·A, clip(s, 1−ε, 1+ε_high)·A), for one advantage per sequence

    The token loss is that of `gspo`. What makes it LUSPO is the aggregation: seq_mean_token_sum gives the
    paper's objective, where GSPO takes seq_mean_token_mean.

    Example:
      >>> from jaxrl_llm.losses.aggregation import aggregate
      >>> logp, mask = jnp.zeros((2, 3)), jnp.array([[True, True, True], [True, False, False]])
      >>> loss, _ = luspo(logp, logp, jnp.array([[1.0], [-1.0]]), mask)
      >>> total = aggregate(loss, mask, "seq_mean_token_sum")  # (−1·3 + 1·1) over 2 rows
      >>> float(total.sum), float(total.weight)
      (-2.0, 2.0)

    Args, Returns and Raises: as `gspo`; the bounds are the paper's.

    References:
      2602.05261; bounds from its §5.1.
    """
    return gspo(logp, old_logp, advantages, mask, epsilon=epsilon, epsilon_high=epsilon_high, form=form)


def gmpo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    epsilon: float = 0.4,
    epsilon_high: float | None = None,
) -> tuple[Array, Metrics]:
    """GMPO: the geometric mean of a sequence's ratios, each clipped before the mean is taken.

    ℓ_t = −A_t·exp(mean_u d̃_u) at every token t, with d = log π − log π_old and

      A > 0: d̃ = min(d, ε_high)
      A < 0: d̃ = max(d, −ε)

    Clipped tokens have no gradient; each other token of a row of n gets −A·exp(mean d̃) of the row's sum of ℓ,
    whatever its own ratio, so that one outlier moves the row by its n-th root only.

    Example:
      >>> logp = jnp.log(jnp.array([[1.21, 8.0], [2.0, 8.0]]))  # ratios; ε_high = ln 1
      >>> mask, advantages = jnp.ones((2, 2), bool), jnp.array([[1.0], [-1.0]])
      >>> loss, _ = gmpo(logp, jnp.zeros((2, 2)), advantages, mask, epsilon_high=0.0)
      >>> [[round(x, 4) for x in row] for row in loss.tolist()]  # −√(1·1), and √(2·8)
      [[-1.0, -1.0], [4.0, 4.0]]

    Args:
      logp: f[N, T] log-probs (nats) under the policy in training.
      old_logp: f[N, T] log-probs (nats) under the policy before this batch's updates; constants.
      advantages: f[N, T], or f[N, 1] for one per sequence as in the paper; constants.
      mask: bool[N, T] tokens that count.
      epsilon: lower bound −ε on the log-ratio (nats), and upper bound too unless `epsilon_high` is given; inf
        switches it off. The paper's bounds on the ratio are e^−0.4 and e^0.4.
      epsilon_high: upper bound on the log-ratio (nats).

    Returns:
      f[N, T] token loss, 0 where masked, float32 or wider; its mean over sequences is the paper's objective
      under the aggregation seq_mean_token_mean. The mean of d̃ is clamped to ±20 nats, with gradient 0 beyond.
      Metrics: the clip ratios of `ppo_clip` and `clamped_ratio`, shares of the tokens.

    Raises:
      ValueError: shapes that do not fit, or a negative epsilon.

    References:
      2507.20673.
    """
    bounds(epsilon, epsilon_high)
    check_same_shape(logp=logp, old_logp=old_logp, mask=mask)
    high = epsilon if epsilon_high is None else epsilon_high
    d = masked(logp, mask) - masked(jax.lax.stop_gradient(old_logp), mask)
    a = token_advantages(advantages, mask)
    is_low, is_high = (d < -epsilon) & (a < 0), (d > high) & (a > 0)
    clipped = jnp.where(is_low, -epsilon, jnp.where(is_high, high, d))
    tokens = jnp.sum(mask, axis=1, keepdims=True, dtype=d.dtype)
    mean, outside = clamp_log_ratio(jnp.sum(clipped, axis=1, keepdims=True) / jnp.maximum(tokens, 1))
    return -a * jnp.exp(mean), clip_shares(is_low, is_high, mask) | {
        "clamped_ratio": masked_sum(outside, mask)
    }


def hacpo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    is_own: Array,
    source_mean_logp: Array,
    source_weight: Array,
    step: Array | int = 0,
    epsilon: float = 3e-4,
    epsilon_high: float | None = 4e-4,
    alpha: float = 1.0,
    delta: float = 0.8,
    delta_step: float = 0.025,
) -> tuple[Array, Metrics]:
    """HACPO: GSPO on a learner's own answers, and a discounted, tightening form of it on other agents'.

    With f the mean log-prob that an answer had under the agent who wrote it, for the learner k:

      own rows:    ℓ = `gspo`
      other rows:  ℓ = −c·sg(c)^α·ω·A with s = exp(mean_t log π − f), ω = P̂_j/P̂_k,
                   c = clip(s, min(1, 1−δ + step·δ_step), 1)

    An answer that has become likelier than it was for its author (s > 1) has no gradient, nor has one below
    the lower bound, which rises with every update on a batch: from step = δ/δ_step on only own rows are
    learnt. In between the gradient of the row's mean of ℓ is −c^(α+1)·ω·A·∇log s. f is a mean per token, so
    the two tokenizers may cut the text differently.

    Example:
      >>> logp = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.25]]))
      >>> loss, _ = hacpo(
      ...     logp, logp, jnp.array([[1.0], [1.0]]), jnp.ones((2, 2), bool), is_own=jnp.array([True, False]),
      ...     source_mean_logp=jnp.log(jnp.array([0.9, 0.5])), source_weight=jnp.array([1.0, 2.0])
      ... )
      >>> [[round(x, 4) for x in row] for row in loss.tolist()]  # s = 1; s = 1/2: −(1/2)·(1/2)·2
      [[-1.0, -1.0], [-0.5, -0.5]]

    Args:
      logp: f[N, T] log-probs (nats) under the learner in training, in its own tokens.
      old_logp: f[N, T] log-probs (nats) under the learner before this batch's updates; constants, read at own
        rows only.
      advantages: f[N, T], or f[N, 1] for one per sequence; constants. The learner's own for all rows, as from
        the advantage of the same name.
      mask: bool[N, T] tokens that count.
      is_own: bool[N] rows that the learner wrote.
      source_mean_logp: f[N] mean log-prob per token (nats) of the row under its author's policy as it wrote,
        in the author's tokens; a constant, not read at own rows.
      source_weight: f[N] ω, the author's recent mean reward over the learner's (the advantage's sample_weight
        is the inverse); a constant, not read at own rows.
      step: i[] index of this update among those on the same rollouts, from 0. May be traced.
      epsilon: lower clip of own rows, and upper clip too if `epsilon_high` is None.
      epsilon_high: upper clip of own rows.
      alpha: α ≥ 0, how fast other rows lose weight as s falls; 0 for the clipped ratio alone, 1 or 3 in the
        paper.
      delta: δ in [0, 1]; 0.8 in the paper's appendix (0.2 in its text).
      delta_step: δ_step ≥ 0; 0.025 or 0.01 in the paper.

    Returns:
      f[N, T] token loss, 0 where masked, float32 or wider. Under seq_mean_token_mean over all rows it is the
      objective of the authors' code; the paper's J_self + J_cross, each over the G answers of one agent, is
      that times the number of agents. log s is clamped to ±20 nats.
      Metrics: those of `gspo` for own rows; `cross/clip_ratio/{low_mean,high_mean,region_mean}`, the shares
      of other rows' tokens below, above and outside the bounds; `clamped_ratio` of all tokens.

    Raises:
      ValueError: shapes that do not fit, a negative epsilon, alpha or delta_step, or delta outside [0, 1].

    References:
      2603.02604 eq. 9 to 14, with the learner's advantage in eq. 10 as in its appendix E.
    """
    if alpha < 0 or delta_step < 0 or not 0 <= delta <= 1:
        raise ValueError(
            f"alpha={alpha} and delta_step={delta_step} must not be negative, delta={delta} lie in [0, 1]"
        )
    check_same_shape(
        is_own=is_own, source_mean_logp=source_mean_logp, source_weight=source_weight, rows=mask[:, 0]
    )
    own, cross = mask & is_own[:, None], mask & ~is_own[:, None]
    own_loss, metrics = gspo(logp, old_logp, advantages, own, epsilon=epsilon, epsilon_high=epsilon_high)

    is_cross = jnp.any(cross, axis=1, keepdims=True)
    f, weight = (
        masked(jax.lax.stop_gradient(x)[:, None], is_cross) for x in (source_mean_logp, source_weight)
    )
    learner = masked(logp, cross)
    tokens = jnp.sum(cross, axis=1, keepdims=True, dtype=learner.dtype)
    d, outside = clamp_log_ratio(jnp.sum(learner, axis=1, keepdims=True) / jnp.maximum(tokens, 1) - f)
    s = jnp.exp(d)
    low = jnp.minimum(1 - delta + jnp.asarray(step, s.dtype) * delta_step, 1)
    is_high = s > 1
    is_low = ~is_high & ((s < low) | (low >= 1))  # bounds that meet leave a constant: no gradient at s = 1
    c = jnp.where(is_low, low, jnp.where(is_high, 1, s))
    cross_loss = -token_advantages(advantages, cross) * weight * jax.lax.stop_gradient(c) ** alpha * c

    more = {f"cross/{name}": share for name, share in clip_shares(is_low, is_high, cross).items()}
    more["clamped_ratio"] = masked_sum(outside, cross)
    return jnp.where(own, own_loss, cross_loss), merge(metrics, more)
