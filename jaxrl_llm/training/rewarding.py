"""From a rollout to rewards: the host's reward functions, called on rows and their columns."""

import numpy as np

from jaxrl_llm.rewards.pool import RewardPool, Scores, combine
from jaxrl_llm.rollouts.single_turn import Rollout


class RewardError(RuntimeError):
    """No reward can be computed at all, for instance because no worker process starts."""


def columns_of(rollout: Rollout) -> dict[str, list]:
    """Every column of the data, per row; None where a row lacks one that others have."""
    names = {name for prompt in rollout.prompts for name in prompt.row} - {"prompt"}
    return {name: [prompt.row.get(name) for prompt in rollout.prompts] for name in sorted(names)}


def total_rewards(pool: RewardPool, weights: dict[str, float], rollout: Rollout) -> tuple[np.ndarray, Scores]:
    """Scores a rollout by every function.

    Returns:
      f32[N] weighted total (NaN where nothing applied), and the scores of each function.

    Raises:
      RewardError: the pool's processes cannot be started.
    """
    try:
        scores = pool.score(
            [prompt.row["prompt"] for prompt in rollout.prompts],
            rollout.completions,
            rollout.completion_ids,
            columns_of(rollout),
        )
    except RuntimeError as error:
        raise RewardError(str(error)) from error
    return combine(scores.values, weights), scores
