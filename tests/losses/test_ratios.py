"""The clamp and the statistics of ratios, and TRRD's anchor between the old policy and a teacher."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import (
    RATIOS,
    finalize,
    log_ratio,
    ppo_clip,
    ratio_statistics,
    sequence_log_ratio,
    trrd_log_ratio,
)

ONES = jnp.ones((1, 4), bool)
ZEROS = jnp.zeros((1, 4))


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


def test_a_sequence_may_have_an_upper_clamp_of_its_own():
    """verl's: at most 10, no lower bound. Means 12 → 10, 10 and −500 as they are."""
    d, mask = jnp.array([[14.0, 10], [10, 10], [-1000, 0]]), jnp.ones((3, 2), bool)
    clamps = {"clamp": float("inf"), "clamp_high": 10.0}
    value, metrics = sequence_log_ratio(d, jnp.zeros((3, 2)), mask, **clamps)
    assert value[:, 0].tolist() == [10, 10, -500]
    assert finalize(metrics) == {"clamped_ratio": pytest.approx(1 / 3)}
    total = lambda x: jnp.sum(sequence_log_ratio(x, jnp.zeros((3, 2)), mask, **clamps)[0])  # noqa: E731
    assert jax.grad(total)(d).tolist() == [[0, 0], [0.5, 0.5], [0.5, 0.5]]


# TRRD


def random_policies(scale=1.0):
    """Log-probs of student, old policy and teacher, f32[1, 4] each."""
    return scale * np.random.default_rng(1).normal(size=(3, 1, 4)).astype(np.float32)


def value_and_gradient(loss):
    """Of a function of logp whose first result is an array, at a student's log-probs."""
    return lambda x: (loss(x), jax.grad(lambda y: jnp.sum(jnp.sin(loss(y))))(x))


def test_trrd_is_between_old_policy_and_teacher():
    """α = 1/4, clamp 1; to the old policy 2, −4, 2, to the teacher 0.5, 0.5, 3:

    2/4 + 0.5·3/4 = 0.875, −4/4 + 0.375 = −0.625, 2/4 + 1·3/4 = 1.25; the third is clamped.
    """
    teacher = jnp.array([[-0.5, -0.5, -3, jnp.nan]])
    old, mask = jnp.array([[-2.0, 4, -2, 0]]), jnp.array([[True, True, True, False]])
    d, metrics = trrd_log_ratio(ZEROS, old, mask, teacher_logp=teacher, alpha=0.25)
    assert d.tolist() == [[0.875, -0.625, 1.25, 0]]
    assert finalize(metrics) == pytest.approx({"clamped_ratio": 0, "teacher_clamped_ratio": 1 / 3})


@pytest.mark.parametrize("teacher_logp", [-3.0, -np.inf, 0.0])
def test_trrd_at_alpha_1_is_the_token_ratio_bit_for_bit(teacher_logp):
    """Loss and gradient of GRPO, whatever the teacher says."""
    logp, old, a = random_policies()
    ratio = partial(RATIOS["trrd"], teacher_logp=jnp.full((1, 4), teacher_logp), alpha=1.0)
    method, reference = (
        value_and_gradient(lambda x, r=r: ppo_clip(x, old, a, ONES, ratio=r)[0]) for r in (ratio, log_ratio)
    )
    jax.tree.map(np.testing.assert_array_equal, method(logp), reference(logp))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9])
def test_trrd_with_a_teacher_like_one_of_the_policies(alpha):
    """Like the old policy: the token ratio inside the clamp. Like the student: (π/π_old)^α."""
    logp, old, _ = random_policies(0.3)
    d = trrd_log_ratio(logp, old, ONES, teacher_logp=old, alpha=alpha)[0]
    assert np.max(np.abs(logp - old)) < 1
    np.testing.assert_allclose(d, logp - old, rtol=1e-5)
    d = trrd_log_ratio(logp, old, ONES, teacher_logp=logp, alpha=alpha)[0]
    np.testing.assert_allclose(d, alpha * (logp - old), rtol=1e-5)


