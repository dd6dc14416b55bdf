"""From logits to a token: temperature, truncation by threshold search, and the log-probs of what was drawn.

Nothing here sorts. A truncation rule is a threshold on the tempered logits; the mass above it is one
vectorised reduction, so a bisection finds the threshold.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

NEGATIVE = -1e30
SEARCH_STEPS = 24
SEARCH_RANGE = 40.0
"""Tokens more than this many nats below the most likely one are cut by any truncation: e^-40 of mass."""


class Sampling(NamedTuple):
    """Per-row sampling parameters, all traced: a new value never recompiles.

    Attributes:
      temperature: f32[B] divides the logits; 0 = greedy.
      top_p: f32[B] keeps the most likely tokens up to this mass; 1 = off.
      top_k: i32[B] keeps the k most likely tokens (ties kept); 0 = off.
      min_p: f32[B] keeps tokens at least this fraction of the most likely one's probability; 0 = off.
    """

    temperature: Array
    top_p: Array
    top_k: Array
    min_p: Array


class Sampled(NamedTuple):
    """A token per row and its log-probs (nats).

    Attributes:
      token: i32[B].
      behaviour_logp: f32[B] under the exact distribution drawn from (tempered and truncated).
      raw_logp: f32[B] under the untempered, untruncated model.
      log_kept: f32[B] log of the tempered mass that truncation kept.
    """

    token: Array
    behaviour_logp: Array
    raw_logp: Array
    log_kept: Array


def sampling_params(
    batch: int, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> Sampling:
    """The same parameters for `batch` rows.

    Raises:
      ValueError: a parameter outside its range, named.
    """
    for name, value, low, high in (
        ("temperature", temperature, 0.0, math.inf),
        ("top_p", top_p, 0.0, 1.0),
        ("top_k", top_k, 0, math.inf),
        ("min_p", min_p, 0.0, 1.0),
    ):
        if not low <= value <= high or (name == "top_p" and value == 0):
            raise ValueError(f"{name}={value} is outside its range [{low}, {high}] (top_p above 0)")
    return Sampling(
        jnp.full(batch, temperature, jnp.float32),
        jnp.full(batch, top_p, jnp.float32),
        jnp.full(batch, top_k, jnp.int32),
        jnp.full(batch, min_p, jnp.float32),
    )


def _columns(size: int) -> int:
    """How many columns to fold V into: about its square root, a multiple of the vector width."""
    return max(128, 1 << round(math.log2(size) / 2))


def _fold(x: Array, fill: float) -> Array:
    """[B, V] -> [B, R, C], padded. Sums over R run along contiguous lanes, where sums over V would not."""
    columns = _columns(x.shape[1])
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % columns)), constant_values=fill)
    return x.reshape(x.shape[0], -1, columns)


def _total(x: Array) -> Array:
    """[B, R, C] -> [B]."""
    return jnp.sum(jnp.sum(x, axis=1), axis=1)


def threshold(z: Array, sampling: Sampling) -> Array:
    """The least tempered logit that truncation keeps.

    Top-k first, then top-p within what it kept, then min-p: the order of transformers and vLLM.

    Args:
      z: f32[B, R, C] tempered logits less their maximum (so at most 0), `NEGATIVE` where padded.

    Returns:
      f32[B].
    """
    batch = z.shape[0]
    off = jnp.full(batch, 2 * NEGATIVE, jnp.float32)

    def search(count: Array, weigh: bool, floor: Array) -> Array:
        """The largest t with the weight of {z ≥ t and z ≥ floor} at least `count`."""
        weights = jnp.where(z >= floor[:, None, None], jnp.exp(z) if weigh else 1.0, 0.0)

        def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = 0.5 * (low + high)
            enough = _total(jnp.where(z >= middle[:, None, None], weights, 0.0)) >= count
            return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

        low = jnp.full(batch, -SEARCH_RANGE, jnp.float32)
        return jax.lax.fori_loop(0, SEARCH_STEPS, halve, (low, jnp.full(batch, 1e-6, jnp.float32)))[0]

    def by_top_k(_: None) -> Array:
        found = search(sampling.top_k.astype(jnp.float32), False, off)
        return jnp.where(sampling.top_k > 0, found, off)

    k_floor = jax.lax.cond(jnp.any(sampling.top_k > 0), by_top_k, lambda _: off, None)

    def by_top_p(_: None) -> Array:
        kept = _total(jnp.where(z >= k_floor[:, None, None], jnp.exp(z), 0.0))
        found = search(sampling.top_p * kept, True, k_floor)
        return jnp.where(sampling.top_p < 1, jnp.maximum(found, k_floor), k_floor)

    floor = jax.lax.cond(jnp.any(sampling.top_p < 1), by_top_p, lambda _: k_floor, None)
    return jnp.maximum(floor, jnp.where(sampling.min_p > 0, jnp.log(sampling.min_p), 2 * NEGATIVE))


def invert(weights: Array, uniform: Array) -> Array:
    """Draws by a two-level inverse CDF: a column by its mass, then a row within it.

    Args:
      weights: f32[B, R, C] unnormalised probabilities.  uniform: f32[B] in [0, 1).

    Returns:
      i32[B] index r·C + c; its weight is above 0.
    """

    def first_above(cumulative: Array, target: Array, mass: Array) -> Array:
        above = cumulative > target[:, None]
        # rounding may leave the target above the last sum: then the last index that has mass
        last = mass.shape[1] - 1 - jnp.argmax(mass[:, ::-1] > 0, axis=1)
        return jnp.where(above.any(axis=1), jnp.argmax(above, axis=1), last)

    columns = jnp.sum(weights, axis=1)
    cumulative = jnp.cumsum(columns, axis=1)
    target = uniform * cumulative[:, -1]
    column = first_above(cumulative, target, columns)
    before = jnp.take_along_axis(cumulative - columns, column[:, None], axis=1)[:, 0]
    inside = jnp.take_along_axis(weights, column[:, None, None], axis=2)[:, :, 0]
    row = first_above(jnp.cumsum(inside, axis=1), jnp.maximum(target - before, 0), inside)
    return (row * weights.shape[2] + column).astype(jnp.int32)


def sample(logits: Array, sampling: Sampling, uniform: Array) -> Sampled:
    """One token per row.

    Args:
      logits: f32[B, V].  sampling: parameters per row.  uniform: f32[B] in [0, 1), a draw per row.

    Returns:
      `Sampled`; greedy rows (temperature 0) have behaviour_logp 0 and log_kept 0.
    """
    vocab = logits.shape[1]
    greedy = sampling.temperature == 0
    temperature = jnp.where(greedy, 1.0, sampling.temperature)
    peak = jnp.max(jnp.max(_fold(logits, NEGATIVE), axis=1), axis=1)
    z = _fold((logits - peak[:, None]) / temperature[:, None], NEGATIVE)
    weights = jnp.exp(z)
    total = _total(weights)
    truncated = jnp.any((sampling.top_p < 1) | (sampling.top_k > 0) | (sampling.min_p > 0))

    def cut(_: None) -> tuple[Array, Array]:
        kept = jnp.where(z >= threshold(z, sampling)[:, None, None], weights, 0.0)
        return kept, _total(kept)

    kept, kept_total = jax.lax.cond(truncated, cut, lambda _: (weights, total), None)
    token = jnp.minimum(invert(kept, uniform), vocab - 1)
    token = jnp.where(greedy, jnp.argmax(logits, axis=1).astype(jnp.int32), token)

    raw = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - peak
    raw_total = jax.lax.cond(
        jnp.all(temperature == 1),
        lambda _: total,
        lambda _: _total(jnp.exp(_fold(logits - peak[:, None], NEGATIVE))),
        None,
    )
    log_kept = jnp.where(greedy, 0.0, jnp.log(kept_total) - jnp.log(total))
    behaviour = jnp.where(greedy, 0.0, raw / temperature - jnp.log(total) - log_kept)
    return Sampled(token, behaviour, raw - jnp.log(raw_total), log_kept)


def row_uniform(key: Array, uids: Array, positions: Array) -> Array:
    """f32[B] in [0, 1): a draw that depends on (key, sequence uid, position) and on nothing else."""

    def one(uid: Array, position: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, uid), position))

    return jax.vmap(one)(uids, positions)
