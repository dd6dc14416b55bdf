"""From logits to a token: temperature, truncation by threshold search, and the log-probs of what was drawn.

Nothing here sorts. A token's weight is its tempered probability over that of the most likely token. A
truncation rule is a threshold on weights; the mass above one is a vectorised reduction, so a bisection finds
the threshold.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

NEGATIVE = -1e30
SEARCH_STEPS = 24
SEARCH_RANGE = 40.0
"""Tokens more than this many nats below the most likely one are cut by any truncation: e^-40 of mass."""

Bracket = tuple[Array, Array, Array, Array, Array]
"""Steps taken, the two ends, and the sums at them."""


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
      raw_logp: f32[B] under the untempered, untruncated model, without rules of decoding.
      log_kept: f32[B] log of the tempered mass that truncation kept; under rules of decoding as
        `sampling.rules` says.
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
      ValueError: as `check_sampling`.
    """
    check_sampling(temperature, top_p, top_k, min_p)
    return Sampling(
        jnp.full(batch, temperature, jnp.float32),
        jnp.full(batch, top_p, jnp.float32),
        jnp.full(batch, top_k, jnp.int32),
        jnp.full(batch, min_p, jnp.float32),
    )


def check_sampling(temperature: float, top_p: float, top_k: int, min_p: float) -> None:
    """Raises a ValueError that names a parameter outside its range."""
    for name, value, low, high in (
        ("temperature", temperature, 0.0, math.inf),
        ("top_p", top_p, 0.0, 1.0),
        ("top_k", top_k, 0, math.inf),
        ("min_p", min_p, 0.0, 1.0),
    ):
        if not low <= value <= high or (name == "top_p" and value == 0):
            raise ValueError(f"{name}={value} is outside its range [{low}, {high}] (top_p above 0)")


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


def _bisect(values: Array, weights: Array, least: Array, low: Array, one: Callable[[Array], Array]) -> Array:
    """The largest threshold, f32[B], at which the `values` kept sum to `least`.

    Args:
      values: f32[B, R, C] what is summed.  weights: f32[B, R, C].
      least: f32[B], above 0.  low: f32[B] log of a threshold that is low enough.
      one: log of a threshold f32[B] -> the least that one more token adds to the sum.
    """

    def total(log_threshold: Array) -> Array:
        return _total(jnp.where(weights >= jnp.exp(log_threshold)[:, None, None], values, 0.0))

    def several(carry: Bracket) -> Array:
        """Whether tokens are left between the ends, bool[B]."""
        _, low, _, at_low, at_high = carry
        return at_low - at_high >= 2 * one(low)

    def more(carry: Bracket) -> Array:
        return (carry[0] < SEARCH_STEPS) & jnp.any(several(carry))

    def halve(carry: Bracket) -> Bracket:
        step, low, high, at_low, at_high = carry
        middle = 0.5 * (low + high)
        at = total(middle)
        enough = at >= least
        goes_on = several(carry)  # else rounding would let it depend on how long others search
        up, down = goes_on & enough, goes_on & ~enough
        return (
            step + 1,
            jnp.where(up, middle, low),
            jnp.where(down, middle, high),
            jnp.where(up, at, at_low),
            jnp.where(down, at, at_high),
        )

    high = jnp.full_like(low, 1e-6)
    start = (jnp.zeros((), jnp.int32), low, high, total(low), jnp.zeros_like(least))
    return jnp.exp(jax.lax.while_loop(more, halve, start)[1])


def threshold(weights: Array, total: Array, sampling: Sampling) -> Array:
    """The least weight that truncation keeps.

    Top-k first, then top-p within what it kept, then min-p: the order of transformers and vLLM.

    Args:
      weights: f32[B, R, C], 1 for the most likely token, 0 where padded.  total: f32[B] their sum.

    Returns:
      f32[B].
    """
    size = weights.shape[1] * weights.shape[2]
    off = jnp.zeros_like(total)
    floor = jnp.full_like(total, -SEARCH_RANGE)

    def by_top_k(_: None) -> tuple[Array, Array]:
        least = sampling.top_k.astype(jnp.float32)
        found = _bisect(jnp.ones_like(weights), weights, least, floor, jnp.ones_like)
        found = jnp.where(sampling.top_k > 0, found, off)
        return found, _total(jnp.where(weights >= found[:, None, None], weights, 0.0))

    by_k, total = jax.lax.cond(jnp.any(sampling.top_k > 0), by_top_k, lambda _: (off, total), None)

    def by_top_p(_: None) -> Array:
        # tokens lighter than this hold less than 1 - top_p even if they are all there are
        low = jnp.log((1 - sampling.top_p) * total / size + math.exp(-SEARCH_RANGE))
        found = _bisect(weights, weights, sampling.top_p * total, low, jnp.exp)
        return jnp.where(sampling.top_p < 1, jnp.maximum(found, by_k), by_k)

    found = jax.lax.cond(jnp.any(sampling.top_p < 1), by_top_p, lambda _: by_k, None)
    return jnp.maximum(found, sampling.min_p)


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


