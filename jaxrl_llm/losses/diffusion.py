"""Masked diffusion: random masks, the cross-entropy they train with, and bounds on ln p(response).

A masked-diffusion LM says ln p(x_j | the tokens that are not masked). The sum over the masked tokens, divided
by their share and averaged over random masks in which every share is equally likely, is at most ln p(x), and
equal to it where the model's conditionals belong to one joint distribution (2502.09992).

The model is a function `logp(noisy i32[N, T], tokens i32[N, T]) -> f[N, T]` (nats), of which only positions
where `noisy` has a mask are read.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import (
    Array,
    Metrics,
    WeightedSum,
    check_same_shape,
    float_of,
    masked,
    masked_sum,
)

LogProbs: TypeAlias = Callable[[Array, Array], Array]
"""(noisy, tokens), i32[N, T] each -> f[N, T] ln p(tokens | noisy), read only where `noisy` has a mask."""


class Noisy(NamedTuple):
    """Rows to learn from, from `add_noise`.

    Attributes:
      tokens: i32[N, T] with masks.
      masked: bool[N, T] where they are.
      rate: f32[N, T] the probability with which the token was to be masked; 1 where it never is.
    """

    tokens: Array
    masked: Array
    rate: Array


def stratified(key: Array, count: Array | int, index: Array) -> Array:
    """(u + index / count) mod 1 with one uniform u.

    Each number is uniform in [0, 1), and those of the indices 0..count−1 are `1 / count` apart: together they
    cover the interval evenly, which takes most of the variance out of a mean over them.
    """
    return jnp.mod(jax.random.uniform(key) + index / jnp.maximum(count, 1), 1)


def segment_numbers(segment_ids: Array) -> tuple[Array, Array]:
    """Numbers the examples of packed rows from 0, row after row.

    Args:
      segment_ids: i32[N, T], 0 = padding; the tokens of an example stand side by side.

    Returns:
      i32[N, T] number of the example, not less than −1 (padding has any), and their count, i32 scalar.
    """
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    first = ((segment_ids != before) & (segment_ids > 0)).ravel()
    return (jnp.cumsum(first) - 1).reshape(segment_ids.shape), jnp.sum(first)


def add_noise(
    key: Array,
    tokens: Array,
    mask: Array,
    *,
    mask_id: int,
    segment_ids: Array | None = None,
    least: float = 1e-3,
) -> Noisy:
    """Masks each token of an example with one probability, which is spread evenly over the batch's examples.

    t ~ U(0, 1) stratified over the examples,  p = (1 − least)·t + least,  every token of `mask` with p

    Example:
      >>> tokens, mask = jnp.arange(12).reshape(2, 6), jnp.arange(6) >= jnp.array([[2], [3]])
      >>> noisy = add_noise(jax.random.key(0), tokens, mask, mask_id=99)
      >>> bool(jnp.all((noisy.tokens == 99) == noisy.masked)), bool(jnp.any(noisy.masked & ~mask))
      (True, False)
      >>> p = noisy.rate[:, 5]  # half of the interval apart
      >>> round(float(jnp.abs(p[0] - p[1])), 4)
      0.4995

    Args:
      key: of the whole batch: strata are shared by all of its examples, so mask before cutting it.
      tokens: i32[N, T].
      mask: bool[N, T] tokens that may be masked. Never the prompt of an example to fine-tune on.
      mask_id: the mask token.
      segment_ids: i32[N, T] examples of packed rows (0 = padding); None = each row is one.
      least: the smallest p, which bounds the weight 1/p.

    Returns:
      `Noisy`.

    Raises:
      ValueError: shapes that differ, or `least` outside (0, 1].

    References:
      2502.09992 (LLaDA); the strata: 2107.00630.
    """
    check_same_shape(tokens=tokens, mask=mask)
    if not 0 < least <= 1:
        raise ValueError(f"least={least} must lie in (0, 1]: it is the smallest masking probability")
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens) * (jnp.arange(len(tokens))[:, None] + 1)
    number, count = segment_numbers(segment_ids)
    of_time, of_tokens = jax.random.split(key)
    p = (1 - least) * stratified(of_time, count, number) + least
    is_masked = mask & (jax.random.uniform(of_tokens, tokens.shape) < p)
    return Noisy(jnp.where(is_masked, mask_id, tokens), is_masked, jnp.where(mask, p, 1))


def masked_cross_entropy(logp: Array, is_masked: Array, rate: Array, mask: Array) -> tuple[Array, Metrics]:
    """Cross-entropy of masked tokens, weighted so that its expectation bounds −ln p(x).

    ℓ = −log π(x_j | noisy) / p  where masked, else 0

    Pre-training takes its mean over all tokens that could be masked (`aggregate`'s token_mean), fine-tuning
    the mean over examples of each one's mean (seq_mean_token_mean, or `example_mean` of packed rows).

    Example:
      >>> logp, is_masked = jnp.array([[-1.0, -3.0]]), jnp.array([[True, False]])
      >>> loss, _ = masked_cross_entropy(logp, is_masked, jnp.full((1, 2), 0.5), jnp.ones((1, 2), bool))
      >>> loss.tolist()  # 1 / 0.5, and nothing of the token that was seen
      [[2.0, 0.0]]

    Args:
      logp: f[N, T] ln p (nats) of the clean tokens; read where masked.
      is_masked, rate: of `Noisy`; rate is f[N, T] in (0, 1].
      mask: bool[N, T] tokens that could be masked.

    Returns:
      f[N, T] token loss (nats), float32 or wider; metrics `nll`, the loss's mean over tokens, an upper bound
      of the negative log-likelihood per token, and `masked_ratio`, the share of tokens that are masked.

    Raises:
      ValueError: shapes that differ.
    """
    check_same_shape(logp=logp, is_masked=is_masked, rate=rate, mask=mask)
    is_masked = is_masked & mask
    weight = 1 / jnp.where(is_masked, jax.lax.stop_gradient(float_of(rate)), 1)
    loss = jnp.where(is_masked, -masked(logp, is_masked) * weight, 0)
    return loss, {"nll": masked_sum(loss, mask), "masked_ratio": masked_sum(is_masked, mask)}


def example_mean(per_token: Array, mask: Array, segment_ids: Array) -> WeightedSum:
    """Mean over the examples of packed rows of each one's mean: aggregate's seq_mean_token_mean, packed.

    Example:
      >>> loss, mask = jnp.array([[1.0, 3.0, 5.0, 9.0]]), jnp.array([[True, True, True, False]])
      >>> total = example_mean(loss, mask, jnp.array([[1, 1, 2, 2]]))  # (1 + 3) / 2 + 5 over 2 examples
      >>> float(total.sum), float(total.weight)
      (7.0, 2.0)

    Args:
      per_token: f[N, T] loss.
      mask: bool[N, T] tokens that count.
      segment_ids: i32[N, T] as for `add_noise`.

    Returns:
      The sum, and the number of examples with a token that counts.

    Raises:
      ValueError: shapes that differ.
    """
    check_same_shape(per_token=per_token, mask=mask, segment_ids=segment_ids)
    mask = mask & (segment_ids > 0)
    loss = masked(per_token, mask)
    number = jnp.maximum(segment_numbers(segment_ids)[0], 0).ravel()
    tokens = jax.ops.segment_sum(mask.ravel().astype(loss.dtype), number, num_segments=number.size)
    share = loss.ravel() / jnp.maximum(tokens[number], 1)
    return WeightedSum(jnp.sum(share), jnp.sum(tokens > 0, dtype=loss.dtype))


class Draws(NamedTuple):
    """K ways to mask the responses of N rows.

    Attributes:
      hidden: bool[K, N, T] tokens that the model sees as masks.
      scored: bool[K, N, T] those of them whose log-probs count.
      weight: f32[K, N] such that the mean over K of weight·Σ_scored is an estimate of a sum over all tokens.
    """

    hidden: Array
    scored: Array
    weight: Array


def draw_masks(keys: Array, mask: Array, count: int, *, block_size: int | None = None) -> Draws:
    """Draws masks in which every number of masked tokens is equally likely.

    A draw hides k of the n tokens of a block, k uniform in 1..n, the tokens a random subset of that size. A
    token's weight is n/k, and 1 on average. In several blocks, which are filled one after the other, one
    block is drawn: those before it are clean, those after it wholly hidden and not scored, and the weight is
    multiplied by the number of blocks. Blocks and k are stratified over the draws of a row.

    Args:
      keys: key[N], one for each row, so that its masks do not depend on its neighbours.
      mask: bool[N, T] tokens of the responses.
      count: K.
      block_size: tokens of a block, of which the last may have fewer; None = the response is one block.

    Returns:
      `Draws`.

    Raises:
      ValueError: fewer than one draw or token to a block.

    References:
      k of n: 2502.09992; blocks: 2510.09541. That only the block drawn is scored, which is what makes the sum
      a bound of decoding in blocks, is our reading.
    """
    size = mask.shape[1] if block_size is None else block_size
    if count < 1 or size < 1:
        raise ValueError(f"count={count} draws in blocks of {size} must be at least 1 each")

    def of_row(key: Array, mask: Array) -> Draws:
        of_block, of_size, of_order, of_tokens = jax.random.split(key, 4)
        index = jnp.arange(count)
        total = jnp.sum(mask)
        block = jnp.where(mask, (jnp.cumsum(mask) - 1) // size, -1)
        blocks = jnp.maximum(-(-total // size), 1)
        chosen = _floor(stratified(of_block, count, index), blocks)
        n = jnp.minimum(size, total - chosen * size)
        # in an order of its own, else a draw's block would say how much of it is masked
        share = stratified(of_size, count, jax.random.permutation(of_order, index))
        k = jnp.minimum(1 + _floor(share, n), n)
        inside = block == chosen[:, None]
        u = jnp.where(inside, jax.random.uniform(of_tokens, (count, mask.size)), 2)
        rank = jnp.argsort(jnp.argsort(u, axis=1), axis=1)
        scored = inside & (rank < k[:, None])
        return Draws(scored | (block > chosen[:, None]), scored, blocks * n / jnp.maximum(k, 1))

    return jax.vmap(of_row, out_axes=1)(keys, mask)


def _floor(share: Array, count: Array) -> Array:
    """i32 in 0..count−1 of a share in [0, 1), whichever way the product is rounded."""
    return jnp.clip((share * count).astype(jnp.int32), 0, jnp.maximum(count - 1, 0))


def logp_of_draws(logp: LogProbs, tokens: Array, hidden: Array, mask_id: int) -> Array:
    """f[K, N, T] log-probs of `tokens` i32[N, T] with those in `hidden` bool[K, N, T] masked, one by one."""
    return jax.lax.map(lambda hide: logp(jnp.where(hide, mask_id, tokens), tokens), hidden)


def lower_bound(logp: Array, draws: Draws) -> Array:
    """ELBO: an estimate per token whose sum over a response is, on average, at most ln p(response).

    e_j = mean over draws of weight·ln p(x_j | draw) where scored

    Args:
      logp: f[K, N, T] (nats), as `logp_of_draws`.
      draws: K ways to mask.

    Returns:
      f[N, T], 0 for tokens that no draw scored.
    """
    return jnp.mean(draws.weight[..., None] * masked(logp, draws.scored), axis=0)


def upper_bound(logp: Array, draws: Draws, *, beta: float = 1.5) -> Array:
    """EUBO: SPG's upper bound, per token.

    e_j = (1/β)·ln of the mean over draws of weight·p(x_j | draw)^β where scored

    With all masks enumerated the sum over a response is at least the ELBO, by Jensen's inequality. It is at
    least ln p(response) for β ≥ the number of tokens (Hölder's inequality), and for every β where the ELBO is
    exact. A mean over few draws is lower on average than over many.

    Args:
      logp, draws: as for `lower_bound`.
      beta: at least 1; larger is looser.

    Returns:
      f[N, T], 0 for tokens that no draw scored.

    Raises:
      ValueError: beta below 1.

    References:
      2510.09541 (SPG).
    """
    if beta < 1:
        raise ValueError(f"beta={beta} must be at least 1, else this is no upper bound")
    seen = jnp.any(draws.scored, axis=0)
    # a token that no draw scored keeps one dummy term: log 0 has no gradient
    kept = draws.scored | ~seen
    log_weight = jnp.log(jnp.maximum(draws.weight, 1e-30))[..., None]
    terms = beta * masked(logp, draws.scored) + log_weight
    total = jax.nn.logsumexp(terms, axis=0, where=kept) - jnp.log(len(draws.weight))
    return jnp.where(seen, total, 0) / beta


def likelihood_bound(
    logp: LogProbs, tokens: Array, mask: Array, keys: Array, *, mask_id: int, num_draws: int = 128
) -> Array:
    """Estimate of a bound from below on ln p(response | prompt), to compare answers by.

    Exactly k of n tokens are masked, k stratified over the draws, and their log-probs weighted by n/k. A
    response of one token has its exact ln p, with one draw.

    Args:
      logp: of the model.
      tokens: i32[N, T].
      mask: bool[N, T] tokens of the response.
      keys: key[N].
      mask_id: the mask token.
      num_draws: forward passes.

    Returns:
      f[N] (nats).

    References:
      2502.09992.
    """
    check_same_shape(tokens=tokens, mask=mask)
    draws = draw_masks(keys, mask, num_draws)
    return jnp.sum(lower_bound(logp_of_draws(logp, tokens, draws.hidden, mask_id), draws), axis=1)
