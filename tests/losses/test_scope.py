"""SCOPE: weights of rows within a prompt's right and wrong answers, and the two paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import aggregate, finalize, opd, ppo_clip, scope, scope_weights

GROUP = jnp.array([5, 5, 5, 5, 5, -1, -1, 5])
CORRECT = jnp.array([True, True, True, False, False, False, False, True])
LENGTHS = np.array([3, 1, 2, 4, 2, 3, 1, 0])
"""Of prompt 5: three right rows, two wrong ones, a right one without tokens. Of prompt −1: two wrong rows."""
MASK = jnp.arange(4) < LENGTHS[:, None]
STUDENT = np.array([1.0, 2.0, 1.5, 0.3, 0.6, 0.2, 0.4, 9.0])
TEACHER = np.array([0.1, 0.2, 0.3, 1.0, 3.0, 2.0, 1.0, 9.0])
"""Mean −log-prob of each row under both: the log of its perplexity."""


def tokens_of(mean):
    """f[8, 4] log-probs with these means over the row's tokens, which differ; NaN where masked."""
    spread = np.where(LENGTHS[:, None] > 1, np.arange(4) - (LENGTHS[:, None] - 1) / 2, 0) * 0.1
    return jnp.where(MASK, -mean[:, None] + spread, jnp.nan)


def weights(student=STUDENT, teacher=TEACHER, **options):
    arrays = tokens_of(student), tokens_of(teacher), GROUP, MASK
    return np.asarray(scope_weights(*arrays, correct=CORRECT, scale="one", **options)[0])


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def test_weights_are_powers_of_perplexities():
    """Right rows by the student's, wrong ones by the teacher's inverse; a prompt's path adds up to 1."""
    right = np.exp(STUDENT[:3]) ** 2
    wrong, other = (np.exp(TEACHER[i : i + 2]) ** -2 for i in (3, 5))
    wanted = [*right / right.sum(), *wrong / wrong.sum(), *other / other.sum(), 0]
    np.testing.assert_allclose(weights(temperature=0.5), wanted, rtol=1e-5)


def test_scales():
    """Of 5 and 2 rows with tokens: n·w, |Ω|·w with Ω of 3, 2 and 2 rows; a single row has |Ω|·w = 1."""
    arrays = tokens_of(STUDENT), tokens_of(TEACHER), GROUP, MASK
    (one, metrics), (prompt, _), (path, _) = (
        scope_weights(*arrays, correct=CORRECT, scale=scale) for scale in ("one", "prompt", "path")
    )
    assert finalize(metrics)["scope/correct"] == pytest.approx(3 / 7)
    np.testing.assert_allclose(prompt, one * jnp.array([5, 5, 5, 5, 5, 2, 2, 0]), rtol=1e-6)
    np.testing.assert_allclose(path, one * jnp.array([3, 3, 3, 2, 2, 2, 2, 0]), rtol=1e-6)
    alone, _ = scope_weights(*arrays, correct=CORRECT, valid=jnp.array([True] + [False] * 7), scale="path")
    assert alone.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]


def test_temperature_from_uniform_to_one_hot():
    np.testing.assert_allclose(weights(temperature=1e6)[:7], [1 / 3] * 3 + [1 / 2] * 4, rtol=1e-5)
    hardest_right, likeliest_wrong, other = 1, 3, 6  # perplexities e^2.0 of the student, e^1.0 of the teacher
    wanted = np.isin(np.arange(8), [hardest_right, likeliest_wrong, other])
    np.testing.assert_allclose(weights(temperature=1e-3), wanted, atol=1e-6)


def test_neither_length_nor_a_common_factor_matters():
    """A row of twice the length with the same mean; all of a prompt's perplexities times e^0.7."""
    np.testing.assert_allclose(weights(STUDENT + 0.7, TEACHER + 0.7), weights(), rtol=1e-5)
    twice = [jnp.tile(tokens_of(x), (1, 2)) for x in (STUDENT, TEACHER)]
    w, _ = scope_weights(*twice, GROUP, jnp.tile(MASK, (1, 2)), correct=CORRECT, scale="one")
    np.testing.assert_allclose(w, weights(), rtol=1e-5)


def test_the_released_scripts_turn_the_students_sign():
    """Then easy right answers count more; wrong ones are as before."""
    w = weights(student_sign="released_script")
    np.testing.assert_allclose(w[:3], softmax(-STUDENT[:3]), rtol=1e-5)
    np.testing.assert_array_equal(w[3:], weights()[3:])


def test_weights_are_constants_and_finite():
    def total(x):
        w, _ = scope_weights(x, x, GROUP, MASK, correct=CORRECT, temperature=1e-2)
        return jnp.sum(w**2)

    for size in (1.0, 1000.0):
        value, gradient = jax.value_and_grad(total)(tokens_of(STUDENT * size))
        assert np.isfinite(value) and np.all(gradient == 0)


