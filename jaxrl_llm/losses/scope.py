"""SCOPE: the student learns from its right answers and the teacher corrects the wrong ones, by perplexity.

One step; both paths look at one prompt's rows together, so the weights are computed from the global batch:

  weights, metrics = scope_weights(old_logp, teacher_logp, group, mask, correct=rewards >= 1)
  token_loss, more = scope(logp, old_logp, teacher_logp, mask, weights=weights, correct=rewards >= 1)
  loss = aggregate(token_loss, mask, "seq_mean_token_sum")
"""

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, masked, masked_sum
from jaxrl_llm.losses.ratios import Ratio, log_ratio
from jaxrl_llm.losses.segments import segment_ids, segment_max, segment_sum
from jaxrl_llm.losses.surrogates import ppo_clip

STUDENT_SIGNS = ("paper", "released_script")
SCOPE_SCALES = ("prompt", "path", "one")
LIKELIHOODS = ("ratio", "logp")
CORRECTIONS = ("opd", "ppo_clip")


def scope_weights(
    logp: Array,
    teacher_logp: Array,
    group: Array,
    mask: Array,
    *,
    correct: Array,
    valid: Array | None = None,
    temperature: float = 1.0,
    student_sign: str = "paper",
    scale: str = "prompt",
) -> tuple[Array, Metrics]:
    """Weights of rows: right answers the student found hard, and wrong ones the teacher finds plausible.

    right rows of a prompt: w = softmax(−mean_t log π / τ), the student's perplexity to the power 1/τ
    wrong rows of a prompt: w = softmax(+mean_t log π_T / τ), the teacher's to the power −1/τ

    τ → ∞ weighs all alike, τ → 0 picks the row with the largest, or the smallest, perplexity. The length of a
    row does not matter, nor a factor common to a prompt's perplexities.

    Example:
      >>> logp = jnp.log(jnp.array([[0.5], [0.25], [0.5]]))  # perplexities 2 and 4; one wrong row
      >>> weights, _ = scope_weights(
      ...     logp, logp, jnp.zeros(3, int), jnp.ones((3, 1), bool),
      ...     correct=jnp.array([True, True, False]), scale="one",
      ... )
      >>> [round(w, 4) for w in weights.tolist()]
      [0.3333, 0.6667, 1.0]

    Args:
      logp: f[N, T] log-probs (nats) under the student that wrote the rows; constants.
      teacher_logp: f[N, T] log-probs (nats) of the same tokens under the teacher; constants.
      group: i[N] any integers; rows with the same one answer the same prompt. Groups must not be cut.
      mask: bool[N, T] tokens that count; rows without any have no weight.
      correct: bool[N] whether the row's answer is right.
      valid: bool[N] rows that count, for instance those whose reward is a number; None for all.
      temperature: τ above 0; 1 in the paper.
      student_sign: "paper", or "released_script" for the opposite sign on right rows, which the authors'
        scripts set and their ablation finds worse.
      scale: a path's weights, of a prompt with n rows, add up to n (prompt: under seq_mean_token_sum the loss
        is then the paper's mean over prompts, a prompt counting by its rows), to the path's number of rows
        (path: mean 1, as in the released code) or to 1 (one: the paper's w itself).

    Returns:
      weights: f[N] ≥ 0 without gradient, float32 or wider.
      metrics: `scope/correct`, share of the rows on the right path.

    Raises:
      ValueError: shapes that differ, temperature ≤ 0, an unknown sign or scale.

    References:
      2604.10688 eq. 4 and 5.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    if student_sign not in STUDENT_SIGNS:
        raise ValueError(f"unknown student_sign {student_sign!r}; one of {', '.join(STUDENT_SIGNS)}")
    if scale not in SCOPE_SCALES:
        raise ValueError(f"unknown scale {scale!r}; one of {', '.join(SCOPE_SCALES)}")
    check_same_shape(logp=logp, teacher_logp=teacher_logp, mask=mask)
    tokens = jnp.sum(mask, axis=1)
    counts = tokens > 0 if valid is None else (tokens > 0) & valid
    check_same_shape(group=group, correct=correct, counts=counts)

    def mean(x: Array) -> Array:
        return jnp.sum(masked(jax.lax.stop_gradient(x), mask), axis=1) / jnp.maximum(tokens, 1)

    sign = -1 if student_sign == "paper" else 1
    score = jnp.where(correct, sign * mean(logp), mean(teacher_logp)) / temperature
    prompt = segment_ids(group)
    path = segment_ids(2 * prompt + correct)
    highest = segment_max(score, path, counts)[path]
    power = jnp.where(counts, jnp.exp(jnp.where(counts, score - highest, 0)), 0)
    total = segment_sum(power, path, counts)[path]
    weights = power / jnp.where(counts, total, 1)
    if scale != "one":
        ids = prompt if scale == "prompt" else path
        weights *= segment_sum(jnp.ones_like(power), ids, counts)[ids]
    return weights, {"scope/correct": masked_sum(correct, counts)}


def scope(
    logp: Array,
    old_logp: Array,
    teacher_logp: Array,
    mask: Array,
    *,
    weights: Array,
    correct: Array,
    likelihood: str = "ratio",
    correction: str = "opd",
    ratio: Ratio = log_ratio,
) -> tuple[Array, Metrics]:
    """SCOPE's two paths: likelihood of the own right answers, reverse KL to the teacher on wrong ones.

    right rows: ℓ = −w·r                      (maximum likelihood where r = π/π_old is 1)
    wrong rows: ℓ = w·r·sg(log π − log π_T)   (`opd`)

    A prompt without right answers is pure weighted distillation, one without wrong answers pure weighted
    likelihood; where the teacher agrees with the student there is nothing to correct.

    Example:
      >>> logp, teacher_logp = jnp.array([[-1.0], [-1.0]]), jnp.array([[-3.0], [-3.0]])
      >>> loss, _ = scope(
      ...     logp, logp, teacher_logp, jnp.ones((2, 1), bool),
      ...     weights=jnp.array([2.0, 2.0]), correct=jnp.array([True, False]),
      ... )
      >>> loss.tolist()
      [[-2.0], [4.0]]

    Args:
      logp: f[N, T] log-probs (nats) under the student in training.
      old_logp: f[N, T] log-probs (nats) under the student that wrote the rows; constants.
      teacher_logp: f[N, T] log-probs (nats) under the teacher; constants.
      mask: bool[N, T] tokens that count.
      weights: f[N] of `scope_weights`; constants.
      correct: bool[N] whether the row's answer is right.
      likelihood: "ratio", or "logp" for ℓ = −w·log π on right rows.
      correction: "opd", or "ppo_clip" with advantage log π_T − log π_old, ε = 0.2 and dual clip 3 on wrong
        rows. The released code has "logp" and "ppo_clip", and weights of scale "path".
      ratio: the function that makes log r of logp, old_logp and mask (`RATIOS`).

    Returns:
      f[N, T] token loss, 0 where masked, float32 or wider. The paper sums over a row's tokens
      (seq_mean_token_sum). The released code takes the mean over the tokens of each path: aggregate with
      token_mean under `mask & correct[:, None]` and under `mask & ~correct[:, None]`, and add.
      Metrics: `distillation/reverse_kl`, mean over the wrong rows' tokens of r·(log π − log π_T), and the
      ratio's.

    Raises:
      ValueError: shapes that differ, or an unknown likelihood or correction.

    References:
      2604.10688 (the paper calls the second path's divergence a forward KL; from the student's samples it is
      the reverse KL).
    """
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"unknown likelihood {likelihood!r}; one of {', '.join(LIKELIHOODS)}")
    if correction not in CORRECTIONS:
        raise ValueError(f"unknown correction {correction!r}; one of {', '.join(CORRECTIONS)}")
    check_same_shape(logp=logp, old_logp=old_logp, teacher_logp=teacher_logp, mask=mask)
    has_tokens = jnp.any(mask, axis=1)
    check_same_shape(weights=weights, correct=correct, rows=has_tokens)
    d, metrics = ratio(logp, old_logp, mask)
    r = jnp.exp(d)
    own, teacher = masked(logp, mask), masked(jax.lax.stop_gradient(teacher_logp), mask)
    reverse_kl = r * (jax.lax.stop_gradient(own) - teacher)
    right = -r if likelihood == "ratio" else -own
    if correction == "opd":
        wrong = reverse_kl
    else:
        advantages = teacher - masked(jax.lax.stop_gradient(old_logp), mask)
        wrong, _ = ppo_clip(logp, old_logp, advantages, mask, delta=3.0, ratio=ratio)
    is_right = correct[:, None]
    w = masked(jax.lax.stop_gradient(weights), has_tokens)[:, None]
    loss = masked(w * jnp.where(is_right, right, wrong), mask)
    return loss, metrics | {"distillation/reverse_kl": masked_sum(reverse_kl, mask & ~is_right)}
