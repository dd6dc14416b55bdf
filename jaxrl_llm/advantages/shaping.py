"""Rewards shaped by how an answer came about: waypoints, process scores, and length weighed by importance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, float_of, masked_sum
from jaxrl_llm.losses.segments import segment_ids, segment_sum

REFERENCE_LENGTHS = ("group_mean", "relative")


def waypoint_coverage(covered: Array, waypoints: Array) -> Array:
    """f[N] share of a row's waypoints that are covered; 0 for a row without waypoints.

    Example:
      >>> covered = jnp.array([[True, False, True], [True, True, True]])
      >>> waypoint_coverage(covered, jnp.array([[True, True, False], [False, False, False]])).tolist()
      [0.5, 0.0]

    Args:
      covered: bool[N, W] entities that the trajectory mentions.
      waypoints: bool[N, W] entities on the way to the answer that neither question nor answer names.
    """
    check_same_shape(covered=covered, waypoints=waypoints)
    found, wanted = (jnp.sum(x, axis=1, dtype=jnp.float32) for x in (covered & waypoints, waypoints))
    return found / jnp.maximum(wanted, 1)


def waypoint_reward(correct: Array, coverage: Array, *, weight: float = 0.3) -> Array:
    """Waypoint coverage reward: a wrong answer gets credit for the way it went.

    R = 1 where the answer is correct, else λ·coverage

    Every wrong trajectory stays below every right one, for λ < 1. A group of wrong answers now has
    advantages, if their coverages differ; a group of right ones has none. What asks for the share of right
    answers, as a proposer's reward does, must ask `correct` and not R > 0.

    Example:
      >>> correct, coverage = jnp.array([True, False, False]), jnp.array([0.0, 0.5, 1.0])
      >>> waypoint_reward(correct, coverage, weight=0.5).tolist()
      [1.0, 0.25, 0.5]

    Args:
      correct: bool[N].
      coverage: f[N] in [0, 1], of `waypoint_coverage`; constants.
      weight: λ in [0, 1); 0 is the plain outcome reward.

    Returns:
      f[N] without gradient, float32 or wider.

    Raises:
      ValueError: a weight out of range, or shapes that differ.

    References:
      2605.05702; the formula and λ are reconstructions and could not be confirmed.
    """
    if not 0 <= weight < 1:
        raise ValueError(
            f"weight={weight} must be in [0, 1): from 1 on a wrong answer may earn a right one's"
        )
    check_same_shape(correct=correct, coverage=coverage)
    return jnp.where(correct, 1, weight * jax.lax.stop_gradient(float_of(coverage)))


def importance_length_penalty(
    scores: Array,
    chunk_lengths: Array,
    length: Array,
    group: Array,
    valid: Array | None = None,
    *,
    reference: str | float = "group_mean",
    well_formed: Array | None = None,
) -> Array:
    """SCMA: the length of an answer, counted by how little each of its chunks matters.

    Pen = Σ_c (1 − ŵ_c)·|c| / L_ref with ŵ = (w − 1)/4 of the scores w in 1..5

    All scores 1: the plain length penalty |y|/L_ref; all 5: none. Cutting a chunk in two of equal scores
    changes nothing. With a fixed L_ref, deleting a chunk of score 1 lowers the penalty by its length and
    deleting one of score 5 leaves it; with a relative L_ref = |y| deleting the latter raises it.

    Example:
      >>> scores, chunks = jnp.array([[5.0, 1.0, 3.0]]), jnp.array([[4.0, 2.0, 4.0]])
      >>> length, group = jnp.array([10.0]), jnp.array([0])
      >>> importance_length_penalty(scores, chunks, length, group, reference=8.0).tolist()  # (0 + 2 + 2)/8
      [0.5]

    Args:
      scores: f[N, C] w of each chunk, in 1..5; anything where the chunk's length is 0.
      chunk_lengths: f[N, C] tokens of each chunk; 0 for no chunk.
      length: f[N] |y|, tokens of the answer: the sum of its chunks' if it was cut without loss.
      group: i[N] any integers; rows with the same one are compared.
      valid: bool[N] rows that count, in the group's mean length too; None for all.
      reference: L_ref: `group_mean` of |y|, `relative` to |y| itself, or a fixed number of tokens.
      well_formed: bool[N] rows whose chunks and scores are usable; None for all. The others have |y|/L_ref.

    Returns:
      f[N] without gradient, 0 where not valid, float32 or wider.

    Raises:
      ValueError: an unknown reference or one that is not above 0, or shapes that do not fit.

    References:
      2601.21919; the formula is a reconstruction and could not be confirmed.
    """
    check_same_shape(scores=scores, chunk_lengths=chunk_lengths)
    valid = jnp.ones(jnp.shape(length), bool) if valid is None else jnp.asarray(valid, bool)
    well_formed = jnp.ones_like(valid) if well_formed is None else well_formed
    check_same_shape(length=length, group=group, valid=valid, well_formed=well_formed)
    scores, chunks, length = (jax.lax.stop_gradient(float_of(x)) for x in (scores, chunk_lengths, length))
    unneeded = jnp.sum(jnp.where(chunks > 0, (5 - scores) / 4 * chunks, 0), axis=1)
    if reference == "group_mean":
        ids = segment_ids(group)
        rows = segment_sum(jnp.ones_like(length), ids, valid)
        per = (segment_sum(length, ids, valid) / jnp.maximum(rows, 1))[ids]
    elif reference == "relative":
        per = length
    elif isinstance(reference, str) or reference <= 0:
        raise ValueError(
            f"reference={reference!r} must be a number of tokens or one of {', '.join(REFERENCE_LENGTHS)}"
        )
    else:
        per = jnp.full_like(length, reference)
    counted = jnp.where(well_formed, unneeded, length)
    return jnp.where(valid & (per > 0), counted / jnp.where(per > 0, per, 1), 0)


def length_penalised_reward(
    accuracy: Array, penalty: Array, *, weight: float = 0.2, gated: bool = True
) -> Array:
    """SCMA's reward of the team: accuracy less a length penalty, which by default only right answers pay.

    R = R_acc − α·R_acc·Pen, or without the gate R_acc − α·Pen

    Shared with the agents that cut and score the answer it rewards them for scores of 5 all along, which take
    the penalty away; `helper_probe_reward` does not. α = 0 is the accuracy alone.

    Example:
      >>> accuracy, penalty = jnp.array([1.0, 0.0]), jnp.array([0.5, 0.5])
      >>> length_penalised_reward(accuracy, penalty, weight=0.5).tolist()
      [0.75, 0.0]
      >>> length_penalised_reward(accuracy, penalty, weight=0.5, gated=False).tolist()
      [0.75, -0.25]

    Args:
      accuracy: f[N] R_acc; constants.
      penalty: f[N] Pen, of `importance_length_penalty`; constants.
      weight: α.
      gated: whether R_acc = 0 frees from the penalty.

    Returns:
      f[N] without gradient, float32 or wider.

    References:
      2601.21919; a reconstruction that could not be confirmed.
    """
    check_same_shape(accuracy=accuracy, penalty=penalty)
    accuracy, penalty = jax.lax.stop_gradient((float_of(accuracy), float_of(penalty)))
    return accuracy - weight * penalty * (accuracy if gated else 1)


def helper_probe_reward(
    regenerated: Array,
    scores: Array,
    chunk_lengths: Array,
    length: Array,
    *,
    weight: float,
    keep_from: float = 3.0,
) -> Array:
    """SCMA's helpers paid for what their scores tell: whether the answer is found from the chunks they keep.

    R = R_regenerated − μ·(tokens of the chunks with w ≥ keep_from)/|y|

    Scores of 5 all along keep everything and cost μ, so agreeing to them does not pay.

    Example:
      >>> scores, chunks = jnp.array([[5.0, 1.0], [5.0, 5.0]]), jnp.array([[6.0, 2.0], [6.0, 2.0]])
      >>> helper_probe_reward(jnp.ones(2), scores, chunks, jnp.full(2, 8.0), weight=1.0).tolist()
      [0.25, 0.0]

    Args:
      regenerated: f[N] whether an answer written from the kept chunks alone is right; constants.
      scores, chunk_lengths, length: as `importance_length_penalty`.
      weight: μ.
      keep_from: least score of a chunk that is kept.

    Returns:
      f[N] without gradient, float32 or wider.

    References:
      A remedy for 2601.21919, not in it.
    """
    check_same_shape(scores=scores, chunk_lengths=chunk_lengths)
    check_same_shape(regenerated=regenerated, length=length)
    chunks = jax.lax.stop_gradient(float_of(chunk_lengths))
    kept = jnp.sum(jnp.where((chunks > 0) & (scores >= keep_from), chunks, 0), axis=1)
    length = jnp.maximum(jax.lax.stop_gradient(float_of(length)), 1)
    return jax.lax.stop_gradient(float_of(regenerated)) - weight * kept / length


def process_gated_reward(
    process: Array,
    answer: Array,
    format_reward: Array,
    *,
    format_weight: float,
    threshold: float | None = None,
    process_weight: float = 0.0,
) -> Array:
    """PGPO: the score of the reasoning gates what the answer earns.

    R = T·(R_ans + λ_f·R_format), or with a threshold κ: R = 1[T ≥ κ]·(R_ans + λ_f·R_format) + λ_p·T

    For rewards of at least 0 it does not fall as T rises: a right answer by a wrong way earns nearly nothing,
    and less than the mean of a group that has a right one by a right way. T = 1 is the outcome reward.

    Example:
      >>> process, answer, well = jnp.array([0.5, 0.25]), jnp.ones(2), jnp.ones(2)
      >>> process_gated_reward(process, answer, well, format_weight=0.5).tolist()
      [0.75, 0.375]
      >>> process_gated_reward(
      ...     process, answer, well, format_weight=0.5, threshold=0.5, process_weight=1.0
      ... ).tolist()
      [2.0, 0.25]

    Args:
      process: f[N] T in [0, 1], the critic's score of the trace; constants.
      answer: f[N] R_ans, at least 0; constants.
      format_reward: f[N] R_format, at least 0; constants.
      format_weight: λ_f.
      threshold: κ of the hard gate; None for the soft one.
      process_weight: λ_p, of the hard gate alone.

    Returns:
      f[N] without gradient, float32 or wider.

    Raises:
      ValueError: shapes that differ, or a process weight without a threshold.

    References:
      2604.20755; the form of the gate is a reconstruction and could not be confirmed.
    """
    if threshold is None and process_weight != 0:
        raise ValueError(f"process_weight={process_weight} belongs to the hard gate: give a threshold too")
    check_same_shape(process=process, answer=answer, format_reward=format_reward)
    arrays = process, answer, format_reward
    process, answer, well_formed = (jax.lax.stop_gradient(float_of(x)) for x in arrays)
    outcome = answer + format_weight * well_formed
    if threshold is None:
        return process * outcome
    return jnp.where(process >= threshold, outcome, 0) + process_weight * process


class LengthBounds(NamedTuple):
    """Quantiles of the groups' mean lengths (tokens, f[] each), from `length_quantiles`."""

    low: Array
    high: Array
    top: Array


