"""Policy gradients for masked-diffusion LMs: what stands for the log-prob of each token of a response.

Such a model has no ln π(response) in closed form. Each function here makes f[N, T] of a model and a key per
row; the same keys give the same masks, so that the policy, the one before the update and the reference are
compared on equal terms, as one objective (`policy_objective`) of any surrogate:

| estimate         | passes    | the sum over a response                                                |
|------------------|-----------|------------------------------------------------------------------------|
| full_mask_logp   | 1         | tokens as if independent of each other (diffu-GRPO, 2504.12216)        |
| partial_logp     | 1         | one draw of the ELBO, in equal parts (UniGRPO, 2505.15809)             |
| coupled_logp     | 3         | half of the first, plus ln p of each token in a random context: 1.5    |
|                  |           | times a log-prob (coupled-GRPO, 2506.20639)                            |
| spg_bounds → spg | num_draws | ELBO from below, EUBO from above (SPG, 2510.09541)                     |
| trace_logp       | num_steps | the token choices in the recorded order, exactly                       |

Arguments that all share: `logp`, the model (see `diffusion`); `tokens` i32[N, T]; `mask` bool[N, T], the
tokens that the policy wrote; `prompt` bool[N, T], the tokens before them; `keys` key[N]; `mask_id`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, masked, masked_sum
from jaxrl_llm.losses.diffusion import (
    LogProbs,
    draw_masks,
    logp_of_draws,
    lower_bound,
    stratified,
    upper_bound,
)
from jaxrl_llm.losses.surrogates import token_advantages


def _uniform(keys: Array, size: int | tuple[int, ...] = ()) -> Array:
    """f32[N, ...] of each row's own key."""
    return jax.vmap(lambda key: jax.random.uniform(key, size if isinstance(size, tuple) else (size,)))(keys)


def _check_rate(name: str, rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"{name}={rate} is a probability: give a number from 0 to 1")


def _noisy_prompt(keys: Array, prompt: Array, rate: float) -> Array:
    """bool[N, T] prompt tokens to hide, each with probability `rate`."""
    _check_rate("prompt_rate", rate)
    return prompt & (_uniform(keys, prompt.shape[1]) < rate)


def full_mask_logp(
    logp: LogProbs,
    tokens: Array,
    mask: Array,
    prompt: Array,
    keys: Array,
    *,
    mask_id: int,
    prompt_rate: float = 0.15,
) -> Array:
    """diffu-GRPO's one-step estimate: every token given a part of the prompt and nothing of the response.

    e_j = ln p(x_j | prompt with each token masked with probability `prompt_rate`)

    The noise in the prompt makes the updates of one batch differ: one key for each pass over it.

    Args:
      prompt_rate: 0.15 in the paper's recipe; 0 leaves the prompt whole.

    Returns:
      f[N, T] (nats), 0 outside of `mask`; biased unless the tokens are independent given the prompt.

    Raises:
      ValueError: shapes that differ, or no probability.

    References:
      2504.12216 (d1): with `ppo_clip`, k3 KL and the group's mean as baseline.
    """
    check_same_shape(tokens=tokens, mask=mask, prompt=prompt)
    hidden = mask | _noisy_prompt(keys, prompt, prompt_rate)
    return masked(logp(jnp.where(hidden, mask_id, tokens), tokens), mask)


def partial_logp(
    logp: LogProbs, tokens: Array, mask: Array, keys: Array, *, mask_id: int, shares: Array | None = None
) -> Array:
    """UniGRPO's estimate: the mean log-prob of a random part of the response, given the prompt and the rest.

    e = mean over the k masked of n tokens of ln p(x_j | tokens that are not masked),  k = 1 + floor(share·n)

    e stands at every token, so that its ratio in a surrogate is that of the averaged log-probs; rows weigh
    alike under seq_mean_token_mean, as in the paper. With share ~ U(0, 1) n·e is on average the ELBO of
    ln p(response): every step of decoding is trained, not the first alone as by `full_mask_logp`.

    Args:
      shares: f32[N] in [0, 1), of `spread_shares` where a batch is passed over several times; None = drawn.

    Returns:
      f[N, T] (nats), the same at every token of a row; 0 outside of `mask`.

    Raises:
      ValueError: shapes that differ.

    References:
      2505.15809 (MMaDA). It masks each token with a probability; a number of tokens is never 0.
    """
    check_same_shape(tokens=tokens, mask=mask)
    of_share, of_tokens = _split(keys)
    shares = _uniform(of_share) if shares is None else shares
    n = jnp.sum(mask, axis=1)
    k = 1 + jnp.clip((shares * n).astype(jnp.int32), -1, n - 1)
    u = jnp.where(mask, _uniform(of_tokens, tokens.shape[1]), 2)
    hidden = mask & (jnp.argsort(jnp.argsort(u, axis=1), axis=1) < k[:, None])
    values = masked(logp(jnp.where(hidden, mask_id, tokens), tokens), hidden)
    mean = jnp.sum(values, axis=1) / jnp.maximum(k, 1)
    return jnp.where(mask, mean[:, None], 0)


