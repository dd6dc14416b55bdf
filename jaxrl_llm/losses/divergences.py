"""Divergences between a student's and a teacher's next-token distributions, as token losses.

With q the teacher's and p the student's distribution at one position; the teacher is a constant:

| function          | loss                                            | of                            |
|-------------------|-------------------------------------------------|-------------------------------|
| forward_kl        | KL(q‖p)                                         | logits of both                |
| reverse_kl        | KL(p‖q)                                         | logits of both                |
| generalized_jsd   | β·KL(q‖m) + (1−β)·KL(p‖m), m = β·q + (1−β)·p    | logits of both                |
| top_k_kl          | KL of the teacher's top K and one event "other" | logits of both                |
| gathered_top_k_kl | the same                                        | log-probs at K listed tokens  |
| aopd_top_k_kl     | Σ_S q·(log q − log p) / K, of either sign       | log-probs at listed tokens S  |

A KL is computed as the sum over tokens of q·(log q − log p) + p − q, of which no term is negative: the parts
p − q add up to 0. Logits of [N, T, V] need much memory where V is large. `jaxrl_kernels.linear_distribution`
has the same divergences from hidden states (`linear_kl`, `linear_jsd`) and the log-probs for the last two
(`linear_top_k` of the teacher, `linear_gather` of the student).
"""

import math

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

DIRECTIONS = ("forward", "reverse")


def log_probs(logits: Array, mask: Array, *, temperature: Array | float = 1.0) -> Array:
    """log softmax(logits / temperature) f[N, T, V] under a mask bool[N, T], uniform where masked.

    Raises:
      ValueError: logits that are not [N, T, V], or a temperature that is neither a scalar nor f[N].
    """
    if jnp.ndim(logits) != 3 or jnp.shape(logits)[:2] != jnp.shape(mask):
        raise ValueError(f"logits {jnp.shape(logits)} must be [N, T, V] with [N, T] = {jnp.shape(mask)}")
    if jnp.shape(temperature) not in ((), mask.shape[:1]):
        raise ValueError(f"temperature {jnp.shape(temperature)} must be a scalar or [N] = {mask.shape[:1]}")
    z = masked(logits, mask[..., None])
    by_token = jnp.where(mask, jnp.reshape(jnp.asarray(temperature, z.dtype), (-1, 1)), 1)
    return jax.nn.log_softmax(z / jax.lax.stop_gradient(by_token)[..., None])


def forward_kl(
    logits: Array, teacher_logits: Array, mask: Array, *, temperature: Array | float = 1.0
) -> tuple[Array, Metrics]:
    """KL(teacher‖student) over the whole vocabulary: the student covers all that the teacher might write.

    ℓ = Σ_v q_v·(log q_v − log p_v)

    Its gradient by the student's logits is (p − q) / temperature, bounded whatever the distributions.

    Example:
      >>> logits, teacher_logits = jnp.zeros((1, 1, 2)), jnp.log(jnp.array([[[0.75, 0.25]]]))
      >>> loss, _ = forward_kl(logits, teacher_logits, jnp.ones((1, 1), bool))
      >>> round(float(loss[0, 0]), 4)  # 0.75·ln 1.5 + 0.25·ln 0.5
      0.1308

    Args:
      logits: f[N, T, V] of the student; the gradient flows here. −inf for tokens neither model may write.
      teacher_logits: f[N, T, V] of the teacher; constants.
      mask: bool[N, T] positions that count.
      temperature: divides the logits of both; a scalar or f[N] by rows; a constant.

    Returns:
      f[N, T] (nats, at least 0), 0 where masked, float32 or wider; metric `distillation/forward_kl`, its mean
      over positions.

    Raises:
      ValueError: shapes that do not fit.
    """
    log_p, log_q = _pair(logits, teacher_logits, mask, temperature)
    return _reported("forward_kl", _kl(log_q, log_p), mask)


