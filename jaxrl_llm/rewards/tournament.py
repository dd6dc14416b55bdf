"""Tournament rewards: answers of one prompt ranked by comparing few of them at a time (2605.26958)."""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_log = logging.getLogger(__name__)

Judge = Callable[[list[int], int], Sequence[int]]
"""(places of the answers at one table, k) -> the places of the k best of them, in any order."""


class Tournament(NamedTuple):
    """What a tournament gave, from `tournament_rewards`.

    Attributes:
      rewards: f64[n] in [0, 1].
      points: f64[n] before they are brought to [0, 1].
      judgements: tables judged.
      failures: those of them where the judge failed and winners were drawn at random.
    """

    rewards: np.ndarray
    points: np.ndarray
    judgements: int
    failures: int


def tournament_rewards(
    answers: Sequence[object | None],
    judge: Judge,
    *,
    seed: int,
    group_size: int = 2,
    winners_per_group: int = 1,
    target_finalists: int = 1,
    repeats: int = 4,
    increment: float = 1.0,
    equal_score_reward: float = 0.5,
    attempts: int = 3,
) -> Tournament:
    """Rewards from knock-out tournaments among the answers of one prompt.

    In each of `repeats` tournaments, until `target_finalists` are left: the answers still in are shuffled and
    dealt out to max(1, ⌊alive/group_size⌋) tables in turn; a table's winners get a point each and go on.

      R_i = (points_i − min)/(max − min), or `equal_score_reward` for all if they are equal; 0 if i is missing

    With tables of two and n = 2^D answers, a perfect judge and the k-th best of n: an answer has
    Σ_j C(n−k, 2^j − 1)/C(n−1, 2^j − 1) points per tournament on average, j = 1..D, and every tournament takes
    n − 1 judgements. GRPO's advantages do not depend on `increment`, nor on bringing points to [0, 1].

    Example:
      >>> quality = [0.1, 0.9, 0.3, 0.2]
      >>> best = lambda table, k: sorted(table, key=lambda i: -quality[i])[:k]
      >>> result = tournament_rewards(["a", "b", "c", "d"], best, seed=0)
      >>> float(result.rewards[1]), float(result.rewards[0]), result.judgements  # 4 tournaments of 3
      (1.0, 0.0, 12)

    Args:
      answers: of one prompt; None or blank for a missing one, which takes part all the same.
      judge: any comparator. Whatever it raises, and any other result than k different places of the table,
        is a failure.
      seed: of the shuffles, and so of random winners.
      group_size: answers to a table, at least 2; a table may be larger where they do not divide.
      winners_per_group: of a table, but never all of it.
      target_finalists: answers left at which a tournament ends.
      repeats: tournaments.
      increment: of a point.
      equal_score_reward: where no answer has more points than another, as in a group of one.
      attempts: calls of the judge for one table before winners are drawn at random.

    Returns:
      `Tournament`. Add the reward of the format, 1 if it is kept, before comparing within the group.

    Raises:
      ValueError: a number below its least.

    References:
      2605.26958, from the authors' code.
    """
    if group_size < 2:
        raise ValueError(f"group_size={group_size} must be at least 2")
    for name, value in (
        ("winners_per_group", winners_per_group),
        ("target_finalists", target_finalists),
        ("repeats", repeats),
        ("attempts", attempts),
    ):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    rng = np.random.default_rng(seed)
    points = np.zeros(len(answers))
    judgements = failures = 0
    for _ in range(repeats):
        alive = list(range(len(answers)))
        while len(alive) > target_finalists:
            rng.shuffle(alive)
            tables = max(1, len(alive) // group_size)
            alive, shuffled = [], alive
            for table in (shuffled[first::tables] for first in range(tables)):
                k = min(winners_per_group, len(table) - 1)
                winners = _judged(judge, table, k, attempts)
                judgements += 1
                if winners is None:
                    failures += 1
                    winners = table[:k]  # at random, for the table was shuffled
                points[winners] += increment
                alive += winners
    spread = np.ptp(points) if len(points) else 0.0
    if spread < 1e-12:
        rewards = np.full(len(points), equal_score_reward)
    else:
        rewards = (points - points.min()) / spread
    rewards[[i for i, answer in enumerate(answers) if _is_missing(answer)]] = 0
    return Tournament(rewards, points, judgements, failures)


def _is_missing(answer: object | None) -> bool:
    return answer is None or (isinstance(answer, str) and not answer.strip())


def _judged(judge: Judge, table: list[int], k: int, attempts: int) -> list[int] | None:
    """The k winners of a table; None if the judge fails every time."""
    reason: object = None
    for _ in range(attempts):
        try:
            winners = [int(i) for i in judge(list(table), k)]
        except Exception as error:
            reason = error
            continue
        if len(winners) == len(set(winners)) == k and set(winners) <= set(table):
            return winners
        reason = f"winners {winners} of the table {table}, where {k} were asked for"
    _log.warning("The judge failed %d times, winners are drawn at random: %s", attempts, reason)
    return None