def spread_shares(keys: Array, num_iterations: int) -> Array:
    """f32[num_iterations, N] in [0, 1): a row's random start, then evenly spread over the passes of a batch.

    Example:
      >>> shares = spread_shares(jax.random.split(jax.random.key(0), 3), 4)
      >>> [round(float(x), 4) for x in jnp.sort(shares[:, 1])[1:] - jnp.sort(shares[:, 1])[:-1]]
      [0.25, 0.25, 0.25]
    """
    index = jnp.arange(num_iterations)
    return jax.vmap(lambda key: stratified(key, num_iterations, index), out_axes=1)(keys)


def coupled_logp(
    logp: LogProbs,
    tokens: Array,
    mask: Array,
    keys: Array,
    *,
    mask_id: int,
    low: float = 0.2,
    high: float = 0.8,
) -> Array:
    """coupled-GRPO's estimate: a random mask, its complement and the full mask.

    e_j = ( ln p(x_j | all masked) + ln p(x_j | those masked with it) / q ) / 2

    with t ~ U(low, high) for a row, each token in the first mask with q = t and else in its complement with
    q = 1 − t: the pair scores every token once, in a context of committed tokens. The second term is an
    importance-weighted one and no log-prob: of one token in the first mask e = (1 + 1/t)/2 · ln p.

    Returns:
      f[N, T] (nats), 0 outside of `mask`.

    Raises:
      ValueError: shapes that differ, or bounds out of order.

    References:
      2506.20639 (DiffuCoder).
    """
    check_same_shape(tokens=tokens, mask=mask)
    if not 0 < low <= high < 1:
        raise ValueError(f"low={low} and high={high} must be in order between 0 and 1")
    of_time, of_tokens = _split(keys)
    t = low + (high - low) * _uniform(of_time, 1)
    first = _uniform(of_tokens, tokens.shape[1]) < t
    hidden = jnp.stack([mask, mask & first, mask & ~first])
    full, one, other = logp_of_draws(logp, tokens, hidden, mask_id)
    pair = jnp.where(first, one / t, other / (1 - t))
    return masked((full + pair) / 2, mask)


def _split(keys: Array) -> tuple[Array, Array]:
    """Two keys for each."""
    pair = jax.vmap(jax.random.split)(keys)
    return pair[:, 0], pair[:, 1]


def spg_bounds(
    logp: LogProbs,
    tokens: Array,
    mask: Array,
    prompt: Array,
    keys: Array,
    *,
    mask_id: int,
    num_draws: int = 2,
    block_size: int | None = None,
    beta: float = 1.5,
    prompt_rate: float = 0.15,
) -> tuple[Array, Array]:
    """SPG's two bounds, per token: see `diffusion.lower_bound` and `upper_bound`.

    The released code reports each row's mean over its tokens, which bounds nothing; sums over a row do.

    Args:
      num_draws: masks, and forward passes.
      block_size: of the decoder that wrote the response; see `diffusion.draw_masks`.
      beta: of the upper bound.
      prompt_rate: probability with which each prompt token is masked, anew in every draw.

    Returns:
      Lower and upper bound, f[N, T] each (nats), 0 for tokens that no draw scored.

    Raises:
      ValueError: shapes that differ, or options out of range.
    """
    check_same_shape(tokens=tokens, mask=mask, prompt=prompt)
    of_masks, of_prompt = _split(keys)
    draws = draw_masks(of_masks, mask, num_draws, block_size=block_size)
    by_draw = jax.vmap(lambda key: jax.random.split(key, num_draws), out_axes=1)(of_prompt)
    noise = jax.vmap(lambda keys: _noisy_prompt(keys, prompt, prompt_rate))(by_draw)
    values = logp_of_draws(logp, tokens, draws.hidden | noise, mask_id)
    return lower_bound(values, draws), upper_bound(values, draws, beta=beta)