def test_the_paths():
    """w = 2 and 3, r = 2 at all tokens, x = ln 0.5 − ln 0.125 = 1.3863 on the wrong row.

    right: −2·2 = −4, which is the gradient too; wrong: 3·2·1.3863 = 8.3178, and so is its gradient.
    """
    logp, old_logp, teacher_logp = (jnp.log(jnp.full((2, 1), x)) for x in (0.5, 0.25, 0.125))
    options = {"weights": jnp.array([2.0, 3.0]), "correct": jnp.array([True, False])}

    def total(x):
        loss, metrics = scope(x, old_logp, teacher_logp, jnp.ones((2, 1), bool), **options)
        return jnp.sum(loss), (loss, metrics)

    gradient, (loss, metrics) = jax.grad(total, has_aux=True)(logp)
    np.testing.assert_allclose(loss, [[-4], [8.317766]], rtol=1e-6)
    np.testing.assert_allclose(gradient, loss, rtol=1e-6)
    assert finalize(metrics)["distillation/reverse_kl"] == pytest.approx(2 * 1.386294, rel=1e-6)


def test_where_the_teacher_agrees_wrong_answers_have_no_gradient():
    logp, mask = tokens_of(STUDENT), MASK
    options = {"weights": jnp.ones(8), "correct": CORRECT}
    gradient = jax.grad(lambda x: jnp.sum(scope(x, logp, logp, mask, **options)[0]))(logp)
    np.testing.assert_allclose(gradient, jnp.where(mask & CORRECT[:, None], -1.0, 0.0), rtol=1e-6)


def test_the_released_paths():
    """Weighted NLL on right rows; on wrong ones PPO's clip with A = log π_T − log π_old, and dual clip 3."""
    rng = np.random.default_rng(0)
    logp, old_logp, teacher_logp = -rng.uniform(0, 3, (3, 8, 4)).astype(np.float32)
    w = jnp.arange(8.0)
    loss, _ = scope(
        logp,
        old_logp,
        teacher_logp,
        MASK,
        weights=w,
        correct=CORRECT,
        likelihood="logp",
        correction="ppo_clip",
    )
    clipped, metrics = ppo_clip(logp, old_logp, teacher_logp - old_logp, MASK, delta=3.0)
    assert finalize(metrics)["clip_ratio/dual_mean"] > 0
    wanted = jnp.where(MASK, w[:, None] * jnp.where(CORRECT[:, None], -logp, clipped), 0)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)


def test_the_objective_is_the_mean_over_prompts():
    """Two prompts of 3 rows: (Σ over right rows of w·L_MLE + over wrong rows of w·L_OPD), their mean."""
    rng = np.random.default_rng(1)
    logp, old_logp, teacher_logp = -rng.uniform(0, 1, (3, 6, 4)).astype(np.float32)
    group, correct = jnp.arange(6) % 2, jnp.array([True, True, False, False, True, False])
    mask = jnp.asarray(rng.random((6, 4)) > 0.3).at[:, 0].set(True)
    w, _ = scope_weights(old_logp, teacher_logp, group, mask, correct=correct)
    loss, _ = scope(logp, old_logp, teacher_logp, mask, weights=w, correct=correct)
    total = aggregate(loss, mask, "seq_mean_token_sum")

    r = np.where(mask, np.exp(logp - old_logp), 0)
    likelihood, distillation = -r.sum(1), (r * (logp - teacher_logp)).sum(1)
    perplexity, teacher_perplexity = (
        np.exp(-np.where(mask, x, 0).sum(1) / np.asarray(mask).sum(1)) for x in (old_logp, teacher_logp)
    )
    prompts = []
    for g in (0, 1):
        right, wrong = (np.flatnonzero((group == g) & (correct == side)) for side in (True, False))
        own, teacher = perplexity[right], 1 / teacher_perplexity[wrong]
        prompts.append(own @ likelihood[right] / own.sum() + teacher @ distillation[wrong] / teacher.sum())
    assert float(total.sum / total.weight) == pytest.approx(np.mean(prompts), rel=1e-5)


def test_prompts_of_one_kind_have_one_path():
    """A prompt without right answers is weighted OPD, as here prompt −1."""
    logp, teacher_logp = tokens_of(STUDENT), tokens_of(TEACHER)
    w, _ = scope_weights(logp, teacher_logp, GROUP, MASK, correct=CORRECT)
    loss, _ = scope(logp, logp, teacher_logp, MASK, weights=w, correct=CORRECT)
    plain, _ = opd(logp, logp, teacher_logp, MASK)
    np.testing.assert_allclose(loss[5:7], w[5:7, None] * plain[5:7], rtol=1e-6)


def test_errors_name_the_value():
    arrays = tokens_of(STUDENT), tokens_of(TEACHER), GROUP, MASK
    for options, message in (
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"student_sign": "code"}, "unknown student_sign 'code'"),
        ({"scale": "sum"}, "unknown scale 'sum'"),
        ({"correct": CORRECT[:, None]}, r"correct \(8, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            scope_weights(*arrays, **{"correct": CORRECT} | options)
    for options, message in (
        ({"likelihood": "nll"}, "unknown likelihood 'nll'"),
        ({"correction": "kl"}, "unknown correction 'kl'"),
        ({"weights": jnp.ones((8, 4))}, r"weights \(8, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            scope(*arrays[:2], arrays[1], MASK, **{"weights": jnp.ones(8), "correct": CORRECT} | options)
