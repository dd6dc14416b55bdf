"""SAGE: a search over whole sampled steps of reasoning, which stops when the model would (2602.08354).

Every round samples some steps after each beam, and the beams of the next round are the best of them. All
rows of a round write to the same columns of the cache; as steps differ in length, each chosen row is shifted
to end where the next round begins.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.params import Tree
from jaxrl_llm.sampling import slots as device
from jaxrl_llm.sampling.autoregressive import next_logits
from jaxrl_llm.sampling.found import Found, best, concatenate, fill_up, first_beam, gather, nothing
from jaxrl_llm.sampling.logits import Sampling, row_uniforms, sample, sampling_params
from jaxrl_llm.sampling.search import check_search, flat_rows, next_logp, open_slots
from jaxrl_llm.sampling.slots import Slots

Array = jax.Array

RANK_BY = ("chain", "step")

DRAWS = 2**18
"""Room for the draws of one row: row j of a prompt takes them from j·DRAWS on."""


class SageShape(NamedTuple):
    """What a search is compiled for; see `sage`."""

    beams: int
    samples: int
    num_return: int
    max_steps: int
    max_step_tokens: int


class Steps(NamedTuple):
    """One step of reasoning for each of R rows, L tokens at most.

    Attributes:
      tokens: i32[R, L].  logp: f32[R, L] raw log-probs (nats).  Both 0 after the end.
      counts: i32[R] tokens drawn.
      ended: bool[R] by the end token.
      failed: bool[R] the model gave NaN or infinite logits.
    """

    tokens: Array
    logp: Array
    counts: Array
    ended: Array
    failed: Array


def sage(
    prepared: Tree,
    cfg: ModelConfig,
    tokens: Array,
    lengths: Array,
    *,
    beams: int,
    num_return: int,
    max_steps: int,
    max_step_tokens: int,
    end_id: int,
    delimiters: Sequence[Sequence[int]],
    key: Array,
    uids: Array,
    sampling: Sampling | None = None,
    samples: int | None = None,
    rank_by: str = "chain",
) -> tuple[Found, Array]:
    """SAGE(m, r): r short chains of thought that the policy itself is confident of.

      beams = {x};  O = {}
      up to `max_steps` times:
        sample 2m steps after each beam
        those that end by the end token are complete chains and go to O
        stop if O has r chains;  beams = the best m of the others by Φ
      if O has fewer: fill it up with the best beams, closed by force
      return the r chains of O with the highest Φ

    where Φ(y) = (1/|y|) Σ_t log π(y_t | y_<t, x) over the whole chain so far, under the untempered,
    untruncated policy however steps are sampled. A step ends with a delimiter, the end token, or
    `max_step_tokens`. Equal Φ go to the earlier beam, then to the earlier sample. Nothing is done about two
    samples that are alike.

    One beam and one sample per step is ordinary sampling, token for token what `generate` draws for the same
    key and uid. The answer after the end token is decoded as usual: `found.to_trajectories`.

    Args:
      prepared: from `autoregressive.prepare`.
      tokens: i32[M, P] right-padded prompts.  lengths: i32[M], at least 1.
      beams: m.  num_return: r.
      max_steps: rounds, the T_max of the paper.
      max_step_tokens: longest step.
      end_id: the end-of-thinking token.
      delimiters: token sequences that end a step and belong to it: every way to write a blank line, say.
      key, uids: i32[M]; a prompt's draws depend on the key and its uid alone.
      sampling: parameters of the M prompts; None = temperature 1, no truncation.
      samples: steps sampled after each beam; None = 2m.
      rank_by: what ranks beams: Φ of the whole 'chain', or of its last 'step' alone. (Complete chains are
        always ranked by Φ of the whole.)

    Returns:
      `Found` [M, r] with room for max_steps · max_step_tokens + 1 tokens, by Φ; every chain has one end
      token, its last, and `finished` is False where that was forced. And i32[M] tokens that were drawn, at
      most max_steps · m · samples · max_step_tokens.

    Raises:
      ValueError: an empty prompt or delimiter, a count below 1 or too large, a token outside the vocabulary,
        an unknown `rank_by`, or uids or sampling of another number of prompts.
    """
    samples = 2 * beams if samples is None else samples
    shape = SageShape(beams, samples, num_return, max_steps, max_step_tokens)
    check_search(cfg, lengths, [end_id, *(id for d in delimiters for id in d)], **shape._asdict())
    prompts = len(tokens)
    sampling = sampling_params(prompts) if sampling is None else sampling
    if len(uids) != prompts or sampling.temperature.shape != (prompts,):
        raise ValueError(
            f"{prompts} prompts need as many uids and sampling rows, got {len(uids)} and "
            f"{sampling.temperature.shape[0]}"
        )
    if rank_by not in RANK_BY:
        raise ValueError(f"unknown rank_by={rank_by!r}; one of {', '.join(RANK_BY)}")
    if not all(delimiters):
        raise ValueError("a delimiter is empty: a step would end before it begins")
    if beams * samples * DRAWS >= 2**31 or tokens.shape[1] + max_steps * max_step_tokens > DRAWS:
        raise ValueError(
            f"{beams} beams × {samples} samples, or a prompt and {max_steps} × {max_step_tokens} tokens, are "
            f"more than the draws reach for: at most {2**31 // DRAWS - 1} rows of {DRAWS} tokens"
        )
    longest = max(map(len, delimiters), default=1)
    ends = [[-1] * (longest - len(d)) + list(d) for d in delimiters] or [[-2]]
    return _sage(
        prepared,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        jnp.int32(end_id),
        jnp.asarray(ends, jnp.int32),
        jnp.asarray(rank_by == "chain"),
        sampling,
        key,
        jnp.asarray(uids),
        cfg,
        shape=shape,
    )


@partial(jax.jit, static_argnames=("cfg", "shape"))
def _sage(
    prepared: Tree,
    tokens: Array,
    lengths: Array,
    end_id: Array,
    delimiters: Array,
    by_chain: Array,
    sampling: Sampling,
    key: Array,
    uids: Array,
    cfg: ModelConfig,
    *,
    shape: SageShape,
) -> tuple[Found, Array]:
    """`sage`; delimiters: i32[D, K] right-aligned, -1 before them; by_chain: bool scalar."""
    prompts, columns = tokens.shape
    beams, samples, size = shape.beams, shape.samples, shape.max_step_tokens
    rows = beams * samples  # per prompt
    room = shape.max_steps * size
    slots, ropes = open_slots(prepared, tokens, lengths, beams, room, cfg)
    sampling = jax.tree.map(lambda x: jnp.repeat(x, rows), sampling)
    uids = jnp.repeat(uids, rows)
    first_draw = jnp.repeat(lengths, rows) + jnp.tile(DRAWS * jnp.arange(rows), prompts)

    Carry = tuple[Array, Slots, Found, Found, Array]

    def one(carry: Carry) -> Carry:
        done, slots, alive, found, drawn = carry
        slots = device.rows_of(slots, jnp.repeat(jnp.arange(len(slots.lengths)), samples))
        # a row's draws go on from round to round: none is used twice, whichever beam the row continues
        uniforms = row_uniforms(key, uids, first_draw + drawn, size)
        live = jnp.repeat(alive.scores > -jnp.inf, samples, axis=1).reshape(-1)
        slots, steps = _sample_steps(
            prepared,
            slots,
            live,
            columns + done * size,
            uniforms,
            sampling,
            end_id,
            delimiters,
            ropes,
            cfg,
            size,
        )
        step_logp = jnp.sum(steps.logp, axis=1).reshape(prompts, rows)
        counts = steps.counts.reshape(prompts, rows)
        chains = _extend(gather(alive, jnp.tile(jnp.repeat(jnp.arange(beams), samples), (prompts, 1))), steps)
        mean = jnp.sum(chains.logp, axis=-1) / jnp.maximum(chains.lengths, 1)
        usable = (live & ~steps.failed).reshape(prompts, rows)
        ended = steps.ended.reshape(prompts, rows)

        complete = dataclasses.replace(
            chains, scores=jnp.where(usable & ended, mean, -jnp.inf), finished=usable & ended
        )
        found = best(concatenate(found, complete), shape.num_return)
        enough = jnp.all(found.scores > -jnp.inf, axis=1, keepdims=True)
        rank = jnp.where(by_chain, mean, step_logp / jnp.maximum(counts, 1))
        rank = jnp.where(usable & ~ended & ~enough, rank, -jnp.inf)
        index = jax.lax.top_k(rank, beams)[1]
        alive = gather(dataclasses.replace(chains, scores=rank), index)
        chosen = flat_rows(index, rows)
        slots = _shift(device.rows_of(slots, chosen), size - steps.counts[chosen])
        return done + 1, slots, alive, found, drawn + steps.counts

    def more(carry: Carry) -> Array:
        return (carry[0] < shape.max_steps) & jnp.any(carry[2].scores > -jnp.inf)

    start = (
        jnp.zeros((), jnp.int32),
        slots,
        first_beam(prompts, beams, room + 1),
        nothing(prompts, shape.num_return, room + 1),
        jnp.zeros(prompts * rows, jnp.int32),
    )
    _, slots, alive, found, drawn = jax.lax.while_loop(more, one, start)
    filled = fill_up(found, alive, next_logp(prepared, slots, cfg), end_id)
    return filled, jnp.sum(drawn.reshape(prompts, rows), axis=1)


def _sample_steps(
    prepared: Tree,
    slots: Slots,
    live: Array,
    column: Array,
    uniforms: Array,
    sampling: Sampling,
    end_id: Array,
    delimiters: Array,
    ropes: Tree,
    cfg: ModelConfig,
    size: int,
) -> tuple[Slots, Steps]:
    """Up to L = `size` tokens in every live row bool[R], from a column of the cache on.

    What is written to the cache after a row's end is no part of it, and `slots.lengths` does not count it.
    """
    rows = live.shape[0]
    reach = delimiters.shape[1]
    no = jnp.zeros(rows, bool)
    empty = Steps(
        jnp.zeros((rows, size), jnp.int32), jnp.zeros((rows, size)), jnp.zeros(rows, jnp.int32), no, no
    )
    recent = jnp.full((rows, reach), -3, jnp.int32)  # the step's last tokens; -3 = none yet

    Carry = tuple[Array, Slots, Array, Array, Steps]

    def one(carry: Carry) -> Carry:
        step, slots, live, recent, steps = carry
        drawn = sample(next_logits(prepared, slots.hidden, cfg), sampling, uniforms[:, step])
        failed = live & ~jnp.isfinite(drawn.raw_logp)
        live &= ~failed
        token = jnp.where(live, drawn.token, 0)
        recent = jnp.concatenate([recent[:, 1:], token[:, None]], axis=1)
        matches = (recent[:, None] == delimiters) | (delimiters == -1)
        ended = live & (token == end_id)
        hidden, keys, values = device.advance(prepared, slots, token, column + step, ropes, cfg)
        slots = dataclasses.replace(
            slots,
            keys=keys,
            values=values,
            hidden=jnp.where(live[:, None], hidden, slots.hidden),
            lengths=slots.lengths + live,
        )
        steps = Steps(
            tokens=steps.tokens.at[:, step].set(token),
            logp=steps.logp.at[:, step].set(jnp.where(live, drawn.raw_logp, 0)),
            counts=steps.counts + live,
            ended=steps.ended | ended,
            failed=steps.failed | failed,
        )
        live &= ~ended & ~jnp.any(jnp.all(matches, axis=2), axis=1)
        return step + 1, slots, live, recent, steps

    def more(carry: Carry) -> Array:
        return (carry[0] < size) & jnp.any(carry[2])

    start = (jnp.zeros((), jnp.int32), slots, live, recent, empty)
    _, slots, _, _, steps = jax.lax.while_loop(more, one, start)
    return slots, steps


def _extend(chains: Found, steps: Steps) -> Found:
    """Chains [M, k] with a step behind each, of M·k."""
    prompts, count, room = chains.tokens.shape
    size = steps.tokens.shape[1]
    counts = steps.counts.reshape(prompts, count)
    at = jnp.arange(room) - chains.lengths[..., None]
    is_new = (at >= 0) & (at < counts[..., None])

    def put(old: Array, new: Array) -> Array:
        new = new.reshape(prompts, count, size)
        return jnp.where(is_new, jnp.take_along_axis(new, at.clip(0, size - 1), axis=2), old)

    return dataclasses.replace(
        chains,
        tokens=put(chains.tokens, steps.tokens),
        logp=put(chains.logp, steps.logp),
        lengths=chains.lengths + counts,
    )


def _shift(slots: Slots, by: Array) -> Slots:
    """Every row's columns moved right by i32[S]. What comes in at the left is seen by nobody."""

    def moved(x: Array, axis: int) -> Array:
        return jax.vmap(partial(jnp.roll, axis=axis - 1), in_axes=(1, 0), out_axes=1)(x, by)

    return dataclasses.replace(
        slots,
        keys=tuple(moved(x, 4) for x in slots.keys),
        values=tuple(moved(x, 3) for x in slots.values),
    )