def test_trrd_falls_as_the_teacher_rises_and_is_bounded():
    """(π/π_old)^α·e^±((1−α)·clamp): flat where the clamp acts, falling between."""
    student, alpha, clamp = -2.0, 0.6, 0.5
    teacher = np.linspace(-4, 0, 17)[None]  # the clamp acts outside −2.5..−1.5
    logp, old = np.full((2, 1, 17), [[[student]], [[-2.3]]])
    d = trrd_log_ratio(logp, old, logp < 0, teacher_logp=teacher, alpha=alpha, clamp=clamp)[0][0]
    step = np.diff(d)
    is_inside = np.abs(student - (teacher[0, 1:] + teacher[0, :-1]) / 2) < clamp
    assert np.all(step[is_inside] < 0) and np.all(step[~is_inside] == 0)
    assert is_inside.sum() == 4
    np.testing.assert_allclose(
        [d[0], d[-1]], alpha * 0.3 + (1 - alpha) * clamp * np.array([1, -1]), rtol=1e-5
    )


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_trrd_gradient_is_1_inside_the_clamp_and_alpha_beyond(alpha):
    """Whatever α inside, the clamp itself included; straight-through: 1 everywhere, and the same values."""
    logp, teacher = jnp.array([[0.5, 1.0, -1.5, 9.0]]), ZEROS

    def d(x, gradient):
        options = {"teacher_logp": teacher, "alpha": alpha, "clamp_gradient": gradient}
        return trrd_log_ratio(x, ZEROS - 0.3, ONES, **options)[0]

    gradients = {
        mode: jax.grad(lambda x, m=mode: jnp.sum(d(x, m)))(logp).tolist()
        for mode in ("differentiable", "straight_through")
    }
    assert gradients == {"differentiable": [[1, 1, alpha, alpha]], "straight_through": [[1, 1, 1, 1]]}
    np.testing.assert_array_equal(d(logp, "differentiable"), d(logp, "straight_through"))


def test_trrd_imitates_selectively_in_the_first_update():
    """π = π_old, α = 1/2: r = e^(±1/2) = 1.649 or 0.607 where the student is far above or below the teacher.

    With the clip 0.2/0.28 and the clamp differentiated, weight of the gradient:
      A > 0: none above the teacher; below it r·α = 0.607/2, never clipped
      A < 0: none below the teacher; above it r·α
      A = 0: exactly none, and no loss
    """
    above, below = -3.0, 3.0  # teacher − student
    teacher = jnp.array([[above, below, above, below, below]])
    a, mask = jnp.array([[1.0, 1, -1, -1, 0]]), jnp.ones((1, 5), bool)
    logp = jnp.zeros((1, 5))
    ratio = partial(trrd_log_ratio, teacher_logp=teacher)
    loss = lambda x: ppo_clip(x, logp, a, mask, epsilon_high=0.28, ratio=ratio)[0]  # noqa: E731
    gradient = jax.grad(lambda x: jnp.sum(loss(x)))(logp)
    high, low = np.exp(0.5), np.exp(-0.5)
    np.testing.assert_allclose(gradient, [[0, -low / 2, high / 2, 0, 0]], rtol=1e-6)
    assert float(loss(logp)[0, 4]) == 0 and float(gradient[0, 4]) == 0


def test_trrd_without_the_clamp_is_held_as_a_whole():
    """To the old policy 10, to the teacher 60 and 10: means 35 → 20, and 10."""
    logp, teacher = jnp.full((1, 2), 10.0), jnp.array([[-50.0, 0.0]])
    zeros, ones = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    options = {"teacher_logp": teacher, "clamp": float("inf")}
    d, metrics = trrd_log_ratio(logp, zeros, ones, **options)
    assert d.tolist() == [[20, 10]]
    assert finalize(metrics) == {"clamped_ratio": 0.5, "teacher_clamped_ratio": 0}
    gradient = jax.grad(lambda x: jnp.sum(trrd_log_ratio(x, zeros, ones, **options)[0]))(logp)
    assert gradient.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alpha": 1.5}, r"alpha=1.5 must lie in \[0, 1\]"),
        ({"clamp": -1.0}, "clamp=-1.0 must not be negative"),
        ({"clamp_gradient": "none"}, "clamp_gradient 'none'; one of differentiable, straight_through"),
        ({"teacher_logp": jnp.zeros(4)}, r"teacher_logp \(4,\)"),
    ],
)
def test_trrd_names_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        trrd_log_ratio(ZEROS, ZEROS, ONES, **{"teacher_logp": ZEROS} | options)