def _group_lengths(length: Array, group: Array, valid: Array | None) -> tuple[Array, Array, Array, Array]:
    """Of every id the mean length and whether it has a row; of every row its id and whether it counts."""
    valid = jnp.ones(jnp.shape(length), bool) if valid is None else jnp.asarray(valid, bool)
    check_same_shape(length=length, group=group, valid=valid)
    ids = segment_ids(group)
    length = jax.lax.stop_gradient(float_of(length))
    rows = segment_sum(jnp.ones_like(length), ids, valid)
    return segment_sum(length, ids, valid) / jnp.maximum(rows, 1), rows > 0, ids, valid


def length_quantiles(
    length: Array,
    group: Array,
    valid: Array | None = None,
    *,
    low: float = 0.3,
    high: float = 0.65,
    top: float = 0.95,
) -> LengthBounds:
    """Quantiles of the mean response length of a batch's prompts, each prompt counted once.

    Example:
      >>> length, group = jnp.array([1.0, 3.0, 4.0, 6.0]), jnp.array([5, 5, 0, 9])  # means 2, 4 and 6
      >>> [float(q) for q in length_quantiles(length, group, low=0.25, high=0.5, top=1.0)]
      [3.0, 4.0, 6.0]

    Args:
      length: f[N] or i[N] tokens of every response.
      group: i[N] any integers; rows with the same one answer one prompt.
      valid: bool[N] rows that count; None for all.
      low, high, top: in this order, in [0, 1]; linear between the two nearest prompts.

    Returns:
      `LengthBounds`, 0 without a valid row.

    Raises:
      ValueError: quantiles out of order, or shapes that differ.

    References:
      2510.01459; the values are a recollection and could not be confirmed.
    """
    if not 0 <= low <= high <= top <= 1:
        raise ValueError(f"low={low}, high={high}, top={top} must rise from 0 to 1")
    mean, is_group, _, _ = _group_lengths(length, group, valid)
    if mean.shape[0] == 0:
        return LengthBounds(*jnp.zeros((3,), mean.dtype))
    ordered = jnp.sort(jnp.where(is_group, mean, jnp.inf))
    last = jnp.maximum(jnp.sum(is_group) - 1, 0)
    place = jnp.array([low, high, top], mean.dtype) * last
    below = jnp.floor(place).astype(jnp.int32)
    first, second = ordered[below], ordered[jnp.minimum(below + 1, last)]
    quantiles = first + (second - first) * (place - below)
    return LengthBounds(*jnp.where(jnp.any(is_group), quantiles, 0))


