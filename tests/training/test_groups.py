"""Dynamic sampling: bounded, whole groups, and a defined end when no group differs."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.prompts import Prompt
from jaxrl_llm.rewards.pool import Scores
from jaxrl_llm.rollouts.single_turn import Rollout
from jaxrl_llm.training.groups import DegenerateBatch, collect, differing
from jaxrl_llm.trajectory import Trajectories

G = 2


def batch(rewards: list[list[float]], mark: int, width: int = 4) -> tuple[Rollout, np.ndarray, Scores]:
    """Groups with these rewards; every token of the batch is `mark`."""
    total = np.array(rewards, np.float32).reshape(-1)
    n = len(total)
    zeros = jnp.zeros((n, width))
    t = Trajectories(
        tokens=jnp.full((n, width), mark, jnp.int32),
        lengths=jnp.full(n, width, jnp.int32),
        action_mask=jnp.ones((n, width), bool),
        behaviour_logp=zeros,
        raw_logp=zeros,
        log_kept=zeros,
        temperature=jnp.ones(n),
        finished=jnp.ones(n, bool),
        group=jnp.repeat(jnp.arange(n // G, dtype=jnp.int32), G),
    )
    prompts = [Prompt([1], {"prompt": f"{mark}/{i // G}"}, i // G) for i in range(n)]
    texts = [f"{mark}:{i}" for i in range(n)]
    scores = Scores({"r": total}, {"r": {"timeout": 1}}, np.zeros(n, bool))
    return Rollout(t, prompts, texts, [[mark]] * n), total, scores


def drawer(*batches):
    left = list(batches)
    return lambda: left.pop(0)


def test_one_attempt_takes_what_there_is():
    out = collect(drawer(batch([[0, 0], [0, 1]], 1)), num_groups=2, group_size=G)
    assert out.drawn == 2 and out.kept == 1 and out.valid.all() and len(out.total) == 4


def test_groups_that_differ_are_gathered_and_renumbered():
    out = collect(
        drawer(batch([[0, 0], [0, 1]], 1), batch([[1, 1], [1, 0]], 2, width=6)),
        num_groups=2,
        group_size=G,
        max_attempts=5,
    )
    assert out.total.tolist() == [0, 1, 1, 0] and out.valid.all()
    assert out.rollout.completions == ["1:2", "1:3", "2:2", "2:3"]
    assert [p.row["prompt"] for p in out.rollout.prompts] == ["1/1", "1/1", "2/1", "2/1"]
    assert out.rollout.trajectories.group.tolist() == [0, 0, 1, 1]
    assert out.rollout.trajectories.tokens[:, 0].tolist() == [1, 1, 2, 2]
    assert out.drawn == 4 and out.kept == 2 and out.failures == {"r": {"timeout": 2}}


def test_the_attempts_are_bounded_and_the_rest_is_not_trained_on():
    flat = [[1, 1], [0, 0]]
    out = collect(
        drawer(batch(flat, 1), batch([[0, 1], [0, 0]], 2), batch(flat, 3)),
        num_groups=2,
        group_size=G,
        max_attempts=3,
    )
    assert out.valid.tolist() == [True, True, False, False] and out.total[:2].tolist() == [0, 1]


def test_nothing_differs():
    flat = [[1, 1], [np.nan, 0]]
    draw = [batch(flat, i) for i in range(2)]
    options = {"num_groups": 2, "group_size": G, "max_attempts": 2}
    assert collect(drawer(*draw), on_degenerate="skip", **options) is None
    assert not collect(drawer(*draw), on_degenerate="train", **options).valid.any()
    with pytest.raises(DegenerateBatch, match="none of 4 groups"):
        collect(drawer(*draw), on_degenerate="fail", **options)
    single = dataclasses.replace(collect(drawer(draw[0]), num_groups=2, group_size=G))
    assert single.kept == 0 and single.valid.all()


def test_a_failed_reward_makes_no_group_differ():
    """The row's total lacks a part; the row is not learned from, so the group has nothing to say."""
    rollout, total, scores = batch([[0, 1], [0, 1]], 1)
    scores = dataclasses.replace(scores, failed=np.array([True, False, False, False]))
    for attempts in (1, 2):
        draws = drawer(*[(rollout, total, scores)] * attempts)
        out = collect(draws, num_groups=2, group_size=G, max_attempts=attempts)
        assert out.kept == attempts
    assert out.valid.all() and not out.failed.any()


def test_groups_that_differ():
    total = np.array([1, 1, 0, 1, np.nan, 1, np.nan, np.nan, 0.7, 0.7], np.float32)
    assert differing(total, np.repeat(np.arange(5), 2)).tolist() == [False, True, False, False, False]
    ragged = np.array([2, 2, 2, 5, 5, 5, 5, 9, 7, 7])
    assert differing(total, ragged).tolist() == [True, False, False, False]  # of 2, 5, 7 and 9
