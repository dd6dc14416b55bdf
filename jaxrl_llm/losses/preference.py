"""Preference losses: a chosen answer against a rejected one, or (KTO) single answers known as good or bad.

Inputs are numbers of whole answers, f[N]: scores, or an answer's log-probs summed or averaged over its
tokens, which `sequence_logp` makes of f[N, T]. With h = Σ (log π − log π_ref) and p = mean log π, w for the
chosen answer and l for the rejected one:

| name          | loss                                            | log-probs                 | paper      |
|---------------|-------------------------------------------------|---------------------------|------------|
| bradley_terry | −log σ(s_w − s_l − m)                           | none: scores              |            |
| dpo           | −log σ(β(h_w − h_l))                            | sums, and of a reference  | 2305.18290 |
| ipo           | (h_w − h_l − 1/(2β))²                           | sums, and of a reference  | 2310.12036 |
| kto           | λ·(1 − σ(±β(h − z₀))), + for a good answer      | sums, and of a reference  | 2402.01306 |
| simpo         | −log σ(β(p_w − p_l) − γ)                        | means                     | 2405.14734 |
| orpo          | −p_w − λ·log σ(log-odds_w − log-odds_l)         | means                     | 2403.07691 |
| mpo           | dpo + each answer by itself + likelihood        | sums, and of a reference  | 2411.10442 |

A loss is f[N], 0 where masked; `aggregate(loss[:, None], mask[:, None])` is its mean. The gradient of every
−log σ(x) is −σ(−x), so no difference is too large, and nothing is clamped but ORPO's odds. Metrics, as means
over pairs, have TRL's names: `rewards/chosen` and `rewards/rejected`, the rewards that the loss compares;
`rewards/margins`, their difference; `rewards/accuracies`, the share with chosen above rejected.
"""

import math

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, masked, masked_sum
from jaxrl_llm.losses.ratios import LOG_RATIO_CLAMP


def sequence_logp(logp: Array, mask: Array, *, normalise: bool = False) -> Array:
    """Log-prob of every sequence: the sum over its tokens, or with `normalise` the mean.

    Example:
      >>> logp, mask = jnp.array([[-1.0, -2.0, -9.0]]), jnp.array([[True, True, False]])
      >>> sequence_logp(logp, mask).tolist(), sequence_logp(logp, mask, normalise=True).tolist()
      ([-3.0], [-1.5])

    Args:
      logp: f[N, T] log-probs (nats).
      mask: bool[N, T] tokens that count.
      normalise: divide by the number of tokens.

    Returns:
      f[N] (nats), float32 or wider; 0 for a row without tokens.

    Raises:
      ValueError: shapes that differ.
    """
    check_same_shape(logp=logp, mask=mask)
    total = jnp.sum(masked(logp, mask), axis=1)
    if not normalise:
        return total
    return total / jnp.maximum(jnp.sum(mask, axis=1, dtype=total.dtype), 1)


def check_rows(mask: Array, **arrays: Array) -> None:
    """Raises a ValueError unless all arrays have the mask's shape and that is [N].

    Log-probs of tokens would otherwise pass for those of N·T answers.
    """
    check_same_shape(**arrays, mask=mask)
    if jnp.ndim(mask) != 1:
        raise ValueError(
            f"mask {jnp.shape(mask)} must be [N], one entry per answer or pair: "
            "sum token log-probs with sequence_logp first"
        )


def constant(x: Array, mask: Array) -> Array:
    """`x` without gradient, 0 where masked."""
    return masked(jax.lax.stop_gradient(x), mask)


def negative_log_sigmoid(x: Array) -> Array:
    """−log σ(x) = log(1 + e^−x), for any x."""
    return jax.nn.softplus(-x)


def reward_metrics(chosen: Array, rejected: Array, mask: Array) -> Metrics:
    """What preference losses report of the rewards f[N] that they compare."""
    return {
        "rewards/chosen": masked_sum(chosen, mask),
        "rewards/rejected": masked_sum(rejected, mask),
        "rewards/accuracies": masked_sum(chosen > rejected, mask),
        "rewards/margins": masked_sum(chosen - rejected, mask),
    }


