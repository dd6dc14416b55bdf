"""Evaluation without a reward model: how many held-out problems the policy solves."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.data.prompts import Prompt
from jaxrl_llm.data.tokenizers import Tokenizer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.params import Tree
from jaxrl_llm.parallel.sharding import ShardingRules, num_shards
from jaxrl_llm.rewards.pool import RewardPool
from jaxrl_llm.rollouts.single_turn import Rollout, Settings, rollout
from jaxrl_llm.training.rewarding import total_rewards


def wilson(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a proportion (Wilson's score interval): right also near 0 and 1."""
    if not trials:
        return 0.0, 1.0
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: np.ndarray, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of the mean over problems of f64[M] values in [0, 1].

    Wilson's where every value is 0 or 1; else normal, as the values of one problem are not independent.
    """
    if np.all((values == 0) | (values == 1)):
        return wilson(float(values.sum()), len(values), z)
    half = z * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 1.0
    return max(0.0, float(values.mean()) - half), min(1.0, float(values.mean()) + half)


def pass_at_k(correct: np.ndarray, n: int, k: int) -> float:
    """Mean over problems of 1 - C(n-c, k)/C(n, k), unbiased for k ≤ n samples (2107.03374 eq. 1).

    Args:
      correct: i64[M], c: how many of a problem's n samples are right.  n: samples.  k: draws.
    """
    return float(np.mean([1 - math.comb(n - int(c), k) / math.comb(n, k) for c in correct]))


def majority_at_k(answers: Sequence[Sequence[str]], correct: np.ndarray) -> float:
    """Share of problems whose most frequent answer is right; ties share the vote evenly.

    Args:
      answers: M problems × k texts.  correct: bool[M, k].
    """
    solved = []
    for texts, right in zip(answers, correct):
        votes = Counter(text.strip() for text in texts)
        winners = [text for text, count in votes.items() if count == max(votes.values())]
        verdict = {text.strip(): bool(ok) for text, ok in zip(texts, right)}
        solved.append(sum(verdict[text] for text in winners) / len(winners))
    return float(np.mean(solved))


def summarize(scores: np.ndarray, answers: Sequence[Sequence[str]], correct_at: float) -> dict[str, float]:
    """Metrics of M problems × k samples.

    Args:
      scores: f32[M, k] total rewards; NaN counts as 0.  answers: their texts.
      correct_at: the total reward from which a sample counts as solved.

    Returns:
      accuracy (mean over samples of solved) with its 95% interval, mean_score, and for k > 1 pass@k for
      powers of two, maj@k, mean@k.
    """
    scores = np.nan_to_num(scores.astype(np.float64))
    correct = scores >= correct_at - 1e-6
    k = scores.shape[1]
    low, high = mean_interval(correct.mean(axis=1))
    out = {
        "accuracy": float(correct.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "mean_score": float(scores.mean()),
    }
    if k > 1:
        for draws in sorted({2**i for i in range(k.bit_length()) if 2**i <= k} | {k}):
            out[f"pass@{draws}"] = pass_at_k(correct.sum(axis=1), k, draws)
        out[f"maj@{k}"] = majority_at_k(answers, correct)
        out[f"mean@{k}"] = float(correct.mean())
    return out


def evaluate(
    prepared: Tree,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    settings: Settings,
    pool: RewardPool,
    weights: dict[str, float],
    *,
    key: jax.Array,
    batch_prompts: int,
    correct_at: float,
    rules: ShardingRules | None = None,
    tick: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, float], list[Rollout], np.ndarray]:
    """Samples every prompt and scores what comes out.

    Args:
      prepared, cfg, tokenizer, settings, key, rules: as `rollout`.  prompts: M.
      pool, weights: the reward functions, and the weight of each in the total.
      batch_prompts: prompts per batch; without slots the last batch is filled up, so that no shape is
        compiled twice.
      correct_at: as `summarize`.  tick: called with the number of prompts done.

    Returns:
      Metrics `eval/...`, the rollouts, and the total rewards f32[M, k].
    """
    k = settings.num_generations
    rollouts, scores = [], []
    pieces = num_shards("batch", rules)
    batch_prompts = min(batch_prompts, -(-len(prompts) // pieces) * pieces)  # no more than it takes
    for start in range(0, len(prompts), batch_prompts):
        batch = list(prompts[start : start + batch_prompts])
        real = len(batch)
        batch += [batch[-1]] * (0 if settings.slots else batch_prompts - real)
        out = rollout(
            prepared,
            cfg,
            tokenizer,
            batch,
            settings,
            key=key,
            first_uid=start * k,
            rules=rules,
        )
        out = Rollout(
            out.trajectories.take(jnp.arange(real * k)),
            out.prompts[: real * k],
            out.completions[: real * k],
            out.completion_ids[: real * k],
        )
        rollouts.append(out)
        scores.append(total_rewards(pool, weights, out)[0].reshape(real, k))
        tick(start + real)
    texts = [text for out in rollouts for text in out.completions]
    answers = [texts[i : i + k] for i in range(0, len(texts), k)]
    all_scores = np.concatenate(scores)
    metrics = summarize(all_scores, answers, correct_at)
    lengths = np.concatenate([[len(ids) for ids in out.completion_ids] for out in rollouts])
    metrics["completions/mean_length"] = float(lengths.mean())
    return {f"eval/{name}": value for name, value in metrics.items()}, rollouts, all_scores
