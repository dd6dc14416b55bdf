"""DAPO's punishment of overlong answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import overlong_penalty


def test_three_pieces_by_hand():
    """L = 16, c = 4: nothing up to 12, a quarter per token up to 16, −1 from there on."""
    lengths = jnp.array([0, 11, 12, 13, 14, 15, 16, 17, 1000])
    wanted = [0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]
    penalty = jax.jit(lambda x: overlong_penalty(x, 16, 4))(lengths)
    assert penalty.tolist() == wanted and penalty.dtype == jnp.float32
    assert not np.any(np.signbit(penalty[:3]))


def test_a_buffer_of_the_whole_length_grows_from_the_first_token():
    np.testing.assert_allclose(overlong_penalty(jnp.arange(6), 5, 5), -np.arange(6) / 5, rtol=1e-6)


@pytest.mark.parametrize("buffer", [0, -1, 17])
def test_a_bad_buffer_is_named(buffer):
    with pytest.raises(ValueError, match=f"buffer={buffer} .* max_length=16"):
        overlong_penalty(jnp.arange(3), 16, buffer)