def bradley_terry(
    chosen_scores: Array, rejected_scores: Array, mask: Array, *, margin: Array | float = 0.0
) -> tuple[Array, Metrics]:
    """Bradley–Terry: the chosen answer's score is to exceed the rejected one's, by a margin on request.

    ℓ = −log σ(s_w − s_l − m)

    Example:
      >>> loss, _ = bradley_terry(jnp.log(jnp.array([6.0])), jnp.log(jnp.array([2.0])), jnp.array([True]))
      >>> round(float(loss[0]), 4)  # σ(ln 3) = 3/4: ln(4/3)
      0.2877

    Args:
      chosen_scores: f[N] scores of the chosen answers.
      rejected_scores: f[N] scores of the rejected ones.
      mask: bool[N] pairs that count.
      margin: m, one number or f[N]; constants.

    Returns:
      f[N] loss (nats), 0 where masked, float32 or wider; metrics `rewards/*` of the scores.

    Raises:
      ValueError: shapes that do not fit.
    """
    check_rows(mask, chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    if jnp.ndim(margin):
        check_rows(mask, margin=jnp.asarray(margin))
        margin = masked(jnp.asarray(margin), mask)
    chosen, rejected = masked(chosen_scores, mask), masked(rejected_scores, mask)
    loss = negative_log_sigmoid(chosen - rejected - jax.lax.stop_gradient(margin))
    return masked(loss, mask), reward_metrics(chosen, rejected, mask)


def _log_ratio(logps: Array, ref_logps: Array, mask: Array) -> Array:
    """h = log π − log π_ref of whole answers, the reference a constant; 0 where masked."""
    check_rows(mask, logps=logps, ref_logps=ref_logps)
    return masked(logps, mask) - constant(ref_logps, mask)


def dpo(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    mask: Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Array, Metrics]:
    """DPO: Bradley–Terry on the rewards β·log(π/π_ref) that the policy itself implies.

    ℓ = −(1−ε)·log σ(x) − ε·log σ(−x) with x = β(h_w − h_l), h = log π − log π_ref of the whole answer

    Example:
      >>> x = jnp.log(jnp.array([[8.0], [2.0], [2.0], [2.0]]))  # h_w = ln 4, h_l = 0
      >>> loss, _ = dpo(*x, jnp.array([True]), beta=0.5)
      >>> round(float(loss[0]), 4)  # σ(½ ln 4) = 2/3: ln(3/2)
      0.4055

    Args:
      chosen_logps: f[N] log-probs (nats) of the chosen answers, summed over tokens (`sequence_logp`).
      rejected_logps: f[N] the same of the rejected ones.
      ref_chosen_logps: f[N] those of the chosen ones under the reference policy; constants.
      ref_rejected_logps: f[N] those of the rejected ones; constants.
      mask: bool[N] pairs that count.
      beta: β > 0, how much a nat of log-ratio is worth.
      label_smoothing: ε, the probability that a label is wrong ("conservative" DPO).

    Returns:
      f[N] loss (nats), 0 where masked, float32 or wider; metrics `rewards/*` of β·h.

    Raises:
      ValueError: shapes that do not fit.

    References:
      2305.18290 eq. 7.
    """
    chosen = beta * _log_ratio(chosen_logps, ref_chosen_logps, mask)
    rejected = beta * _log_ratio(rejected_logps, ref_rejected_logps, mask)
    x = chosen - rejected
    loss = negative_log_sigmoid(x) + label_smoothing * x  # −log σ(−x) = −log σ(x) + x
    return masked(loss, mask), reward_metrics(chosen, rejected, mask)


def ipo(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    mask: Array,
    *,
    beta: float = 0.1,
) -> tuple[Array, Metrics]:
    """IPO: the difference of log-ratios is regressed on 1/(2β), so that it stays bounded.

    ℓ = (h_w − h_l − 1/(2β))²

    Example:
      >>> x = jnp.array([[-1.0], [-4.0], [-2.0], [-3.0]])  # h_w = 1, h_l = −1
      >>> ipo(*x, jnp.array([True]), beta=0.5)[0].tolist()  # (2 − 1)²
      [1.0]

    Args and Raises: as `dpo`. The paper has sums of log-probs; TRL has means (`normalise=True`).

    Returns:
      f[N] loss (nats²), 0 where masked, float32 or wider; metrics `rewards/*` of β·h.

    References:
      2310.12036 eq. 17, whose τ is β.
    """
    chosen = _log_ratio(chosen_logps, ref_chosen_logps, mask)
    rejected = _log_ratio(rejected_logps, ref_rejected_logps, mask)
    loss = (chosen - rejected - 1 / (2 * beta)) ** 2
    return masked(loss, mask), reward_metrics(beta * chosen, beta * rejected, mask)


def kto_reference_point(logps: Array, ref_logps: Array, mask: Array) -> Array:
    """KTO's z₀: how far the policy is from its reference, measured on answers that belong to other prompts.

    z₀ = max(0, mean of h over the batch's mismatched pairs), h = log π − log π_ref

    It couples all rows, so it is made of the whole batch, before any cut into micro-batches.

    Example:
      >>> h, zeros = jnp.array([1.0, 4.0, 9.0]), jnp.zeros(3)
      >>> float(kto_reference_point(h, zeros, jnp.array([True, True, False])))
      2.5

    Args:
      logps: f[N] log-probs (nats) of answers under the policy, each after the prompt of another row.
      ref_logps: f[N] the same under the reference policy.
      mask: bool[N] rows that count.

    Returns:
      f[] (nats) without gradient; 0 without rows.

    Raises:
      ValueError: shapes that do not fit.

    References:
      2402.01306 §4.1.
    """
    total, rows = masked_sum(_log_ratio(logps, ref_logps, mask), mask)
    return jax.lax.stop_gradient(jnp.maximum(total / jnp.maximum(rows, 1), 0))


def kto(
    logps: Array,
    ref_logps: Array,
    is_desirable: Array,
    reference_point: Array,
    mask: Array,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Array, Metrics]:
    """KTO: answers known to be good or bad by themselves, valued against a reference point as people do.

    ℓ = λ_D·(1 − σ(β(h − z₀))) where desirable, λ_U·(1 − σ(β(z₀ − h))) where not

    Example:
      >>> h, zeros, mask = jnp.log(jnp.array([3.0, 3.0])), jnp.zeros(2), jnp.array([True, True])
      >>> loss, _ = kto(h, zeros, jnp.array([True, False]), jnp.array(0.0), mask, beta=1.0)
      >>> [round(x, 4) for x in loss.tolist()]  # σ(ln 3) = 3/4
      [0.25, 0.75]

    Args:
      logps: f[N] log-probs (nats) of the answers, summed over tokens (`sequence_logp`).
      ref_logps: f[N] the same under the reference policy; constants.
      is_desirable: bool[N].
      reference_point: f[] z₀ (nats) of the whole batch (`kto_reference_point`); a constant.
      mask: bool[N] answers that count.
      beta: β > 0, how sharply value saturates.
      desirable_weight: λ_D.
      undesirable_weight: λ_U.

    Returns:
      f[N] loss in [0, λ], 0 where masked, float32 or wider. Metrics `rewards/chosen` and `rewards/rejected`,
      the means of β·h over desirable and over undesirable answers.

    Raises:
      ValueError: shapes that do not fit.

    References:
      2402.01306 §4.1.
    """
    check_rows(mask, is_desirable=is_desirable)
    reward = beta * _log_ratio(logps, ref_logps, mask)
    gain = reward - beta * jax.lax.stop_gradient(reference_point)
    loss = jnp.where(  # 1 − σ(x) = σ(−x)
        is_desirable, desirable_weight * jax.nn.sigmoid(-gain), undesirable_weight * jax.nn.sigmoid(gain)
    )
    return masked(loss, mask), {
        "rewards/chosen": masked_sum(reward, mask & is_desirable),
        "rewards/rejected": masked_sum(reward, mask & ~is_desirable),
    }


def simpo(
    chosen_mean_logps: Array,
    rejected_mean_logps: Array,
    mask: Array,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> tuple[Array, Metrics]:
    """SimPO: Bradley–Terry on mean log-probs with a target margin; no reference policy.

    ℓ = −log σ(β(p_w − p_l) − γ), p = mean log π over the answer's tokens

    Example:
      >>> one = jnp.array([True])
      >>> loss, _ = simpo(jnp.log(jnp.array([0.6])), jnp.log(jnp.array([0.2])), one, beta=1.0, gamma=0.0)
      >>> round(float(loss[0]), 4)  # σ(ln 3) = 3/4
      0.2877

    Args:
      chosen_mean_logps: f[N] mean log-probs (nats) of the chosen answers (`sequence_logp(normalise=True)`).
      rejected_mean_logps: f[N] the same of the rejected ones.
      mask: bool[N] pairs that count.
      beta: β > 0; 2 to 10 in the authors' advice.
      gamma: γ, the margin itself; the authors start from γ/β = 0.5 and search between 0 and 1.

    Returns:
      f[N] loss (nats), 0 where masked, float32 or wider; metrics `rewards/*` of β·p.

    Raises:
      ValueError: shapes that do not fit.

    References:
      2405.14734 eq. 6.
    """
    check_rows(mask, chosen_mean_logps=chosen_mean_logps, rejected_mean_logps=rejected_mean_logps)
    chosen, rejected = (beta * masked(x, mask) for x in (chosen_mean_logps, rejected_mean_logps))
    loss = negative_log_sigmoid(chosen - rejected - gamma)
    return masked(loss, mask), reward_metrics(chosen, rejected, mask)


def _log_odds(mean_logp: Array) -> tuple[Array, Array]:
    """log(e^p / (1 − e^p)) of p = mean_logp, and bool "was held".

    The odds have a pole at p = 0, where rounding may put a mean log-prob: p is held at −e^−20, where the
    log-odds are 20, with gradient 0 above.
    """
    bound = -math.exp(-LOG_RATIO_CLAMP)
    is_held = mean_logp > bound
    p = jnp.where(is_held, bound, mean_logp)
    return p - jnp.log(-jnp.expm1(p)), is_held


def orpo(
    chosen_mean_logps: Array, rejected_mean_logps: Array, mask: Array, *, beta: float = 0.1
) -> tuple[Array, Metrics]:
    """ORPO: supervised training on the chosen answer plus a log-odds ratio that pushes the rejected one away.

    ℓ = −p_w − λ·log σ(log-odds_w − log-odds_l), log-odds = p − log(1 − e^p), p = mean log π of the answer

    Example:
      >>> p = jnp.log(jnp.array([[0.5], [0.25]]))  # odds 1 and 1/3
      >>> round(float(orpo(*p, jnp.array([True]), beta=1.0)[0][0]), 4)  # ln 2 − ln(3/4)
      0.9808

    Args:
      chosen_mean_logps: f[N] mean log-probs (nats) of the chosen answers (`sequence_logp(normalise=True)`).
      rejected_mean_logps: f[N] the same of the rejected ones.
      mask: bool[N] pairs that count.
      beta: λ ≥ 0; TRL's name.

    Returns:
      f[N] loss (nats), 0 where masked, float32 or wider. Metrics `rewards/*` of λ·p, `nll` of the chosen
      answers per token, `log_odds_chosen`, the mean log-odds ratio, and `clamped_ratio`, the share of pairs
      with an answer of log-odds above 20.

    Raises:
      ValueError: shapes that do not fit.

    References:
      2403.07691 eq. 6 and 7.
    """
    check_rows(mask, chosen_mean_logps=chosen_mean_logps, rejected_mean_logps=rejected_mean_logps)
    chosen, rejected = masked(chosen_mean_logps, mask), masked(rejected_mean_logps, mask)
    chosen_odds, is_chosen_held = _log_odds(chosen)
    rejected_odds, is_rejected_held = _log_odds(rejected)
    log_odds_ratio = chosen_odds - rejected_odds
    loss = -chosen + beta * negative_log_sigmoid(log_odds_ratio)
    return masked(loss, mask), {
        **reward_metrics(beta * chosen, beta * rejected, mask),
        "nll": masked_sum(-chosen, mask),
        "log_odds_chosen": masked_sum(log_odds_ratio, mask),
        "clamped_ratio": masked_sum(is_chosen_held | is_rejected_held, mask),
    }


def mpo(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    chosen_lengths: Array,
    mask: Array,
    *,
    beta: float = 0.1,
    weights: tuple[float, float, float] = (0.8, 0.2, 1.0),
    reward_shift: Array | float = 0.0,
) -> tuple[Array, Metrics]:
    """MPO: which answer is better (DPO), how good each is by itself (BCO), how to write the good one (NLL).

    ℓ = w₁·[−log σ(β(h_w − h_l))] + w₂·[−log σ(βh_w − δ) − log σ(−(βh_l − δ))] − w₃·log π(y_w)/|y_w|

    Example:
      >>> x = jnp.array([[-6.0], [-4.0], [-6.0], [-4.0]])  # h = 0: every −log σ is ln 2
      >>> loss, _ = mpo(*x, jnp.array([3]), jnp.array([True]), weights=(1.0, 1.0, 0.5))
      >>> round(float(loss[0]), 4)  # 3·ln 2 + 0.5 · 6/3
      3.0794

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, mask, beta: as `dpo`.
      chosen_lengths: i[N] number of tokens of the chosen answers.
      weights: w₁, w₂, w₃; the default is InternVL's.
      reward_shift: δ, one number for the whole batch, a constant. BCO and InternVL keep a running mean of
        both answers' βh.

    Returns:
      f[N] loss (nats), 0 where masked, float32 or wider; metrics `rewards/*` of β·h, and `nll` of the chosen
      answers per token.

    Raises:
      ValueError: shapes that do not fit.

    References:
      2411.10442, whose code has the mean over the batch's tokens for the third term; used by Ostrakon-VL,
      2601.21342. BCO: 2404.04656.
    """
    preference_weight, quality_weight, generation_weight = weights
    preference, metrics = dpo(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, mask, beta=beta
    )
    check_rows(mask, chosen_lengths=chosen_lengths)
    chosen = beta * _log_ratio(chosen_logps, ref_chosen_logps, mask)
    rejected = beta * _log_ratio(rejected_logps, ref_rejected_logps, mask)
    shift = jax.lax.stop_gradient(reward_shift)
    quality = negative_log_sigmoid(chosen - shift) + negative_log_sigmoid(shift - rejected)
    nll = -masked(chosen_logps, mask) / jnp.maximum(chosen_lengths, 1)
    loss = preference_weight * preference + quality_weight * quality + generation_weight * nll
    return masked(loss, mask), metrics | {"nll": masked_sum(nll, mask)}
