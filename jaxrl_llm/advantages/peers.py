"""Advantages among several learners that answer the same prompts: XGRPO, and how capable each of them is."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.advantages.group import group_advantage
from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape


def xgrpo(
    rewards: Array,
    group: Array,
    valid: Array | None = None,
    *,
    is_peer: Array | None = None,
    scale: str = "group",
    epsilon: float = 1e-6,
    ddof: int = 1,
) -> tuple[Array, Metrics]:
    """XGRPO: a learner's own rows against statistics of its own and its peers' rewards.

    A_i = (r_i − mean)/(std + ε) of the pooled group for the learner's rows, 0 for the peers'

    Peers change the baseline and the scale, not the direction: with G own rows, G′ peer rows and scale = none
    the mean gradient is 1 − 1/(G + G′) times that of the expected reward, where GRPO has 1 − 1/G. Where all
    of the learner's rows fail but a peer's do not, they get equal negative advantages, whose gradient is 0 on
    average. (PRP, which trains on the peers' rows too, has `grpo`'s advantages of the pool.)

    Example:
      >>> rewards, group = jnp.array([0.0, 2.0, 4.0]), jnp.array([0, 0, 0])  # mean 2, std 2
      >>> xgrpo(rewards, group, is_peer=jnp.array([False, False, True]), epsilon=0.0)[0].tolist()
      [-1.0, 0.0, 0.0]

    Args:
      is_peer: bool[N] rows that another learner wrote; None for none, which is `grpo`.
      rewards, group, valid, scale, epsilon, ddof: as `group_advantage`; groups hold own and peer rows.

    Returns:
      As `group_advantage`; the metrics are of the pool.

    Raises:
      ValueError: as `group_advantage`.

    References:
      2605.07244 names the method; its statistics are a reconstruction and could not be confirmed.
    """
    advantages, metrics = group_advantage(rewards, group, valid, scale=scale, epsilon=epsilon, ddof=ddof)
    if is_peer is not None:
        check_same_shape(rewards=rewards, is_peer=is_peer)
        advantages = jnp.where(is_peer, 0, advantages)
    return advantages, metrics


class CapabilityState(NamedTuple):
    """The recent mean rewards of every agent, from `capability_init`.

    Attributes:
      history: f32[agents, window] the last batches' mean rewards, oldest overwritten.
      seen: i32[agents] number of batches so far.
    """

    history: Array
    seen: Array


def capability_init(agents: int, window: int = 5) -> CapabilityState:
    """The state before the first batch; the last `window` batches count (5 in the paper)."""
    if agents < 1 or window < 1:
        raise ValueError(f"agents={agents} and window={window} must be at least 1")
    return CapabilityState(jnp.zeros((agents, window)), jnp.zeros(agents, jnp.int32))


def capability_update(state: CapabilityState, mean_rewards: Array) -> CapabilityState:
    """The state after a batch.

    Args:
      state: of the batches before.
      mean_rewards: f[agents] mean reward of every agent's rows, at least 0; an agent with NaN or inf (no
        usable row) stays as it is.

    Raises:
      ValueError: a number of agents that differs.
    """
    check_same_shape(mean_rewards=mean_rewards, seen=state.seen)
    y = jnp.asarray(mean_rewards, jnp.float32)
    is_new = jnp.isfinite(y)
    size = state.history.shape[1]
    place = jnp.arange(size) == (state.seen % size)[:, None]
    return CapabilityState(
        jnp.where(place & is_new[:, None], y[:, None], state.history), state.seen + is_new.astype(jnp.int32)
    )


def capability(state: CapabilityState, *, floor: float = 1e-8) -> Array:
    """f32[agents] P̂, the mean of the last batches' mean rewards and at least `floor`; 1 before the first.

    Example:
      >>> state = capability_init(agents=2, window=2)
      >>> for means in ([0.75, 0.0], [0.25, 0.5], [0.5, 0.5]):
      ...     state = capability_update(state, jnp.array(means))
      >>> capability(state).tolist()  # (0.25 + 0.5)/2 and (0.5 + 0.5)/2
      [0.375, 0.5]
    """
    known = jnp.arange(state.history.shape[1]) < state.seen[:, None]
    mean = jnp.sum(state.history, axis=1, where=known) / jnp.maximum(jnp.sum(known, axis=1), 1)
    return jnp.where(state.seen > 0, jnp.maximum(mean, floor), 1)


def capability_ratios(
    state: CapabilityState, *, low: float = 0.1, high: float = 10.0, floor: float = 1e-8, warmup: int = 0
) -> Array:
    """HACPO's ω[k, j] = P̂_k/P̂_j, how capable agent k is beside agent j.

    For the learner k and rows that agent `agent[i]` wrote:

      sample_weight = ratios[k, agent]     of `hacpo`: others' rewards at the learner's level
      ratios[agent, k]                     the cross loss's factor: 1 for own rows, more for better agents'

    Example:
      >>> state = capability_update(capability_init(agents=2), jnp.array([0.75, 0.25]))
      >>> [[round(w, 3) for w in row] for row in capability_ratios(state).tolist()]
      [[1.0, 3.0], [0.333, 1.0]]

    Args:
      state: after this batch's `capability_update`, as in the authors' code.
      low, high: bounds of the ratios.
      floor: least capability.
      warmup: batches during which all ratios are 1, beside the time before the first.

    Returns:
      f32[agents, agents], constants; exactly 1 between equal agents.

    Raises:
      ValueError: bounds that do not enclose 1.

    References:
      2603.02604 eq. 6 to 8; bounds, floor and warm-up from the authors' code.
    """
    if not 0 < low <= 1 <= high:
        raise ValueError(
            f"low={low} and high={high} must enclose 1, the ratio of equal agents, and be above 0"
        )
    p = jax.lax.stop_gradient(capability(state, floor=floor))
    is_known = state.seen > warmup
    ratios = jnp.clip(p[:, None] / p, low, high)
    is_one = (p[:, None] == p) | ~(is_known[:, None] & is_known)  # compiled, x/x is 1 but for rounding
    return jnp.where(is_one, 1, ratios)
