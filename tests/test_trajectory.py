"""The shared type: a pytree whose rows can be taken, widened and joined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.trajectory import Trajectories, concatenate, length_mask, widen


def make(n: int, width: int, start: int = 0) -> Trajectories:
    grid = start + jnp.arange(n * width, dtype=jnp.float32).reshape(n, width)
    return Trajectories(
        tokens=grid.astype(jnp.int32),
        lengths=jnp.full(n, 2, jnp.int32),
        action_mask=length_mask(jnp.full(n, 2), width),
        behaviour_logp=grid,
        raw_logp=grid,
        log_kept=grid,
        temperature=jnp.ones(n),
        finished=jnp.ones(n, bool),
        group=jnp.arange(n, dtype=jnp.int32),
        rewards={"a": jnp.arange(n, dtype=jnp.float32)},
    )


def test_take_and_widen():
    t = make(3, 4)
    picked = t.take(jnp.array([2, 0]))
    assert picked.tokens[:, 0].tolist() == [8, 0] and picked.rewards["a"].tolist() == [2, 0]
    wide = widen(t, 6)
    assert wide.tokens.shape == (3, 6) and not np.any(np.asarray(wide.tokens)[:, 4:])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), widen(wide, 4), t))


def test_concatenate_keeps_groups_apart():
    a, b = make(2, 3), make(3, 5, start=100)
    both = concatenate([a, b])
    assert both.tokens.shape == (5, 5) and both.num_sequences == 5
    assert len(set(both.group.tolist())) == 5
    assert both.tokens[2:, :].tolist() == b.tokens.tolist()
    assert both.completion_lengths.tolist() == [2] * 5


@pytest.mark.parametrize("size", [1, 4])
def test_length_mask(size):
    assert length_mask(jnp.array([0, 1, size]), size).sum(axis=1).tolist() == [0, 1, size]
