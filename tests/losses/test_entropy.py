"""The entropy bonus and its adaptive coefficient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import (
    adaptive_entropy_coefficient,
    adaptive_entropy_init,
    adaptive_entropy_update,
    entropy_bonus,
    finalize,
)


def test_descending_the_bonus_raises_the_entropy():
    def entropy(x):
        return -jnp.sum(jax.nn.softmax(x) * jax.nn.log_softmax(x), axis=-1)

    def bonus(x):
        loss, metrics = entropy_bonus(entropy(x), jnp.ones((1, 1), bool))
        return jnp.sum(loss), metrics

    step = jax.jit(jax.value_and_grad(bonus, has_aux=True))
    logits = jnp.array([[[2.0, 0.0, -1.0]]])
    (loss, metrics), gradient = step(logits)
    assert finalize(metrics)["entropy"] == float(-loss)
    assert step(logits - 0.1 * gradient)[0][0] < loss


def run(entropies, coefficient=0.0, **options):
    """Coefficients in use at every step, the first one before any entropy is known."""
    state, used = adaptive_entropy_init(coefficient), []
    for entropy in entropies:
        used.append(float(adaptive_entropy_coefficient(state)))
        state = jax.jit(lambda s, h: adaptive_entropy_update(s, h, **options))(state, jnp.float32(entropy))
    return [*used, float(adaptive_entropy_coefficient(state))]


def test_the_coefficient_follows_the_entropy():
    """δ = 0.005, target 0.2. c: .01 .015 .02 .015 .01 .015; it is off after the entropies 0.5 and 0.3."""
    np.testing.assert_allclose(
        run([0.1, 0.1, 0.5, 0.3, 0.1], coefficient=0.01), [0.01, 0.015, 0.02, 0, 0, 0.015], atol=1e-7
    )


def test_the_target_itself_is_low():
    assert run([np.float32(0.2)])[-1] == pytest.approx(0.005)


def test_bounds():
    assert run([0.1] * 5, maximum=0.012)[-1] == pytest.approx(0.012)
    state = adaptive_entropy_init(0.004)
    for _ in range(3):
        state = adaptive_entropy_update(state, jnp.float32(1.0))
    assert float(state.coefficient) == 0


def test_a_batch_without_tokens_changes_nothing():
    state = adaptive_entropy_update(adaptive_entropy_init(0.01), jnp.float32(0.1))
    assert adaptive_entropy_update(state, jnp.float32(jnp.nan)) == state


def test_errors_name_the_value():
    state = adaptive_entropy_init()
    with pytest.raises(ValueError, match="step=0 must be above 0"):
        adaptive_entropy_update(state, jnp.float32(0.1), step=0)
    with pytest.raises(ValueError, match=r"minimum=2\.0 at most maximum=1\.0"):
        adaptive_entropy_update(state, jnp.float32(0.1), minimum=2.0)
