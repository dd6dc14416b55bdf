"""Learning from answers that other policies wrote: two of the probes of Mutual RL (2605.07244).

| probe | what peers contribute                     | how                                               |
|-------|-------------------------------------------|---------------------------------------------------|
| PRP   | rows of the batch                         | `prp`, with advantages over own and peers' rows   |
| XGRPO | rewards in the baseline and the scale     | an advantage: no loss of its own                  |
| SGT   | one right answer where all own rows fail  | `sgt` added to the surrogate, `rescue_weights`    |

Peers' rows hold the learner's tokens of the peer's text. The paper's formulas could be had from a summary by
its authors only; what is not in there (PRP's denominator, SGT's scale against the surrogate) is a choice of
this library and said so.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import (
    Array,
    Metrics,
    check_same_shape,
    float_of,
    masked,
    masked_sum,
)
from jaxrl_llm.losses.ratios import ratio_statistics
from jaxrl_llm.losses.surrogates import ppo_clip


def prp(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    is_own: Array,
    peer_logp: Array | None,
    surrogate: Callable[..., tuple[Array, Metrics]] = ppo_clip,
) -> tuple[Array, Metrics]:
    """Peer rollout pooling: peers' rows enter the surrogate with the ratio to the peer who wrote them.

    ℓ = surrogate(r), r = π/π_old at own rows and π/π_peer at peers' rows

    Without a clip the gradient is unbiased where π_peer is exact and covers what π writes; an error δ of the
    aligned log-probs multiplies a token's gradient by e^−δ. Its second moment grows with 1 + χ²(π‖π_peer).

    Example:
      >>> logp, peer_logp = jnp.log(jnp.array([[0.5], [0.5]])), jnp.log(jnp.array([[0.1], [0.4]]))
      >>> ones, is_own = jnp.ones((2, 1)), jnp.array([True, False])
      >>> loss, _ = prp(logp, logp, ones, ones > 0, is_own=is_own, peer_logp=peer_logp)
      >>> [round(x, 4) for x in loss[:, 0].tolist()]  # ratios 1, and 0.5 / 0.4 clipped at 1.2
      [-1.0, -1.2]

    Args:
      logp: f[N, T] log-probs (nats) under the learner in training.
      old_logp: f[N, T] log-probs (nats) under the learner before this batch's updates; constants, not read at
        peers' rows if `peer_logp` is given.
      advantages: f[N, T], or f[N, 1] for one per sequence, of statistics over own and peers' rows; constants.
      mask: bool[N, T] tokens that count.
      is_own: bool[N] rows that the learner wrote.
      peer_logp: f[N, T] log-probs (nats) of the peer who wrote the row, aligned with the learner's tokens;
        constants, not read at own rows. None for the learner's own `old_logp` at all rows: every ratio then
        starts at 1, and the gradient at the first update is that of the peers' distribution.
      surrogate: of `SURROGATES`, with its options bound.

    Returns:
      f[N, T] token loss, 0 where masked, float32 or wider. Metrics of the surrogate, and under `peer/` the
      `ratio_statistics` of the peers' tokens against whatever their ratios are taken to.

    Raises:
      ValueError: shapes that do not fit.

    References:
      2605.07244; which log-probs stand in the denominator could not be confirmed.
    """
    check_same_shape(is_own=is_own, rows=mask[:, 0])
    if peer_logp is not None:
        check_same_shape(old_logp=old_logp, peer_logp=peer_logp)
        old_logp = jnp.where(is_own[:, None], float_of(old_logp), float_of(peer_logp))
    loss, metrics = surrogate(logp, old_logp, advantages, mask)
    statistics = ratio_statistics(logp, old_logp, mask & ~is_own[:, None])
    return loss, metrics | {f"peer/{name}": value for name, value in statistics.items()}


def rescue_weights(
    rewards: Array,
    group: Array,
    is_own: Array,
    valid: Array | None = None,
    *,
    key: Array,
    success: float = 1.0,
) -> tuple[Array, Metrics]:
    """The rows that success-gated transfer learns from: at most one per prompt, drawn among peers' successes.

    A prompt is rescued if it has own rows, all of them fail, and a peer's row succeeds. One of its successes,
    each as likely as the others, gets the number of the prompt's own rows as its weight, everything else 0:
    added to the losses of the n own rows of a prompt, the transfer counts as their mean does (see `sgt`).

    Example:
      >>> rewards, group = jnp.array([0.0, 0, 1, 0, 1, 1]), jnp.array([7, 7, 7, 8, 8, 8])
      >>> is_own = jnp.array([True, True, False, True, True, False])  # prompt 8 has an own success
      >>> rescue_weights(rewards, group, is_own, key=jax.random.key(0))[0].tolist()
      [0.0, 0.0, 2.0, 0.0, 0.0, 0.0]

    Args:
      rewards: f[N] verified reward of every row. Of the global batch: groups must not be cut.
      group: i[N] any integers; rows with the same one answer the same prompt.
      is_own: bool[N] rows that the learner wrote.
      valid: bool[N] rows that count; None for all. Rows with a NaN or infinite reward do not.
      key: a random key, which decides between several successes.
      success: the smallest reward that is a success.

    Returns:
      weights: f[N] without gradient, float32 or wider.
      metrics: `sgt/failed`, share of the prompts with own rows whose own rows all fail; `sgt/rescued`, share
        of those that a peer solves.

    Raises:
      ValueError: shapes that differ.
    """
    rewards = jax.lax.stop_gradient(float_of(rewards))
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid, bool)
    check_same_shape(rewards=rewards, group=group, is_own=is_own, valid=valid)
    counts = valid & jnp.isfinite(rewards)
    own, peer = counts & is_own, counts & ~is_own
    succeeds = rewards >= success

    rows = rewards.shape[0]
    ids = jnp.searchsorted(jnp.sort(group), group)  # 0..N−1, equal where the group is

    def number(where: Array) -> Array:
        """i32[N] rows of every id where `where`."""
        return jax.ops.segment_sum(where.astype(jnp.int32), ids, num_segments=rows)

    own_rows = number(own)
    is_failed = (own_rows > 0) & (number(own & succeeds) == 0)
    is_rescued = is_failed & (number(peer & succeeds) > 0)
    # The success that stands last in a random order of all rows, which has no ties.
    place = jnp.where(peer & succeeds, jax.random.permutation(key, rows), -1)
    last = jax.ops.segment_max(place, ids, num_segments=rows)
    is_chosen = is_rescued[ids] & (place >= 0) & (place == last[ids])
    return jnp.where(is_chosen, own_rows[ids], 0).astype(rewards.dtype), {
        "sgt/failed": masked_sum(is_failed, own_rows > 0),
        "sgt/rescued": masked_sum(is_rescued, is_failed),
    }


def sgt(logp: Array, mask: Array, *, rescue_weight: Array) -> tuple[Array, Metrics]:
    """Success-gated transfer: the likelihood of a peer's right answer where all own answers fail.

    ℓ = −weight·log π at the tokens of the chosen rows

    An auxiliary loss, with coefficient λ = 0.1 in the paper, for a surrogate whose advantages are 0 at peers'
    rows. Under seq_mean_token_mean, of which the sum is then

      Σ_prompts n·(mean over the n own rows of the surrogate + λ·NLL(chosen row)/length)

    so that dividing it by the number of own rows gives the mean over prompts. Even a policy that never
    succeeds gets a direction from it.

    Example:
      >>> logp, mask = jnp.array([[-1.0, -2.0], [-3.0, -1.0]]), jnp.ones((2, 2), bool)
      >>> loss, metrics = sgt(logp, mask, rescue_weight=jnp.array([0.0, 4.0]))
      >>> loss.tolist(), float(metrics["sgt/nll"].sum / metrics["sgt/nll"].weight)
      ([[0.0, 0.0], [12.0, 4.0]], 2.0)

    Args:
      logp: f[N, T] log-probs (nats) under the learner in training.
      mask: bool[N, T] tokens that count.
      rescue_weight: f[N] ≥ 0 of `rescue_weights`; constants. Rows with 0 are not read.

    Returns:
      f[N, T] token loss (nats), 0 where masked, float32 or wider; metric `sgt/nll`, the mean of −log π over
      the chosen rows' tokens.

    Raises:
      ValueError: shapes that do not fit.

    References:
      2605.07244; that the term is a mean over prompts beside the surrogate's could not be confirmed.
    """
    check_same_shape(logp=logp, mask=mask)
    check_same_shape(rescue_weight=rescue_weight, rows=mask[:, 0])
    weight = masked(jax.lax.stop_gradient(rescue_weight)[:, None], jnp.any(mask, axis=1, keepdims=True))
    chosen = mask & (weight > 0)
    nll = masked(-logp, chosen)
    return weight * nll, {"sgt/nll": masked_sum(nll, chosen)}
