"""From logits at masked positions to a proposed token for each and how sure the model is of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.sampling.diffusion_options import Method, Settings
from jaxrl_llm.sampling.guidance import without
from jaxrl_llm.sampling.logits import Sampling, draw, threshold

Array = jax.Array


class Proposals(NamedTuple):
    """[B, W] each; log-probs in nats.

    Attributes:
      token: i32.
      confidence: f32, by the method's order; higher is surer.
      probability: f32 of the token, under what confidence is read from.
      logp: f32 under the distribution that the token was drawn from; 0 for greedy rows.
      raw_logp: f32 under the model: plain, untempered, with every token in it.
      log_kept: f32 log of the tempered plain mass on the tokens that could be drawn; 0 for greedy rows.
    """

    token: Array
    confidence: Array
    probability: Array
    logp: Array
    raw_logp: Array
    log_kept: Array


def at(x: Array, token: Array) -> Array:
    """f32[B, W]: x f32[B, W, V] at tokens i32[B, W]."""
    return jnp.take_along_axis(x, token[..., None], axis=-1)[..., 0]


def truncate(logits: Array, settings: Settings) -> Array:
    """f32[B, W, V] with -inf outside the top-k, then top-p tokens, as `logits.sample` cuts."""
    width, vocab = logits.shape[1:]

    def cut(logits: Array) -> Array:
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)).reshape(-1, 1, vocab)
        top_p, top_k = (jnp.repeat(x, width) for x in (settings.top_p, settings.top_k))
        rows = Sampling(jnp.ones_like(top_p), top_p, top_k, jnp.zeros_like(top_p))
        keep = weights >= threshold(weights, jnp.sum(weights, axis=(1, 2)), rows)[:, None, None]
        return jnp.where(keep.reshape(logits.shape), logits, -jnp.inf)

    needed = jnp.any((settings.top_p < 1) | (settings.top_k > 0))
    return jax.lax.cond(needed, cut, lambda x: x, logits)


def propose(
    logits: Array, plain: Array, banned: Array, method: Method, settings: Settings, uniforms: Array
) -> Proposals:
    """A token for every position.

    Args:
      logits: f32[B, W, V] guided, -inf for what must not be proposed.
      plain: f32[B, W, V] as the model gave them.
      banned: i32[B, n] ids that must not be proposed, -1 = none.
      uniforms: f32[B, W] in [0, 1).
    """
    batch, width, vocab = logits.shape
    hot = settings.temperature > 0
    scale = jnp.where(hot, settings.temperature, 1)[:, None, None]
    tempered = truncate(logits / scale, settings)

    def drawn(tempered: Array) -> tuple[Array, Array, Array]:
        weights = jnp.exp(tempered - jnp.max(tempered, axis=-1, keepdims=True))
        token = draw(weights.reshape(-1, vocab), uniforms.reshape(-1)).reshape(batch, width)
        token = jnp.where(hot[:, None], token, jnp.argmax(tempered, axis=-1).astype(jnp.int32))
        logp = at(tempered, token) - jax.nn.logsumexp(tempered, axis=-1)
        model = plain / scale
        allowed = jnp.where(tempered > -jnp.inf, model, -jnp.inf)
        log_kept = jax.nn.logsumexp(allowed, axis=-1) - jax.nn.logsumexp(model, axis=-1)
        return token, jnp.where(hot[:, None], logp, 0), jnp.where(hot[:, None], log_kept, 0)

    def likeliest(tempered: Array) -> tuple[Array, Array, Array]:
        nothing = jnp.zeros((batch, width))
        return jnp.argmax(tempered, axis=-1).astype(jnp.int32), nothing, nothing

    token, logp, log_kept = jax.lax.cond(jnp.any(hot), drawn, likeliest, tempered)

    # Dream is sure of a token as it would be drawn, LLaDA as the model has it
    guided = method.confidence_from == "guided"
    judged = logits if guided else without(plain, banned)
    if method.family == "dream":
        judged = tempered if guided else truncate(judged / scale, settings)
    distrusted = jnp.where(
        settings.distrust_eos[:, None], jnp.stack([settings.eos_id, settings.eot_id], axis=1), -1
    )
    judged = without(judged, distrusted)
    probability = jnp.exp(at(judged, token) - jax.nn.logsumexp(judged, axis=-1))
    return Proposals(
        token,
        _confidence(judged, probability, method.order),
        probability,
        logp,
        at(plain, token) - jax.nn.logsumexp(plain, axis=-1),
        log_kept,
    )


def _confidence(logits: Array, probability: Array, order: str) -> Array:
    """f32[B, W] by the order; those that do not look at predictions give zeros."""
    if order in ("low_confidence", "maskgit_plus"):
        return probability
    if order == "topk_margin":
        first, second = jnp.moveaxis(jax.lax.top_k(jax.nn.softmax(logits, axis=-1), 2)[0], -1, 0)
        return first - second
    if order == "entropy":
        probs = jax.nn.softmax(logits, axis=-1)
        return jnp.sum(probs * jnp.log(probs + 1e-10), axis=-1)
    return jnp.zeros_like(probability)