def reverse_kl(
    logits: Array, teacher_logits: Array, mask: Array, *, temperature: Array | float = 1.0
) -> tuple[Array, Metrics]:
    """KL(student‖teacher) over the whole vocabulary: the student keeps to what the teacher would write.

    ℓ = Σ_v p_v·(log p_v − log q_v), the exact expectation that `opd` estimates from the sampled token

    Example:
      >>> logits, teacher_logits = jnp.zeros((1, 1, 2)), jnp.log(jnp.array([[[0.75, 0.25]]]))
      >>> loss, _ = reverse_kl(logits, teacher_logits, jnp.ones((1, 1), bool))
      >>> round(float(loss[0, 0]), 4)  # −(ln 1.5 + ln 0.5) / 2
      0.1438

    Args, Returns and Raises: as `forward_kl`; metric `distillation/reverse_kl`.
    """
    log_p, log_q = _pair(logits, teacher_logits, mask, temperature)
    return _reported("reverse_kl", _kl(log_p, log_q), mask)


def generalized_jsd(
    logits: Array,
    teacher_logits: Array,
    mask: Array,
    *,
    beta: float = 0.5,
    temperature: Array | float = 1.0,
) -> tuple[Array, Metrics]:
    """The generalised Jensen-Shannon divergence of GKD, between the two directions of the KL.

    ℓ = β·KL(q‖m) + (1−β)·KL(p‖m) with m = β·q + (1−β)·p

    At β = 0 and 1, where the formula is 0, it stands by convention for the forward and the reverse KL: those
    are the limits of ℓ / β as β → 0 and of ℓ / (1−β) as β → 1.

    Example:
      >>> logits, teacher_logits = jnp.log(jnp.array([[[0.5, 0.5]], [[1.0, 0.0]]]))[:, None]
      >>> loss, _ = generalized_jsd(logits, teacher_logits, jnp.ones((1, 1), bool))
      >>> round(float(loss[0, 0]), 4)  # m = (¾, ¼):  (−ln ¾ + (ln ⅔ + ln 2) / 2) / 2
      0.2158

    Args:
      logits, teacher_logits, mask, temperature: as `forward_kl`.
      beta: β in [0, 1].

    Returns:
      f[N, T] (nats, at least 0; for β inside (0, 1) at most −β·ln β − (1−β)·ln(1−β)), 0 where masked,
      float32 or wider; metric `distillation/jsd`, its mean over positions.

    Raises:
      ValueError: shapes that do not fit, or beta outside [0, 1].

    References:
      2306.13649 §2; the special cases as in TRL.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} must lie in [0, 1]: 0 is the forward KL, 1 the reverse KL")
    log_p, log_q = _pair(logits, teacher_logits, mask, temperature)
    if beta == 0:
        loss = _kl(log_q, log_p)
    elif beta == 1:
        loss = _kl(log_p, log_q)
    else:
        is_gone = jnp.isneginf(log_p) & jnp.isneginf(log_q)  # there logaddexp has a NaN for a gradient
        parts = (
            jnp.where(is_gone, 0, x) + math.log(share) for x, share in ((log_q, beta), (log_p, 1 - beta))
        )
        log_m = jnp.where(is_gone, -jnp.inf, jnp.logaddexp(*parts))
        loss = beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)
    return _reported("jsd", loss, mask)


def top_k_kl(
    logits: Array,
    teacher_logits: Array,
    mask: Array,
    *,
    k: int,
    direction: str = "forward",
    temperature: Array | float = 1.0,
) -> tuple[Array, Metrics]:
    """KL over the teacher's top k tokens S, all others counted as one event of mass q̄ and p̄.

    forward: ℓ = Σ_S q·(log q − log p) + q̄·(log q̄ − log p̄);  reverse: p and q exchanged

    Merging events loses information: 0 ≤ ℓ ≤ KL, it does not fall as k grows, and at k = V it is the KL. In
    the forward direction the gradient by the student's logits is p − q at the listed tokens and p·(1 − q̄/p̄)
    at the others, over the temperature.

    Example:
      >>> logits, teacher_logits = jnp.log(jnp.array([[[0.25, 0.25, 0.5]], [[0.5, 0.25, 0.25]]]))[:, None]
      >>> for k in (1, 2, 3):  # ½·ln 2 + ½·ln ⅔, then ½·ln 2 − ¼·ln 2 twice
      ...     loss, _ = top_k_kl(logits, teacher_logits, jnp.ones((1, 1), bool), k=k)
      ...     print(round(float(loss[0, 0]), 4))
      0.1438
      0.1733
      0.1733

    Args:
      logits, teacher_logits, mask, temperature: as `forward_kl`.
      k: from 1 to V. Among equals the lower token id comes first.
      direction: one of `DIRECTIONS`.

    Returns:
      f[N, T] (nats, at least 0), 0 where masked, float32 or wider. Metrics, means over positions:
      `distillation/top_k_kl`, and `distillation/top_k_mass`, the teacher's probability of its top k.

    Raises:
      ValueError: shapes that do not fit, k outside [1, V], or an unknown direction.
    """
    if not 1 <= k <= jnp.shape(logits)[-1]:
        raise ValueError(f"k={k} must be from 1 to V={jnp.shape(logits)[-1]}")
    log_p, log_q = _pair(logits, teacher_logits, mask, temperature)
    _, ids = jax.lax.top_k(log_q, k)
    is_listed = jnp.put_along_axis(jnp.zeros_like(log_q, bool), ids, True, axis=-1, inplace=False)
    events = []
    for x in (log_p, log_q):
        rest = _log_sum(x, ~is_listed)
        events.append(jnp.concatenate([jnp.take_along_axis(x, ids, axis=-1), rest[..., None]], axis=-1))
    return _events_kl(events[0], events[1], mask, direction)


def gathered_top_k_kl(
    top_logp: Array, teacher_top_logp: Array, mask: Array, *, direction: str = "forward"
) -> tuple[Array, Metrics]:
    """`top_k_kl` from the log-probs at the listed tokens alone, without logits.

    The other tokens' masses are q̄ = 1 − Σ_S q and p̄ = 1 − Σ_S p. Of log-probs a sum of probabilities is known
    to about 1e-6 in float32, so masses below 8 roundings of 1 count as that much, with no gradient.

    Example:
      >>> q, p = jnp.log(jnp.array([[[0.5, 0.25]]])), jnp.log(jnp.array([[[0.25, 0.25]]]))
      >>> round(float(gathered_top_k_kl(p, q, jnp.ones((1, 1), bool))[0][0, 0]), 4)  # ½·ln 2 + ¼·ln ½
      0.1733

    Args:
      top_logp: f[N, T, K] log-probs (nats) under the student of K different tokens at each position, as from
        `jaxrl_kernels.linear_distribution.linear_gather`; the gradient flows here.
      teacher_top_logp: f[N, T, K] those under the teacher, as from `linear_top_k`; constants.
      mask: bool[N, T] positions that count.
      direction: one of `DIRECTIONS`.

    Returns and Raises: as `top_k_kl`; a ValueError too for K = 0.
    """
    top_p, top_q = _listed(top_logp, teacher_top_logp, mask)
    events = [jnp.concatenate([x, _log_rest(x)[..., None]], axis=-1) for x in (top_p, top_q)]
    return _events_kl(events[0], events[1], mask, direction)


def aopd_top_k_kl(
    top_logp: Array, teacher_top_logp: Array, mask: Array, *, scale: float | None = None
) -> tuple[Array, Metrics]:
    """AOPD's forward KL over listed tokens S: no tail, not renormalised, and of either sign.

    ℓ = scale · Σ_S q·(log q − log p), scale = 1/K

    Of S being the teacher's top K, with m = Σ_S q, the gradient by the student's logits is
    scale·(m·p_u − q_u·1[u ∈ S]): it is 0 at p = q·1_S/m, where ℓ has its least value scale·m·ln m, and its
    absolute values add up to at most 2·m·scale. At K = V it is scale·KL(q‖p). (Renormalised, it would be 0 at
    K = 1 whatever the student.)

    Example:
      >>> q, p = jnp.log(jnp.array([[[0.5, 0.25]]])), jnp.log(jnp.array([[[0.25, 0.25]]]))
      >>> round(float(aopd_top_k_kl(p, q, jnp.ones((1, 1), bool))[0][0, 0]), 4)  # ½·ln 2 / 2
      0.1733

    Args:
      top_logp, teacher_top_logp, mask: as `gathered_top_k_kl`.
      scale: None for 1/K. Whether the paper makes up for that factor by a coefficient is not known; 1 is the
        other choice.

    Returns:
      f[N, T] (nats), 0 where masked, float32 or wider; metric `distillation/top_k_kl`, its mean over
      positions.

    Raises:
      ValueError: shapes that do not fit, or K = 0.

    References:
      2605.06387 eq. 7, as quoted by two independent implementations; the paper itself was not at hand.
    """
    top_p, top_q = _listed(top_logp, teacher_top_logp, mask)
    q = jnp.exp(top_q)
    surprise = jnp.where(q > 0, top_q - top_p, 0)
    scale = 1 / top_q.shape[-1] if scale is None else scale
    return _reported("top_k_kl", scale * jnp.sum(q * surprise, axis=-1), mask)


def _pair(
    logits: Array, teacher_logits: Array, mask: Array, temperature: Array | float
) -> tuple[Array, Array]:
    """The log-probs log p, log q f[N, T, V] of both."""
    check_same_shape(logits=logits, teacher_logits=teacher_logits)
    teacher_logits = jax.lax.stop_gradient(float_of(teacher_logits))
    return (
        log_probs(logits, mask, temperature=temperature),
        log_probs(teacher_logits, mask, temperature=temperature),
    )


def _listed(top_logp: Array, teacher_top_logp: Array, mask: Array) -> tuple[Array, Array]:
    """Log-probs f[N, T, K] of both, 0 where masked."""
    check_same_shape(top_logp=top_logp, teacher_top_logp=teacher_top_logp)
    shape = jnp.shape(top_logp)
    if len(shape) != 3 or shape[:2] != jnp.shape(mask) or shape[2] == 0:
        raise ValueError(f"top_logp {shape} must be [N, T, K] with [N, T] = {jnp.shape(mask)} and K > 0")
    counts = mask[..., None]
    return masked(top_logp, counts), masked(jax.lax.stop_gradient(teacher_top_logp), counts)


def _reported(name: str, loss: Array, mask: Array) -> tuple[Array, Metrics]:
    loss = masked(loss, mask)
    return loss, {f"distillation/{name}": masked_sum(loss, mask)}


def _events_kl(log_p: Array, log_q: Array, mask: Array, direction: str) -> tuple[Array, Metrics]:
    """KL in one direction, of K listed events and, last, all others."""
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction {direction!r}; one of {', '.join(DIRECTIONS)}")
    loss, metrics = _reported(
        "top_k_kl", _kl(log_q, log_p) if direction == "forward" else _kl(log_p, log_q), mask
    )
    mass = masked_sum(jnp.sum(jnp.exp(log_q[..., :-1]), axis=-1), mask)
    return loss, metrics | {"distillation/top_k_mass": mass}


def _kl(log_q: Array, log_p: Array) -> Array:
    """KL(q‖p) over the last axis: sum of q·(e^u − 1 − u) ≥ 0 with u = log p − log q, and p where q = 0."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    u = jnp.where(q > 0, log_p - log_q, 0)
    near = jnp.clip(u, -1, 1)
    # the first form does not cancel, the second does not overflow where q is small against p
    is_near = (jnp.abs(u) < 1) & (q > 0)
    return jnp.sum(jnp.where(is_near, q * (jnp.expm1(near) - near), p - q - q * u), axis=-1)


def _log_sum(logp: Array, where: Array) -> Array:
    """log Σ e^logp over the last axis where `where`; −inf, with no gradient, where nothing is left."""
    top = jax.lax.stop_gradient(jnp.max(logp, axis=-1, initial=-jnp.inf, where=where, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0, top)
    total = jnp.sum(jnp.where(where, jnp.exp(jnp.where(where, logp - top, 0)), 0), axis=-1)
    return jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1)) + top[..., 0], -jnp.inf)


def _log_rest(logp: Array) -> Array:
    """log(1 − Σ e^logp) over the last axis, without cancellation where one token has nearly all the mass."""
    is_top = jnp.arange(logp.shape[-1]) == jnp.argmax(logp, axis=-1, keepdims=True)
    rest = -jnp.sum(jnp.where(is_top, jnp.expm1(logp), jnp.exp(logp)), axis=-1)
    least = 8 * jnp.finfo(logp.dtype).eps
    return jnp.log(jnp.where(rest > least, rest, least))
