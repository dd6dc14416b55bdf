"""Sequences that a search has found: what it keeps of them, and how they become rows to learn from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.trajectory import Trajectories, length_mask, widen

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Found:
    """n sequences for each of M prompts, best first, with room for C new tokens each.

    Attributes:
      tokens: i32[M, n, C] new tokens; 0 after the end.
      logp: f32[M, n, C] log-prob (nats) of each under the untempered, untruncated model; 0 after the end.
      lengths: i32[M, n] new tokens; 0 where fewer than n were found.
      scores: f32[M, n] what the sequences are ranked by; −inf where fewer than n were found.
      finished: bool[M, n] came to an end by itself, rather than by a limit.
    """

    tokens: Array
    logp: Array
    lengths: Array
    scores: Array
    finished: Array


def nothing(prompts: int, count: int, room: int) -> Found:
    """`count` places for sequences, all free."""
    return Found(
        tokens=jnp.zeros((prompts, count, room), jnp.int32),
        logp=jnp.zeros((prompts, count, room)),
        lengths=jnp.zeros((prompts, count), jnp.int32),
        scores=jnp.full((prompts, count), -jnp.inf),
        finished=jnp.zeros((prompts, count), bool),
    )


def first_beam(prompts: int, beams: int, room: int) -> Found:
    """What a search begins with: one beam that is empty, and places for others."""
    free = nothing(prompts, beams, room)
    return dataclasses.replace(free, scores=free.scores.at[:, 0].set(0.0))


def gather(found: Found, index: Array) -> Found:
    """Sequences i32[M, k] of each prompt, in that order."""
    return jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, index), found)


def concatenate(a: Found, b: Found) -> Found:
    """The sequences of both."""
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), a, b)


def best(found: Found, count: int) -> Found:
    """The `count` highest scores, best first; equal ones in the order given."""
    return gather(found, jax.lax.top_k(found.scores, count)[1])


def append(found: Found, token: Array, logp: Array, scores: Array) -> Found:
    """One more token i32[M, k] each, its log-prob, and the scores with it."""
    here = jnp.arange(found.tokens.shape[2]) == found.lengths[..., None]
    return Found(
        tokens=jnp.where(here, token[..., None], found.tokens),
        logp=jnp.where(here, logp[..., None], found.logp),
        lengths=found.lengths + 1,
        scores=scores,
        finished=found.finished,
    )


def tidy(found: Found) -> Found:
    """Free places emptied of what they held."""
    there = found.scores > -jnp.inf
    return Found(
        tokens=jnp.where(there[..., None], found.tokens, 0),
        logp=jnp.where(there[..., None], found.logp, 0),
        lengths=jnp.where(there, found.lengths, 0),
        scores=found.scores,
        finished=found.finished & there,
    )


def fill_up(found: Found, alive: Found, logp: Array, close: Array) -> Found:
    """Gives what places are free to the best beams, closed by force; then all by their mean log-prob.

    Args:
      found: [M, n] complete sequences.  alive: [M, m] beams; score −inf = none.
      logp: f32[M·m, V] log-probs of their next token.  close: i32 the token that closes.
    """
    prompts, count = found.scores.shape
    ending = logp[:, close].reshape(prompts, -1)
    mean = (jnp.sum(alive.logp, axis=-1) + ending) / (alive.lengths + 1)
    scores = jnp.where((alive.scores > -jnp.inf) & ~jnp.isnan(mean), mean, -jnp.inf)
    closed = append(alive, jnp.broadcast_to(close, ending.shape), ending, scores)
    both = concatenate(found, closed)
    order = jnp.lexsort((-both.scores, ~both.finished))[:, :count]
    return tidy(best(gather(both, order), count))


# --- what becomes of what was found


def to_trajectories(
    found: Found,
    tokens: Array,
    lengths: Array,
    *,
    policy_version: int = 0,
    answers: Trajectories | None = None,
) -> Trajectories:
    """Prompts and what was found for them, as rows to learn from: row i·n + j continues prompt i.

    Their log-probs are those of the policy at temperature 1, for each token on its own: that the sequences
    were chosen among others is left out. A place without a sequence is a row in which the policy wrote
    nothing. To let a chain of thought be followed by an answer, decode on from what this returns,
    `generate(..., t.tokens, t.lengths, num_generations=1)`, and give that as `answers`.

    Args:
      found: [M, n].  tokens: i32[M, P] right-padded prompts.  lengths: i32[M].
      policy_version: of the params that searched.
      answers: N = M·n rows that continue prompt and chain, drawn at temperature 1 without truncation.

    Returns:
      `Trajectories` of N rows, in M groups.

    Raises:
      ValueError: answers of another number of rows, or drawn at another temperature or truncated.
    """
    prompts, count, room = found.tokens.shape
    width = tokens.shape[1]
    before = jnp.repeat(jnp.asarray(lengths), count)
    written = found.lengths.reshape(-1)
    column = jnp.arange(width + room)[None]
    at = column - before[:, None]
    action = (at >= 0) & (at < written[:, None])

    def place(x: Array) -> Array:
        return jnp.where(action, jnp.take_along_axis(x.reshape(-1, room), at.clip(0, room - 1), axis=1), 0)

    prompt = jnp.pad(jnp.repeat(jnp.asarray(tokens), count, axis=0), ((0, 0), (0, room)))
    logp = place(found.logp)
    out = Trajectories(
        tokens=jnp.where(length_mask(before, width + room), prompt, place(found.tokens)),
        lengths=before + written,
        action_mask=action,
        behaviour_logp=logp,
        raw_logp=logp,
        log_kept=jnp.zeros_like(logp),
        temperature=jnp.ones(prompts * count),
        finished=found.finished.reshape(-1),
        group=jnp.repeat(jnp.arange(prompts, dtype=jnp.int32), count),
        policy_version=jnp.where(action, policy_version, -1),
    )
    return out if answers is None else _with_answers(out, answers)


def _with_answers(chains: Trajectories, answers: Trajectories) -> Trajectories:
    if answers.num_sequences != chains.num_sequences:
        raise ValueError(f"{answers.num_sequences} answers for {chains.num_sequences} chains: one for each")
    plain = np.all(np.asarray(answers.temperature) == 1) and not np.any(np.asarray(answers.log_kept))
    if not plain:
        raise ValueError(
            "the answers were drawn at another temperature than 1 or truncated: a row's log-probs belong to "
            "one distribution, and its chain's are the policy's own"
        )
    chains = widen(chains, answers.tokens.shape[1])
    versions = None
    if answers.policy_version is not None and chains.policy_version is not None:
        versions = jnp.where(chains.action_mask, chains.policy_version, answers.policy_version)
    return dataclasses.replace(
        answers,
        action_mask=answers.action_mask | chains.action_mask,
        behaviour_logp=answers.behaviour_logp + chains.behaviour_logp,
        raw_logp=answers.raw_logp + chains.raw_logp,
        group=chains.group,
        policy_version=versions,
    )
