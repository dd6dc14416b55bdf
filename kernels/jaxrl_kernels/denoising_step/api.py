"""`denoising_step`: logits at positions in, a proposed token for each and how sure the model is of it out."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_kernels import dispatch
from jaxrl_kernels.denoising_step import pallas_tpu, xla
from jaxrl_kernels.denoising_step.xla import Operands, Statistics, jensen_shannon

Array = jax.Array

JUDGES = ("guided", "plain")
MAX_TRACKED = 128
"""K at most, as they lie in the lanes of a TPU's register."""


class Look(NamedTuple):
    """What was predicted when the positions were last looked at.

    Attributes:
      ids: i32[..., K] most likely tokens, in order; -1 = none.
      probs: f32[..., K] theirs.
      seen: bool[...] whether there was a last time.
    """

    ids: Array
    probs: Array
    seen: Array


class DenoisingStep(NamedTuple):
    """What `denoising_step` returns, [...] each. Of a row with a NaN among its logits every number is NaN.

    Attributes:
      token: i32 most likely token of the guided distribution; the lowest id of equals.
      probability: f32 of the token, under the distribution that is judged by.
      margin: f32 p₁ - p₂ of that distribution's two most likely tokens.
      entropy: f32 of that distribution (nats).
      raw_logp: f32 of the token under the plain distribution with every token in it (nats).
      ids: i32[..., K] most likely tokens of the plain distribution without the banned, in order, the lower id
        first among equals; -1 where fewer have a probability. K = 0 without a last look.
      probs: f32[..., K] theirs.
      change: f32 of that distribution since the last look, as a Jensen-Shannon divergence (nats) between the
        K tokens of then with the rest in one bucket; ln 2, the most there is, where there was none.
    """

    token: Array
    probability: Array
    margin: Array
    entropy: Array
    raw_logp: Array
    ids: Array
    probs: Array
    change: Array


def denoising_step(
    logits: Array,
    *,
    negative: Array | None = None,
    weight: Array | None = None,
    banned: Array | None = None,
    distrusted: Array | None = None,
    judge: str = "guided",
    last: Look | None = None,
    implementation: str | None = None,
) -> DenoisingStep:
    """Guidance, arg-max, sureness and change since the last look, of every row of logits.

      plain     p = softmax(l)
      guided    softmax(l + w·(l - l⁻)), with probability 0 for banned tokens
      judged    the guided or the plain one, without banned and without distrusted tokens

    On a TPU each of the two arrays is read once, and nothing of their size is written. Constants: there is no
    gradient through it.

    Example:
      >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
      >>> step = denoising_step(logits, banned=jnp.array([[0]]))
      >>> int(step.token[0]), round(float(step.probability[0]), 3), round(float(step.margin[0]), 3)
      (1, 0.6, 0.2)

    Args:
      logits: f[..., V] l; computed with in float32.
      negative: f[..., V] l⁻, logits of the negative input; with `weight`.
      weight: f32[...] w; where it is 0 the logits stay what they are, bit for bit.
      banned: i32[..., n] ids that must not be proposed, -1 = none.
      distrusted: i32[..., m] ids that are left out where sureness is judged, -1 = none. A token that is one
        of them has probability 0 there.
      judge: one of `JUDGES`.
      last: what to compare with; None for no comparison.
      implementation: "xla", "pallas_tpu", or None: the kernel where the program is compiled for a TPU,
        unless a mesh of several devices is in context (`jax.set_mesh`) outside `jax.shard_map`: what is
        partitioned by the compiler cannot contain kernels.

    The leading dimensions of all but the first two arguments may be 1 instead.

    Raises:
      ValueError: unknown names, shapes that do not fit, fewer than two tokens, or one of `negative` and
        `weight` without the other.
    """
    if judge not in JUDGES:
        raise ValueError(f"unknown judge {judge!r}; one of {', '.join(JUDGES)}")
    if (negative is None) != (weight is None):
        raise ValueError("negative and weight belong together: pass both, or neither for no guidance")
    *lead, vocab = logits.shape
    if vocab < 2:
        raise ValueError(f"logits {logits.shape} have {vocab} token(s); a margin needs two")
    if negative is not None and negative.shape != logits.shape:
        raise ValueError(f"logits {logits.shape} and negative {negative.shape} must have the same shape")
    most = min(vocab, MAX_TRACKED)
    if last is not None and not 0 < last.ids.shape[-1] <= most:
        raise ValueError(f"last.ids {last.ids.shape} must hold 1 to {most} tokens of each row")
    rows = math.prod(lead)

    def of_rows(name: str, x: Array | None, *tail: int) -> Array | None:
        if x is None:
            return None
        if x.ndim != len(lead) + len(tail) or any(a not in (1, b) for a, b in zip(x.shape, lead)):
            raise ValueError(
                f"{name} {x.shape} must have the leading dimensions {tuple(lead)} of logits, or 1"
            )
        return jnp.broadcast_to(x, (*lead, *tail)).reshape(rows, *tail)

    def ids_of_rows(name: str, x: Array | None) -> Array | None:
        if x is None or x.shape[-1:] == (0,):
            return None
        return of_rows(name, jnp.asarray(x, jnp.int32), *x.shape[-1:])

    operands = Operands(
        logits.reshape(rows, vocab),
        None if negative is None else negative.reshape(rows, vocab),
        of_rows("weight", None if weight is None else jnp.asarray(weight, jnp.float32)),
        ids_of_rows("banned", banned),
        ids_of_rows("distrusted", distrusted),
        None if last is None else ids_of_rows("last.ids", last.ids),
    )
    mesh = jax.sharding.get_abstract_mesh()
    if not rows or (implementation is None and mesh.size > 1 and not mesh.are_all_axes_manual):
        implementation = "xla"
    found: Statistics = dispatch.run(
        implementation,
        jax.lax.stop_gradient(operands),
        pallas_tpu=partial(pallas_tpu.statistics, judge),
        xla=partial(xla.statistics, judge),
    )
    found = jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)
    if last is None:
        nothing = jnp.zeros((*lead, 0))
        ids, probs, change = nothing.astype(jnp.int32), nothing, jnp.full(lead, math.log(2))
    else:
        assert found.ids is not None and found.probs is not None and found.now is not None
        ids, probs = found.ids, found.probs
        change = jnp.where(last.seen, jensen_shannon(found.now, last.probs), math.log(2))
    return DenoisingStep(*found[:5], ids, probs, change)
