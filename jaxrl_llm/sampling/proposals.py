"""From logits at masked positions to a proposed token for each and how sure the model is of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_kernels.denoising_step import (
    DenoisingStep,
    Sureness,
    contrast,
    denoising_step,
    log_prob,
    sureness,
    without,
)
from jaxrl_llm.sampling.diffusion_options import Method, Settings
from jaxrl_llm.sampling.guidance import implausible
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
    plain: Array,
    negative: Array | None,
    weight: Array,
    banned: Array,
    method: Method,
    settings: Settings,
    uniforms: Array,
) -> Proposals:
    """A token for every position.

    The likeliest tokens are read from `denoising_step`: on a TPU in one pass over the logits. If any row is
    drawn, held to what is plausible, or cut before it is judged (Dream's top_k and top_p), the batch goes
    through the logits in full instead.

    Args:
      plain: f32[B, W, V] logits as the model gave them.
      negative: f32[B, W, V] those of the negative input; None without guidance.
      weight: f32[B] of the guidance, 0 = none.
      banned: i32[B, n] ids that must not be proposed, -1 = none.
      uniforms: f32[B, W] in [0, 1).
    """
    batch, width, vocab = plain.shape
    hot = settings.temperature > 0
    scale = jnp.where(hot, settings.temperature, 1)[:, None, None]
    banned = banned[:, None]
    ends = jnp.stack([settings.eos_id, settings.eot_id], axis=1)
    distrusted = jnp.where(settings.distrust_eos[:, None], ends, -1)[:, None]

    def likeliest(_: None) -> Proposals:
        step = denoising_step(
            plain,
            negative=negative,
            weight=None if negative is None else weight[:, None],
            banned=banned,
            distrusted=distrusted,
            judge=method.confidence_from,
        )
        nothing = jnp.zeros((batch, width))
        confidence = _confidence(step, method.order)
        return Proposals(step.token, confidence, step.probability, nothing, step.raw_logp, nothing)

    def drawn(_: None) -> Proposals:
        guided = allowed = without(plain, banned)
        if negative is not None:
            guided = without(contrast(plain, negative, weight[:, None, None]), banned)
        guided = jnp.where(implausible(allowed, settings.plausible), -jnp.inf, guided)
        tempered = truncate(guided / scale, settings)
        weights = jnp.exp(tempered - jnp.max(tempered, axis=-1, keepdims=True))
        token = draw(weights.reshape(-1, vocab), uniforms.reshape(-1)).reshape(batch, width)
        token = jnp.where(hot[:, None], token, jnp.argmax(tempered, axis=-1).astype(jnp.int32))
        model = plain / scale
        kept = jnp.where(tempered > -jnp.inf, model, -jnp.inf)
        log_kept = jax.nn.logsumexp(kept, axis=-1) - jax.nn.logsumexp(model, axis=-1)

        # Dream is sure of a token as it would be drawn, LLaDA as the model has it
        judged = guided if method.confidence_from == "guided" else allowed
        if method.family == "dream":
            judged = tempered if method.confidence_from == "guided" else truncate(judged / scale, settings)
        sure = sureness(without(judged, distrusted), token)
        return Proposals(
            token,
            _confidence(sure, method.order),
            sure.probability,
            jnp.where(hot[:, None], log_prob(tempered, token), 0),
            log_prob(plain, token),
            jnp.where(hot[:, None], log_kept, 0),
        )

    in_full = hot | (settings.plausible > 0)
    if method.family == "dream":
        in_full |= (settings.top_p < 1) | (settings.top_k > 0)
    return jax.lax.cond(jnp.any(in_full), drawn, likeliest, None)


def _confidence(found: Sureness | DenoisingStep, order: str) -> Array:
    """f32[B, W] by the order; those that do not look at predictions give zeros."""
    if order in ("low_confidence", "maskgit_plus"):
        return found.probability
    if order == "topk_margin":
        return found.margin
    return -found.entropy if order == "entropy" else jnp.zeros_like(found.probability)
