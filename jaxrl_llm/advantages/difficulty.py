"""HA-DW: advantages weighted by how hard a prompt is for the policy as it has lately been.

A group's mean reward is a biased baseline once groups without any success or failure are dropped: too high
on hard prompts, too low on easy ones. HA-DW (2601.08521) corrects by a factor of the advantage that depends
on the group's mean reward against an anchor, a running belief about the batch's. Rewards lie in [0, 1].

One step, with the anchor that the batches before it have left:

  anchor = ha_dw_anchor(state, accuracy)                        # accuracy: the batch's mean reward
  advantages, metrics = ha_dw(rewards, group, anchor=anchor)
  state = ha_dw_update(state, accuracy)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.advantages.group import grpo, usable_rows
from jaxrl_llm.losses.aggregation import (
    Array,
    Metrics,
    WeightedSum,
    check_same_shape,
    float_of,
    masked_sum,
)
from jaxrl_llm.losses.ratios import clamp_log_ratio
from jaxrl_llm.losses.segments import segment_ids, segment_sum

FORMS = ("filter", "window")


def baseline_bias(success_rate: Array, group_size: int) -> Array:
    """By how much the mean of a group with both a success and a failure exceeds the true success rate.

    E[p̂ − p | 0 < p̂ < 1] = p(1−p)·((1−p)^(G−1) − p^(G−1)) / (1 − (1−p)^G − p^G)

    of rewards 0 and 1 drawn with success rate p in groups of G. Positive for p < ½, negative for p > ½, odd
    around ½, and smaller in larger groups: the baseline is too high on hard prompts. With p < 1/G any kept
    group overestimates p. (The advantages of kept groups still average to 0, over their rows.)

    Example:
      >>> [round(float(b), 4) for b in baseline_bias(jnp.array([0.1, 0.3, 0.5, 0.7]), 8)]
      [0.0756, 0.0183, 0.0, -0.0183]

    Args:
      success_rate: f[...] p in (0, 1); NaN at 0 and 1, where no group is kept.
      group_size: G, at least 2.

    Returns:
      f[...] the bias, float32 or wider.

    Raises:
      ValueError: groups of fewer than two.

    References:
      2601.08521, whose proof words the direction the wrong way round.
    """
    if group_size < 2:
        raise ValueError(f"group_size={group_size} must be at least 2: no smaller group has both outcomes")
    p = float_of(success_rate)
    q = 1 - p
    chance = -jnp.expm1(group_size * jnp.log1p(-p)) - p**group_size  # of a kept group
    return p * q * (q ** (group_size - 1) - p ** (group_size - 1)) / chance


class HaDwState(NamedTuple):
    """The belief about the policy's accuracy, from `ha_dw_init`.

    Attributes:
      belief: f32[] C after the last batch.
      history: f32[size] the last beliefs (filter) or batch accuracies (window), oldest overwritten.
      seen: i32[] number of batches so far.
    """

    belief: Array
    history: Array
    seen: Array


def ha_dw_init(size: int = 10) -> HaDwState:
    """The state before the first batch; `size` batches are remembered (10 in the paper's window form)."""
    if size < 1:
        raise ValueError(f"size={size} batches must be at least 1")
    return HaDwState(jnp.zeros(()), jnp.zeros(size), jnp.zeros((), jnp.int32))


def ha_dw_anchor(state: HaDwState, accuracy: Array) -> Array:
    """f32[] the belief C that this batch is compared with: its own accuracy if it is the first."""
    return jnp.where(state.seen > 0, state.belief, jnp.asarray(accuracy, jnp.float32))


def ha_dw_update(
    state: HaDwState, accuracy: Array, *, form: str = "filter", gain: float = 1.0, min_gain: float = 0.01
) -> HaDwState:
    """The belief after a batch of mean reward y.

    filter: C ← C + η·(y − C) with η = clip(gain·σ, min_gain, 1), a scalar Kalman filter whose gain is σ,
      the population standard deviation of the beliefs in the history
    window: C ← mean of the last accuracies, as in the released code

    Example:
      >>> state = ha_dw_init(size=2)
      >>> for accuracy in (0.25, 0.5, 1.0):
      ...     state = ha_dw_update(state, accuracy, form="window")
      >>> float(state.belief)  # (0.5 + 1) / 2
      0.75

    Args:
      state: of one form throughout.
      accuracy: f[] y, the batch's mean reward; NaN (no usable row) leaves the state as it is.
      form: one of `FORMS`.
      gain: η over σ. The paper names no value for it, nor for the filter's memory.
      min_gain: not in the paper, where beliefs that do not move have a gain of 0 and never move again.

    Returns:
      The next state; the belief stays between the smallest and the largest accuracy seen.

    Raises:
      ValueError: unknown form.

    References:
      2601.08521 (filter), its appendix F (window).
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; one of {', '.join(FORMS)}")
    y = jnp.asarray(accuracy, jnp.float32)
    size = state.history.shape[0]
    place = jnp.arange(size)
    if form == "filter":
        past = place < state.seen
        mean = jnp.mean(state.history, where=past)
        spread = jnp.sqrt(jnp.mean((state.history - mean) ** 2, where=past))  # NaN before the first batch
        prior = ha_dw_anchor(state, y)
        belief = prior + jnp.clip(jnp.where(state.seen > 0, gain * spread, 0), min_gain, 1) * (y - prior)
        history = jnp.where(place == state.seen % size, belief, state.history)
    else:
        history = jnp.where(place == state.seen % size, y, state.history)
        belief = jnp.mean(history, where=place <= state.seen)
    after = HaDwState(belief, history, state.seen + 1)
    return jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(y), new, old), after, state)


def ha_dw_weights(
    advantages: Array,
    rewards: Array,
    group: Array,
    valid: Array | None = None,
    *,
    anchor: Array | float,
    weight_scale: float = 1.3,
) -> tuple[Array, Metrics]:
    """Factors of the advantages: successes count more on hard prompts, failures more on easy ones.

    Φ_i = λ·exp(−sgn(A_i)·(p̂ − C)), p̂ the mean reward of i's group and C the anchor

    On a hard prompt (p̂ = C − M) a success has λ·e^M and a failure λ·e^−M; their product is λ². Φ is positive,
    so no advantage changes its sign, but a group's weighted advantages no longer add up to 0; that shift is
    what corrects the baseline, to 1 − Φ·(1 − p̂) as a success sees it. λ = 1 and p̂ = C is no weight at all.

    Example:
      >>> rewards, group = jnp.array([1.0, 0.0, 0.0, 0.0]), jnp.zeros(4, int)  # p̂ = 1/4
      >>> weights, _ = ha_dw_weights(rewards - 0.25, rewards, group, anchor=0.5, weight_scale=1.0)
      >>> [round(w, 3) for w in weights.tolist()]  # e^¼ and e^−¼
      [1.284, 0.779, 0.779, 0.779]

    Args:
      advantages: f[N] of any group baseline, standardised in the paper; only the signs are used.
      rewards: f[N] in [0, 1]; constants.
      group: i[N] any integers; rows with the same one are compared.
      valid: bool[N] rows that count; None for all.
      anchor: f[] C, of `ha_dw_anchor` or fixed.
      weight_scale: λ; 1.3 is the paper's best, 1.5 the released code's.

    Returns:
      weights: f[N] Φ without gradient, float32 or wider; λ where the advantage is 0. Multiply the advantages
        by them, outside any clip of ratios.
      metrics: `ha_dw/weight`, mean Φ over rows whose advantage is not 0; `ha_dw/clamped_ratio`, share of
        those rows with |p̂ − C| > 20, which count as 20 (and have rewards that are no accuracies).

    Raises:
      ValueError: shapes that differ.

    References:
      2601.08521.
    """
    rewards = jax.lax.stop_gradient(float_of(rewards))
    advantages = jax.lax.stop_gradient(float_of(advantages))
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid, bool)
    check_same_shape(advantages=advantages, rewards=rewards, group=group, valid=valid)
    anchor = jax.lax.stop_gradient(anchor)
    counts = valid & jnp.isfinite(rewards)
    ids = segment_ids(group)
    rows = segment_sum(jnp.ones_like(rewards), ids, counts)
    accuracy = segment_sum(rewards, ids, counts) / jnp.maximum(rows, 1)
    log_weight, outside = clamp_log_ratio(-jnp.sign(advantages) * (accuracy[ids] - anchor))
    weights = weight_scale * jnp.exp(log_weight)
    return weights, {
        "ha_dw/weight": masked_sum(weights, advantages != 0),
        "ha_dw/clamped_ratio": masked_sum(outside, advantages != 0),
    }


def ha_dw(
    rewards: Array,
    group: Array,
    valid: Array | None = None,
    *,
    anchor: Array | float | None = None,
    weight_scale: float = 1.3,
    epsilon: float = 1e-6,
    ddof: int = 1,
) -> tuple[Array, Metrics]:
    """GRPO's advantage under HA-DW weights: A = Φ·(r − mean)/(std + ε) of the group.

    Example:
      >>> rewards, group = jnp.array([1.0, 0.0]), jnp.array([0, 0])  # p̂ = 1/2, advantages ±√½
      >>> a, _ = ha_dw(rewards, group, anchor=1.0, weight_scale=2**0.5, epsilon=0.0)
      >>> [round(x, 3) for x in a.tolist()]  # e^½ and −e^−½
      [1.649, -0.607]

    Args, Returns and Raises: as `grpo` and `ha_dw_weights`; without an anchor, the batch's mean reward.
    """
    advantages, metrics = grpo(rewards, group, valid, epsilon=epsilon, ddof=ddof)
    if anchor is None:
        total = masked_sum(rewards, usable_rows(float_of(rewards), valid))
        anchor = total.sum / jnp.maximum(total.weight, 1)
    weights, more = ha_dw_weights(advantages, rewards, group, valid, anchor=anchor, weight_scale=weight_scale)
    return advantages * weights, metrics | more


def ha_dw_step(
    state: HaDwState,
    rewards: Array,
    group: Array,
    valid: Array | None = None,
    *,
    form: str = "filter",
    gain: float = 1.0,
    min_gain: float = 0.01,
    **options: Any,
) -> tuple[Array, HaDwState, Metrics]:
    """One batch: its advantages against the belief of the batches before it, and the belief after it.

    Example:
      >>> rewards, group = jnp.array([1.0, 0.0, 1.0, 1.0]), jnp.array([0, 0, 1, 1])
      >>> _, state, metrics = ha_dw_step(ha_dw_init(), rewards, group)
      >>> float(state.belief), float(metrics["ha_dw/anchor"].sum)  # the first batch is its own anchor
      (0.75, 0.75)

    Args:
      state: from `ha_dw_init` or the batch before.
      rewards, group, valid: as `grpo`.
      form, gain, min_gain: as `ha_dw_update`.
      options: of `ha_dw`.

    Returns:
      advantages f[N], the next state, and the metrics of `ha_dw` with the anchor among them.
    """
    total = masked_sum(rewards, usable_rows(float_of(rewards), valid))
    accuracy = jnp.where(total.weight > 0, total.sum / jnp.maximum(total.weight, 1), jnp.nan)
    anchor = jnp.nan_to_num(ha_dw_anchor(state, accuracy))
    advantages, metrics = ha_dw(rewards, group, valid, anchor=anchor, **options)
    metrics |= {"ha_dw/anchor": WeightedSum(anchor, jnp.ones_like(anchor))}
    return advantages, ha_dw_update(state, accuracy, form=form, gain=gain, min_gain=min_gain), metrics