def draw(weights: Array, uniform: Array) -> Array:
    """`invert` for weights f32[B, V]: i32[B] tokens of weight above 0."""
    return jnp.minimum(invert(_fold(weights, 0.0), uniform), weights.shape[1] - 1)


def sample(logits: Array, sampling: Sampling, uniform: Array, model_logits: Array | None = None) -> Sampled:
    """One token per row.

    Args:
      logits: f32[B, V]; -inf for what must not be drawn.
      sampling: parameters per row.  uniform: f32[B] in [0, 1), a draw per row.
      model_logits: f32[B, V] as the model gave them, where rules of decoding have changed `logits`.

    Returns:
      `Sampled`; greedy rows (temperature 0) have behaviour_logp 0 and log_kept 0. Where there was nothing
      to draw from, behaviour_logp is NaN.
    """
    vocab = logits.shape[1]
    greedy = sampling.temperature == 0
    temperature = jnp.where(greedy, 1.0, sampling.temperature)

    def tempered_logits(logits: Array) -> tuple[Array, Array]:
        """The largest, f32[B], and how far all are from it in units of the temperature, folded."""
        peak = jnp.max(jnp.max(_fold(logits, NEGATIVE), axis=1), axis=1)
        return peak, _fold((logits - peak[:, None]) / temperature[:, None], NEGATIVE)

    peak, z = tempered_logits(logits)
    weights = jnp.exp(z)
    total = _total(weights)
    truncated = jnp.any((sampling.top_p < 1) | (sampling.top_k > 0) | (sampling.min_p > 0))

    def cut(_: None) -> tuple[Array, Array]:
        least = threshold(weights, total, sampling)
        kept = jnp.where(weights >= least[:, None, None], weights, 0.0)
        return kept, _total(kept)

    kept, kept_total = jax.lax.cond(truncated, cut, lambda _: (weights, total), None)
    token = jnp.minimum(invert(kept, uniform), vocab - 1)
    token = jax.lax.cond(  # an argmax over V costs more than a draw
        jnp.any(greedy),
        lambda token: jnp.where(greedy, jnp.argmax(logits, axis=1).astype(jnp.int32), token),
        lambda token: token,
        token,
    )

    def log_probs(logits: Array, peak: Array, total: Array) -> tuple[Array, Array]:
        """Of the token: tempered and untempered."""
        raw = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - peak
        raw_total = jax.lax.cond(
            jnp.all(temperature == 1),
            lambda _: total,
            lambda _: _total(jnp.exp(_fold(logits - peak[:, None], NEGATIVE))),
            None,
        )
        return raw / temperature - jnp.log(total), raw - jnp.log(raw_total)

    tempered, raw_logp = log_probs(logits, peak, total)
    log_kept = jnp.log(kept_total) - jnp.log(total)
    behaviour = jnp.where(greedy, jnp.where(total > 0, 0.0, jnp.nan), tempered - log_kept)
    if model_logits is not None:
        peak, z = tempered_logits(model_logits)
        by_model, raw_logp = log_probs(model_logits, peak, _total(jnp.exp(z)))
        log_kept += by_model - tempered
    return Sampled(token, behaviour, raw_logp, jnp.where(greedy, 0.0, log_kept))


@partial(jax.jit, static_argnames=("count",))
def row_uniforms(key: Array, uids: Array, first: Array, count: int) -> Array:
    """f32[B, count] in [0, 1): a row's draws for its positions from `first` i32[B] on.

    Each is fold_in(fold_in(key, uid), position): it depends on nothing else.
    """

    def one(uid: Array, position: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, uid), position))

    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(uids, first[:, None] + jnp.arange(count))