def length_filter(
    length: Array, group: Array, valid: Array | None = None, *, bounds: LengthBounds
) -> tuple[Array, Metrics]:
    """PGPO's filter by length: of the prompts, the short and the long ones, not the middle nor the longest.

    kept where L < Q_low or Q_high < L < Q_top, L the mean length of a prompt's responses

    Example:
      >>> length, group = jnp.array([1.0, 3.0, 5.0, 7.0]), jnp.arange(4)
      >>> bounds = LengthBounds(jnp.array(2.0), jnp.array(4.0), jnp.array(6.0))
      >>> length_filter(length, group, bounds=bounds)[0].tolist()
      [True, False, True, False]

    Args:
      length, group, valid: as `length_quantiles`.
      bounds: of `length_quantiles`, over the whole batch.

    Returns:
      kept: bool[N] rows to learn from, whole groups of the valid ones.
      metrics: `length_filter/kept`, share of the groups.

    Raises:
      ValueError: shapes that differ.

    References:
      2604.20755, after 2510.01459.
    """
    mean, is_group, ids, valid = _group_lengths(length, group, valid)
    kept = (mean < bounds.low) | ((mean > bounds.high) & (mean < bounds.top))
    return kept[ids] & valid, {"length_filter/kept": masked_sum(kept, is_group)}
