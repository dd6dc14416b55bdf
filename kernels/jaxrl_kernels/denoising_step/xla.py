"""The formulas of a denoising step on whole logits f32[..., V]; XLA makes several passes over them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

TINY = 1e-10
"""Under the entropy's logarithm, as in Dream's code: a row's entropy is at most V·TINY nats too small."""


class Operands(NamedTuple):
    """What the bodies work on.

    Attributes:
      logits: f[N, V] l.
      negative: f[N, V] l⁻ of the negative input and weight: f32[N] w; or None and None.
      banned: i32[N, n] and distrusted: i32[N, m], -1 = none; or None.
      tracked: i32[N, K] ids of the last look, -1 = none; or None for no look.
    """

    logits: Array
    negative: Array | None
    weight: Array | None
    banned: Array | None
    distrusted: Array | None
    tracked: Array | None


class Statistics(NamedTuple):
    """[N] each, as in `api.DenoisingStep`; `now` f32[N, K] are the probabilities of `Operands.tracked`."""

    token: Array
    probability: Array
    margin: Array
    entropy: Array
    raw_logp: Array
    ids: Array | None
    probs: Array | None
    now: Array | None


class Sureness(NamedTuple):
    """How sure a distribution is of a token, f32[...] each.

    Attributes:
      probability: of the token.
      margin: p₁ - p₂ of the two most likely tokens.
      entropy: -Σ p ln p (nats).
    """

    probability: Array
    margin: Array
    entropy: Array


def contrast(logits: Array, negative: Array, weight: Array) -> Array:
    """l + w(l - l⁻), and l itself, bit for bit, where w is 0.

    Args:
      logits, negative: f[..., V].
      weight: f32, to be broadcast against them.
    """
    return jnp.where(weight != 0, logits + weight * (logits - negative), logits)


def without(logits: Array, ids: Array) -> Array:
    """f[..., V] with -inf at token ids i32[..., n]; -1 = none."""
    tokens = jnp.arange(logits.shape[-1])
    return jnp.where(jnp.any(ids[..., None] == tokens, axis=-2), -jnp.inf, logits)


def at(x: Array, token: Array) -> Array:
    """f[...]: x f[..., V] at tokens i32[...]."""
    return jnp.take_along_axis(x, token[..., None], axis=-1)[..., 0]


def log_prob(logits: Array, token: Array) -> Array:
    """f[...] nats, of tokens i32[...] under logits f[..., V]."""
    return at(logits, token) - jax.nn.logsumexp(logits, axis=-1)


def sureness(logits: Array, token: Array) -> Sureness:
    """Of tokens i32[...] under logits f32[..., V]."""
    probs = jax.nn.softmax(logits, axis=-1)
    first, second = jnp.moveaxis(jax.lax.top_k(probs, 2)[0], -1, 0)
    entropy = -jnp.sum(probs * jnp.log(probs + TINY), axis=-1)
    return Sureness(jnp.exp(log_prob(logits, token)), first - second, entropy)


def jensen_shannon(p: Array, q: Array) -> Array:
    """f32[...] JS divergence (nats) of f32[..., K] probabilities; the rest, 1 - sum, is one more bucket."""

    def closed(x: Array) -> Array:
        rest = jnp.maximum(1 - jnp.sum(x, axis=-1, keepdims=True), 0)
        return jnp.concatenate([x, rest], axis=-1)

    p, q = closed(p), closed(q)
    middle = 0.5 * (p + q)

    def to_middle(x: Array) -> Array:
        ratio = jnp.where(x > 0, x, 1) / jnp.where(x > 0, middle, 1)
        return jnp.sum(x * jnp.log(ratio), axis=-1)

    return jnp.clip(0.5 * (to_middle(p) + to_middle(q)), 0, math.log(2))


def statistics(judge: str, operands: Operands) -> Statistics:
    """All there is to know of each row."""
    logits, negative, weight, banned, distrusted, tracked = operands
    plain = logits.astype(jnp.float32)
    allowed = plain if banned is None else without(plain, banned)
    guided = allowed
    if negative is not None and weight is not None:
        guided = contrast(plain, negative.astype(jnp.float32), weight[:, None])
        guided = guided if banned is None else without(guided, banned)
    judged = guided if judge == "guided" else allowed
    judged = judged if distrusted is None else without(judged, distrusted)
    token = jnp.argmax(guided, axis=-1).astype(jnp.int32)
    ids = probs = now = None
    if tracked is not None:
        logp = jax.nn.log_softmax(allowed, axis=-1)
        top, ids = jax.lax.top_k(logp, tracked.shape[1])
        probs, ids = jnp.exp(top), jnp.where(top > -jnp.inf, ids, -1).astype(jnp.int32)
        now = jnp.exp(jnp.take_along_axis(logp, jnp.maximum(tracked, 0), axis=-1))
        now = jnp.where(tracked < 0, 0, now)
    return Statistics(token, *sureness(judged, token), log_prob(plain, token), ids, probs, now)
