"""The clamp and the statistics of ratios."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import finalize, log_ratio, ratio_statistics, sequence_log_ratio

ONES = jnp.ones((1, 4), bool)


def test_clamp_has_gradient_one_inside_and_zero_outside():
    """The bound itself is inside."""
    d = jnp.array([[-21.0, -20.0, 20.0, 20.5]])
    total = lambda logp: jnp.sum(log_ratio(logp, jnp.zeros((1, 4)), ONES)[0])  # noqa: E731
    value, metrics = log_ratio(d, jnp.zeros((1, 4)), ONES)
    assert value.tolist() == [[-20, -20, 20, 20]]
    assert jax.grad(total)(d).tolist() == [[0, 1, 1, 0]]
    assert finalize(metrics) == {"clamped_ratio": 0.5}


def test_clamp_is_an_option():
    value, metrics = log_ratio(jnp.array([[-3.0, 1.0, 3.0, 0.0]]), jnp.zeros((1, 4)), ONES, clamp=2.0)
    assert value.tolist() == [[-2, 1, 2, 0]]
    assert finalize(metrics) == {"clamped_ratio": 0.5}


def test_infinite_log_ratios_are_clamped_and_nan_is_seen():
    value, _ = log_ratio(jnp.array([[-jnp.inf, jnp.inf, jnp.nan, 0.0]]), jnp.zeros((1, 4)), ONES)
    np.testing.assert_array_equal(value, [[-20, 20, np.nan, 0]])


def test_shares_count_tokens_under_the_mask_alone():
    d = jnp.array([[100.0, 0.0, 100.0, 100.0]])
    mask = jnp.array([[True, True, False, False]])
    assert finalize(log_ratio(d, jnp.zeros((1, 4)), mask)[1]) == {"clamped_ratio": 0.5}


def test_shapes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"logp \(1, 4\), old_logp \(4,\), mask \(1, 4\)"):
        log_ratio(jnp.zeros((1, 4)), jnp.zeros(4), ONES)


def test_statistics_equal_numpy():
    rng = np.random.default_rng(0)
    logp, behaviour = rng.normal(size=(2, 1, 4)).astype(np.float32)
    mask = np.array([[True, False, True, True]])
    w = np.exp((logp.astype(np.float64) - behaviour)[mask])
    expected = {
        "ratio/min": w.min(),
        "ratio/mean": w.mean(),
        "ratio/max": w.max(),
        "effective_sample_size": w.sum() ** 2 / (len(w) * (w**2).sum()),
        "mismatch_kl": (w - 1 - np.log(w)).mean(),
    }
    assert finalize(ratio_statistics(logp, behaviour, mask)) == pytest.approx(expected, rel=1e-5)


def test_equal_policies_give_exactly_no_mismatch():
    logp = -jnp.linspace(0.1, 9, 4)[None]
    expected = dict.fromkeys(("ratio/min", "ratio/mean", "ratio/max", "effective_sample_size"), 1.0)
    assert finalize(ratio_statistics(logp, logp, ONES)) == expected | {"mismatch_kl": 0.0}


def test_effective_size_of_one_dominant_token_is_its_share():
    """w = (e^20, 1, 1, 1): (e^20 + 3)² / (4·(e^40 + 3)) = 1/4 to 1e-8."""
    d = jnp.array([[20.0, 0.0, 0.0, 0.0]])
    assert finalize(ratio_statistics(d, jnp.zeros((1, 4)), ONES))["effective_sample_size"] == pytest.approx(
        0.25
    )


def test_mismatch_kl_estimates_the_kl_from_behaviour_to_trainer():
    """The expectation over the behaviour's own distribution, enumerated: Σ b·k3 = KL(b‖π)."""
    with jax.enable_x64(True):
        b, p = jnp.array([0.5, 0.2, 0.2, 0.1]), jnp.array([0.1, 0.3, 0.2, 0.4])
        each = [
            ratio_statistics(jnp.log(p)[None], jnp.log(b)[None], ONES & (jnp.arange(4) == i))
            for i in range(4)
        ]
        expected = float(jnp.sum(b * jnp.log(b / p)))
        got = sum(float(b[i]) * finalize(each[i])["mismatch_kl"] for i in range(4))
        assert got == pytest.approx(expected, rel=1e-12)


def test_small_mismatch_survives_float32():
    """At d = 1e-4 the value is d²/2 = 5e-9, a tenth of the spacing of float32 numbers around 1."""
    d = jnp.full((1, 4), 1e-4)
    assert finalize(ratio_statistics(d, jnp.zeros((1, 4)), ONES))["mismatch_kl"] == pytest.approx(
        5e-9, rel=0.01
    )


def test_statistics_carry_no_gradient():
    total = lambda logp: sum(m[0] for m in ratio_statistics(logp, logp - 1, ONES).values())  # noqa: E731
    assert jax.grad(total)(jnp.zeros((1, 4))).tolist() == [[0, 0, 0, 0]]


def test_sequences_average_before_the_clamp():
    """Rows (30, −10), (50, .), (.) without a token, at a clamp of 20: means 10, 50 → 20, and 0."""
    d = jnp.array([[30.0, -10.0], [50.0, jnp.nan], [jnp.inf, jnp.nan]])
    mask = jnp.array([[True, True], [True, False], [False, False]])
    for form, share in {"sequence": 0.5, "token": 1.0}.items():
        total = lambda x: jnp.sum(sequence_log_ratio(x, jnp.zeros((3, 2)), mask, form=form)[0][:, 0])  # noqa: B023, E731
        value, metrics = sequence_log_ratio(d, jnp.zeros((3, 2)), mask, form=form)
        assert value[:, 0].tolist() == [10, 20, 0]
        assert finalize(metrics) == pytest.approx({"clamped_ratio": 1 / 3})  # one of three tokens
        assert jax.grad(total)(d).tolist() == [[share, 1 - share if share < 1 else 0], [0, 0], [0, 0]]
    with pytest.raises(ValueError, match="form 'row'; one of sequence, token"):
        sequence_log_ratio(d, d, mask, form="row")