def spg(
    lower: Array, upper: Array, advantages: Array, mask: Array, *, upper_share: float = 0.5
) -> tuple[Array, Metrics]:
    """Sandwiched policy gradient: raises a lower bound of good responses, lowers an upper bound of bad ones.

    ℓ = −A·lower where A > 0;  ℓ = −A·(upper_share·upper + (1 − upper_share)·lower) where A < 0

    There is no ratio and no clip: one update for each batch of responses.

    Example:
      >>> lower, upper = jnp.array([[-2.0], [-2.0]]), jnp.array([[-1.0], [-1.0]])
      >>> spg(lower, upper, jnp.array([[1.0], [-1.0]]), jnp.ones((2, 1), bool))[0].tolist()
      [[2.0], [-1.5]]

    Args:
      lower, upper: f[N, T] of `spg_bounds`.
      advantages: f[N, T], or f[N, 1] for one per sequence; constants.
      mask: bool[N, T] tokens that count.
      upper_share: 1 for the upper bound alone; the mixture has less variance.

    Returns:
      f[N, T] token loss, 0 where masked, float32 or wider; metric `bound_gap`, upper − lower per token.
      Aggregate it by token_mean: rows weigh as much as they are long.

    Raises:
      ValueError: shapes that do not fit, or a share outside [0, 1].

    References:
      2510.09541.
    """
    _check_rate("upper_share", upper_share)
    check_same_shape(lower=lower, upper=upper, mask=mask)
    a = token_advantages(advantages, mask)
    low, high = masked(lower, mask), masked(upper, mask)
    bound = jnp.where(a < 0, upper_share * high + (1 - upper_share) * low, low)
    return -a * bound, {"bound_gap": masked_sum(jax.lax.stop_gradient(high - low), mask)}


class Traced(NamedTuple):
    """What `trace_logp` knows of each token.

    Attributes:
      logp: f[N, T] (nats) given what had been committed when it was; 0 where its step was not drawn.
      weight: f32[N, T] Σ weight·logp estimates the sum over all steps without bias; 0 where not drawn. A
        surrogate's loss is weighted by it as its advantages are: pass `advantages * weight`.
    """

    logp: Array
    weight: Array


def trace_logp(
    logp: LogProbs,
    tokens: Array,
    mask: Array,
    commit_step: Array,
    keys: Array,
    *,
    mask_id: int,
    num_steps: int,
    sampled_steps: int | None = None,
) -> Traced:
    """Log-prob of every token as the decoder saw it: given the tokens of earlier steps, the rest masked.

    e_j = ln p(x_j | tokens with an earlier commit step than x_j)

    Where one token is committed at a time, in an order that does not depend on the token drawn, the sum is
    exactly ln p(response) by the chain rule. Tokens of one step are drawn independently, so their sum is the
    decoder's own log-prob too. An order that reads the drawn tokens (LLaDA's confidence) has a probability of
    its own, which is left out. To compare with the sampler's log-probs, temper `logp` as the sampler did and
    subtract `log_kept`; guidance is not repeated here, so rows decoded with it are off-policy.

    Args:
      commit_step: i32[N, T] step of each token of `mask`, from 0; −1 for others. A token behind the row's
        first own one that was never committed was a mask all along; those before it are the prompt.
      num_steps: more than every commit step; forward passes where all steps are wanted.
      sampled_steps: this many of each row's steps, drawn without replacement; None = all.

    Returns:
      `Traced`; logp is NaN at a token whose commit step is not below `num_steps`, rather than left out.

    Raises:
      ValueError: shapes that differ, or sampled_steps outside 1..num_steps.
    """
    check_same_shape(tokens=tokens, mask=mask, commit_step=commit_step)
    rows = len(tokens)
    own = jnp.max(jnp.where(mask, commit_step, -1), axis=1) + 1
    order = jnp.broadcast_to(jnp.arange(num_steps), (rows, num_steps))
    weight = jnp.ones((rows, 1))
    if sampled_steps is not None:
        if not 1 <= sampled_steps <= num_steps:
            raise ValueError(f"sampled_steps={sampled_steps} must lie between 1 and num_steps={num_steps}")
        u = jnp.where(order < own[:, None], _uniform(keys, num_steps), 2)  # steps that a row has come first
        order = jnp.argsort(u, axis=1)[:, :sampled_steps]
        weight = jnp.maximum(own / sampled_steps, 1)[:, None]
    never = ~mask & (jnp.cumsum(mask, axis=1) > 0)
    at = order.T[:, :, None]
    values = logp_of_draws(logp, tokens, (mask & (commit_step >= at)) | never, mask_id)
    drawn = mask & (commit_step == at)
    beyond = mask & (commit_step >= num_steps)
    scored = jnp.any(drawn, axis=0)
    total = jnp.sum(masked(values, drawn), axis=0)
    return Traced(jnp.where(beyond, jnp.nan, total), jnp.where(scored | beyond, weight, 0))
