"""Which masked positions are committed in a step: quotas, and the rules that take the surest positions."""

import jax
import jax.numpy as jnp

from jaxrl_llm.sampling.diffusion_options import Method, Settings

Array = jax.Array


def ranks(scores: Array) -> Array:
    """i32[B, W] place of each score in its row, 0 = highest; of equal scores the lower index comes first."""
    index = jnp.arange(scores.shape[1])
    own, other = scores[:, :, None], scores[:, None, :]
    ahead = (other > own) | ((other == own) & (index < index[:, None]))
    return jnp.sum(ahead, axis=2, dtype=jnp.int32)


def even_quota(masks: Array, step: Array, steps: Array) -> Array:
    """LLaDA: floor(n / S) tokens, one more in the first n mod S steps. All i32[B]."""
    return masks // steps + (step < masks % steps)


def grid_quota(masks: Array, share: Array) -> Array:
    """Dream: int(n·p), from the masks i32[B] that are left and the grid's share f32[B]; 1 = all of them.

    Per row, where the public decoder takes the batch's mean and can mask committed tokens again.
    """
    return jnp.floor(masks.astype(jnp.float32) * share).astype(jnp.int32)


def chosen(
    confidence: Array,
    candidates: Array,
    method: Method,
    settings: Settings,
    quota: Array,
    share: Array,
    uniforms: Array,
) -> Array:
    """The candidates to commit.

    Args:
      confidence: f32[B, W], higher is surer.  candidates: bool[B, W].
      quota: i32[B] for commit='quota'.  share: f32[B] for order='origin'.
      uniforms: f32[B, W] in [0, 1).

    Returns:
      bool[B, W], a subset of `candidates`.
    """
    if method.order == "origin":
        return candidates & (uniforms < share[:, None])
    # NaN must not rank below what is no candidate: then nothing would ever be committed
    confidence = jnp.where(jnp.isnan(confidence), -1e30, confidence)
    warm = settings.order_temperature[:, None]
    # the highest sums with Gumbel noise are a draw without replacement (1903.06059)
    noise = -jnp.log(-jnp.log(jnp.maximum(uniforms, 1e-30)))
    keys = jnp.where(warm > 0, confidence / jnp.where(warm > 0, warm, 1) + noise, confidence)
    rank = ranks(jnp.where(candidates, keys, -jnp.inf))
    if method.commit == "quota":
        return candidates & (rank < quota[:, None])
    if method.commit == "threshold":
        return candidates & ((rank == 0) | (confidence >= settings.threshold[:, None]))
    if method.commit == "factor":
        breaks = (rank + 2) * (1 - confidence) > settings.factor[:, None]
    else:
        # entropies of what ranks before; an entropy is the negative confidence
        earlier = candidates[:, None, :] & (rank[:, None, :] < rank[:, :, None])
        before = jnp.sum(jnp.where(earlier, -confidence[:, None, :], 0), axis=2)
        breaks = before > settings.entropy_bound[:, None]
    first = jnp.min(jnp.where(candidates & breaks, rank, confidence.shape[1]), axis=1)
    return candidates & ((rank == 0) | (rank < first[:, None]))
