"""Dynamic sampling against its words, for any rewards: how often it draws, what it keeps, how it ends."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.data.prompts import Prompt
from jaxrl_llm.rewards.pool import Scores
from jaxrl_llm.rollouts.single_turn import Rollout
from jaxrl_llm.training.groups import DegenerateBatch, collect
from jaxrl_llm.trajectory import Trajectories

M, G = 2, 2
rewards = st.lists(st.sampled_from([0.0, 0.0, 1.0, np.nan]), min_size=M * G, max_size=M * G)


def batch(total: list[float]) -> tuple[Rollout, np.ndarray, Scores]:
    values = np.array(total, np.float32)
    zeros = jnp.zeros((M * G, 3))
    t = Trajectories(
        tokens=zeros.astype(jnp.int32),
        lengths=jnp.full(M * G, 3),
        action_mask=zeros == 0,
        behaviour_logp=zeros,
        raw_logp=zeros,
        log_kept=zeros,
        temperature=jnp.ones(M * G),
        finished=jnp.ones(M * G, bool),
        group=jnp.repeat(jnp.arange(M, dtype=jnp.int32), G),
    )
    rows = [Prompt([1], {}, 0)] * (M * G), [""] * (M * G), [[1]] * (M * G)
    return Rollout(t, *rows), values, Scores({"r": values}, {"r": {}}, np.zeros(M * G, bool))


def differ(group: list[float]) -> bool:
    return len({x for x in group if not np.isnan(x)}) > 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(rewards, min_size=5, max_size=5), st.integers(1, 5), st.sampled_from(["train", "skip", "fail"])
)
def test_retries_are_bounded_and_end_as_configured(drawn, attempts, on_degenerate):
    calls = 0

    def draw():
        nonlocal calls
        calls += 1
        return batch(drawn[calls - 1])

    options = {"num_groups": M, "group_size": G, "max_attempts": attempts, "on_degenerate": on_degenerate}
    groups, needed = [], 0
    while needed < attempts and sum(map(differ, groups)) < M:  # until there are enough, and never longer
        groups += [drawn[needed][:G], drawn[needed][G:]]
        needed += 1
    good = [group for group in groups if differ(group)]
    if not good and on_degenerate == "fail":
        with pytest.raises(DegenerateBatch, match=f"none of {len(groups)} groups"):
            collect(draw, **options)
    else:
        out = collect(draw, **options)
        assert (out is None) == (not good and on_degenerate == "skip")
        if out is not None:
            assert (out.drawn, out.kept) == (len(groups), len(good)) and len(out.total) == M * G
            rows = out.total.reshape(M, G).tolist()
            if attempts == 1:
                assert out.valid.all()
            else:
                np.testing.assert_array_equal(rows[: len(good)], good[:M])
                assert out.valid.tolist() == [x for row in rows for x in [differ(row)] * G]
    assert calls == needed
