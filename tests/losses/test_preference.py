"""Preference losses: hand-worked values, closed-form gradients, and what they must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import (
    bradley_terry,
    dpo,
    finalize,
    ipo,
    kto,
    kto_reference_point,
    mpo,
    orpo,
    sequence_logp,
    simpo,
)

LN2, LN3 = np.log(2), np.log(3)


def pairs(*rows):
    """One answer pair per row, as columns of float32, and a mask of all."""
    return [jnp.asarray(x, jnp.float32) for x in zip(*rows)], jnp.ones(len(rows), bool)


def sigma(x):
    return 1 / (1 + np.exp(-x))


def test_values_by_hand():
    """Three pairs (log π_w, log π_l, reference of both), differences x = β(h_w − h_l) at β = ½.

    h = (2 ln 3, 0): x = ln 3     h = 0 both: x = 0     h = (0, 2 ln 3): x = −ln 3
    dpo: −ln ¾ = 0.2877, ln 2, −ln ¼ = 1.3863
    ipo: (2.197225 − 1)² = 1.433347, (0 − 1)² = 1, (−2.197225 − 1)² = 10.222245
    """
    arrays, mask = pairs((2 * LN3, -1, 0, -1), (-4, -3, -4, -3), (-5, 2 * LN3 - 1, -5, -1))
    loss, metrics = dpo(*arrays, mask, beta=0.5)
    np.testing.assert_allclose(loss, [np.log(4 / 3), LN2, np.log(4)], rtol=1e-6)
    assert finalize(metrics) == pytest.approx(
        {"rewards/chosen": LN3 / 3, "rewards/rejected": LN3 / 3, "rewards/margins": 0}
        | {"rewards/accuracies": 1 / 3},
        abs=1e-7,
    )
    loss, metrics = ipo(*arrays, mask, beta=0.5)
    np.testing.assert_allclose(loss, [1.433347, 1, 10.222245], rtol=1e-6)
    assert finalize(metrics)["rewards/chosen"] == pytest.approx(LN3 / 3)


def test_smoothed_labels_by_hand():
    """x = ln 3, ε = 0.1: −0.9·ln ¾ − 0.1·ln ¼ = 0.258914 + 0.138629."""
    arrays, mask = pairs((2 * LN3, 0, 0, 0))
    loss, _ = dpo(*arrays, mask, beta=0.5, label_smoothing=0.1)
    np.testing.assert_allclose(loss, [0.397543], rtol=1e-5)


def test_margins_by_hand():
    """bradley_terry: 3 − 1 − (2 − ln 3) = ln 3.  simpo: 2·(−1 + 2) − (2 − ln 3) = ln 3.  Both −ln ¾."""
    margin = 2 - float(LN3)
    arrays, mask = pairs((3, 1))
    for m in (margin, jnp.array([margin])):
        np.testing.assert_allclose(bradley_terry(*arrays, mask, margin=m)[0], [np.log(4 / 3)], rtol=1e-6)
    arrays, _ = pairs((-1, -2))
    np.testing.assert_allclose(simpo(*arrays, mask, beta=2.0, gamma=margin)[0], [np.log(4 / 3)], rtol=1e-6)


def test_orpo_by_hand():
    """p = ½ and ¼: odds 1 and ⅓, σ(ln 3) = ¾. λ = 0.5: ln 2 − 0.5·ln ¾ = 0.693147 + 0.143841."""
    arrays, mask = pairs((np.log(0.5), np.log(0.25)))
    loss, metrics = orpo(*arrays, mask, beta=0.5)
    np.testing.assert_allclose(loss, [0.836988], rtol=1e-6)
    metrics = finalize(metrics)
    assert metrics["nll"] == pytest.approx(LN2) and metrics["log_odds_chosen"] == pytest.approx(LN3)
    assert metrics["clamped_ratio"] == 0 and metrics["rewards/margins"] == pytest.approx(LN2 / 2)


def test_mpo_by_hand():
    """β = 1, h = (ln 3, −ln 3), δ = ln 3, answers of 4 tokens and log π_w = −2; weights 1, 10, 100.

    preference −ln σ(2 ln 3) = −ln 0.9 = 0.105361
    quality    −ln σ(0) − ln σ(2 ln 3) = 0.693147 + 0.105361
    likelihood 2/4
    """
    arrays, mask = pairs((-2, -2, -2 - LN3, -2 + LN3))
    loss, metrics = mpo(
        *arrays, jnp.array([4]), mask, beta=1.0, weights=(1.0, 10.0, 100.0), reward_shift=float(LN3)
    )
    np.testing.assert_allclose(loss, [0.105361 + 7.985080 + 50], rtol=1e-6)
    assert finalize(metrics)["nll"] == 0.5


def test_kto_by_hand():
    """β = ½, z₀ = 2 and h = 2 + 2 ln 3: σ = ¾. Desirable 3·(1 − ¾), undesirable 2·(1 − ¼)."""
    h = jnp.full(2, 2 + 2 * LN3)
    arrays = h, jnp.zeros(2), jnp.array([True, False]), jnp.array(2.0), jnp.ones(2, bool)
    loss, metrics = kto(*arrays, beta=0.5, desirable_weight=3.0, undesirable_weight=2.0)
    np.testing.assert_allclose(loss, [0.75, 1.5], rtol=1e-6)
    assert finalize(metrics) == pytest.approx({"rewards/chosen": 1 + LN3, "rewards/rejected": 1 + LN3})


def test_ktos_reference_point_is_a_clipped_mean_without_gradient():
    """h = 1, 4, and one that does not count: 2.5; of the negatives 0, not −2.5; of nothing 0."""
    h, zeros, mask = jnp.array([1.0, 4.0, np.nan]), jnp.zeros(3), jnp.array([True, True, False])
    assert kto_reference_point(h, zeros, mask) == 2.5
    assert kto_reference_point(-h, zeros, mask) == 0
    assert kto_reference_point(h, zeros, jnp.zeros(3, bool)) == 0
    assert np.all(jax.grad(kto_reference_point)(h, zeros, mask) == 0)


def test_what_is_good_for_one_label_is_bad_for_the_other():
    """With λ = 1 the desirable and the undesirable loss of an answer add up to 1."""
    h, mask = jnp.linspace(-50, 50, 7), jnp.ones(7, bool)
    total = sum(kto(h, jnp.zeros(7), x, jnp.array(1.0), mask)[0] for x in (mask, ~mask))
    np.testing.assert_allclose(total, 1, rtol=1e-6)


BETA, EPSILON, MARGIN, SHIFT, LENGTHS = 0.3, 0.1, 0.7, 0.4, np.array([3, 5, 1, 9, 2, 4, 8, 6])


def _dpo(w, l, rw, rl):
    x = sigma(-BETA * (w - rw - l + rl))
    return -BETA * x, BETA * x


def _smoothed(w, l, rw, rl):
    x = BETA * (sigma(-BETA * (w - rw - l + rl)) - EPSILON)
    return -x, x


def _ipo(w, l, rw, rl):
    x = 2 * (w - rw - l + rl - 1 / (2 * BETA))
    return x, -x


def _simpo(w, l, rw, rl):
    x = BETA * sigma(MARGIN - BETA * (w - l))
    return -x, x


def _bradley_terry(w, l, rw, rl):
    x = sigma(MARGIN - (w - l))
    return -x, x


def _orpo(w, l, rw, rl):
    odds = [np.exp(p) / (1 - np.exp(p)) for p in (w, l)]
    x = BETA * odds[1] / (odds[0] + odds[1])  # σ(−log-odds ratio)
    return -1 - x / (1 - np.exp(w)), x / (1 - np.exp(l))


def _mpo(w, l, rw, rl):
    preferred, dispreferred = _dpo(w, l, rw, rl)
    chosen = 0.8 * preferred - 0.2 * BETA * sigma(SHIFT - BETA * (w - rw)) - 1 / LENGTHS
    return chosen, 0.8 * dispreferred + 0.2 * BETA * sigma(BETA * (l - rl) - SHIFT)


GRADIENTS = {
    "bradley_terry": (lambda w, l, rw, rl, m: bradley_terry(w, l, m, margin=MARGIN), _bradley_terry),
    "dpo": (lambda *x: dpo(*x, beta=BETA), _dpo),
    "dpo smoothed": (lambda *x: dpo(*x, beta=BETA, label_smoothing=EPSILON), _smoothed),
    "ipo": (lambda *x: ipo(*x, beta=BETA), _ipo),
    "simpo": (lambda w, l, rw, rl, m: simpo(w, l, m, beta=BETA, gamma=MARGIN), _simpo),
    "orpo": (lambda w, l, rw, rl, m: orpo(w, l, m, beta=BETA), _orpo),
    "mpo": (lambda *x: mpo(*x[:4], LENGTHS, x[4], beta=BETA, reward_shift=SHIFT), _mpo),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_closed_form_gradients(name):
    """With respect to the chosen and to the rejected answer's log-prob; the references get none."""
    function, wanted = GRADIENTS[name]
    with jax.enable_x64(True):
        arrays = -np.random.default_rng(0).uniform(0.01, 9, (4, 8))
        mask = jnp.ones(8, bool)

        def total(*x):
            return jnp.sum(function(*x, mask)[0])

        gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(*arrays)
        np.testing.assert_allclose(gradients[:2], wanted(*arrays), rtol=1e-12, atol=1e-15)
        assert np.all(np.array(gradients[2:]) == 0)


def test_closed_form_gradient_of_kto():
    """∓λ·β·σ(1−σ) with σ of β(h − z₀)."""
    with jax.enable_x64(True):
        h, good = np.random.default_rng(1).normal(0, 5, 8), np.arange(8) % 2 == 0
        options = {"beta": BETA, "desirable_weight": 3.0, "undesirable_weight": 2.0}

        def total(h, z):
            return jnp.sum(kto(h, np.zeros(8), good, z, jnp.ones(8, bool), **options)[0])

        gradient, of_z = jax.jit(jax.grad(total, argnums=(0, 1)))(h, 1.5)
        s = sigma(BETA * (h - 1.5))
        np.testing.assert_allclose(gradient, np.where(good, -3, 2) * BETA * s * (1 - s), rtol=1e-12)
        assert of_z == 0


@pytest.mark.parametrize("name", GRADIENTS)
def test_differences_of_a_thousand_nats(name):
    """1000 right or 1000 wrong: finite. DPO's loss is then 0, or β·1000 with the gradient ∓β."""
    function, _ = GRADIENTS[name]
    arrays, mask = pairs(*[(-1, -1001, -1, -1), (-1001, -1, -1, -1)] * 4)

    def total(*x):
        loss, _ = function(*x, mask)
        return jnp.sum(loss), loss

    gradients, loss = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(*arrays)
    assert np.all(np.isfinite(loss)) and np.all(np.isfinite(gradients))
    if name == "dpo":
        np.testing.assert_allclose(loss, [0, 1000 * BETA] * 4, rtol=1e-6)
        np.testing.assert_allclose(gradients, [[0, -BETA] * 4, [0, BETA] * 4], rtol=1e-6)


@pytest.mark.parametrize("p", [0.0, -1e-12, 1e-6])
def test_orpo_of_an_answer_that_is_certain(p):
    """Log-odds are held at 20 (σ = 1 against odds of ⅓): loss −p, gradient −1 by the likelihood alone."""
    arrays, mask = pairs((p, np.log(0.25)))
    value, gradient = jax.value_and_grad(lambda w, l: orpo(w, l, mask)[0][0], argnums=(0, 1))(*arrays)
    np.testing.assert_allclose(value, -p, atol=1e-8)
    np.testing.assert_allclose(np.ravel(gradient), [-1, 0], atol=1e-8)
    assert finalize(orpo(*arrays, mask)[1])["clamped_ratio"] == 1


def test_just_below_the_bound_the_odds_still_have_their_gradient():
    """p = −e^−19: log-odds 19 against 19, so σ = ½, and 1/(1 − e^p) = e^19."""
    p = -np.exp(-19.0)
    arrays, mask = pairs((p, p))
    loss, metrics = orpo(*arrays, mask, beta=1.0)
    np.testing.assert_allclose(loss, [LN2], rtol=1e-6)
    assert finalize(metrics)["clamped_ratio"] == 0
    gradient = jax.grad(lambda w, l: orpo(w, l, mask, beta=1.0)[0][0], argnums=1)(*arrays)
    np.testing.assert_allclose(gradient, [np.exp(19) / 2], rtol=1e-5)


def test_dpo_knows_differences_of_log_ratios_alone():
    """A constant added to both answers of π, or of the reference, or to an answer under both, cancels."""
    rng = np.random.default_rng(2)
    w, l, rw, rl = -rng.uniform(0, 9, (4, 8)).astype(np.float32)
    c = rng.normal(size=8).astype(np.float32)
    mask = jnp.ones(8, bool)
    for function in (dpo, ipo):
        loss = function(w, l, rw, rl, mask)[0]
        for moved in ((w + c, l + c, rw, rl), (w, l, rw + c, rl + c), (w + c, l, rw + c, rl)):
            np.testing.assert_allclose(function(*moved, mask)[0], loss, rtol=2e-5)


def test_swapping_the_answers_of_dpo_costs_their_difference():
    """−log σ(−x) = −log σ(x) + x; at x = 0 it is ln 2, also MPO's first term."""
    rng = np.random.default_rng(3)
    w, l, rw, rl = -rng.uniform(0, 9, (4, 8)).astype(np.float32)
    mask = jnp.ones(8, bool)
    x = 0.1 * (w - rw - l + rl)
    loss, swapped = dpo(w, l, rw, rl, mask)[0], dpo(l, w, rl, rw, mask)[0]
    np.testing.assert_allclose(swapped - loss, x, rtol=1e-4, atol=1e-6)
    at_reference = mpo(w, l, w, l, LENGTHS, mask, weights=(1.0, 0.0, 0.0))[0]
    np.testing.assert_allclose(at_reference, LN2, rtol=1e-6)


def test_ipo_is_done_where_dpo_never_is():
    """h_w − h_l = 1/(2β) = 5: IPO's loss and gradient are 0, DPO still pulls."""
    arrays, mask = pairs((5, 0, 0, 0))
    value, gradient = jax.value_and_grad(lambda w: ipo(w, *arrays[1:], mask)[0][0])(arrays[0])
    assert value == 0 and gradient[0] == 0
    assert jax.grad(lambda w: dpo(w, *arrays[1:], mask)[0][0])(arrays[0])[0] < -0.03


def test_sequences_are_the_same_padded():
    logp, mask = jnp.array([[-1.0, -2.0], [-3.0, 0.0]]), jnp.array([[True, True], [False, False]])
    padded = jnp.pad(logp, ((0, 0), (0, 3)), constant_values=np.nan)
    for normalise, wanted in ((False, [-3, 0]), (True, [-1.5, 0])):
        got = sequence_logp(padded, jnp.pad(mask, ((0, 0), (0, 3))), normalise=normalise)
        np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(sequence_logp(logp, mask, normalise=normalise), wanted)


def test_bad_shapes_are_named():
    x, mask = jnp.zeros((3, 4)), jnp.ones((3, 4), bool)
    with pytest.raises(ValueError, match="sequence_logp"):  # token log-probs are not an answer's
        dpo(x, x, x, x, mask)
    with pytest.raises(ValueError, match=r"ref_logps \(2,\)"):
        ipo(x[:, 0], x[:, 0], x[:2, 0], x[:, 0], mask[:, 0])
    with pytest.raises(ValueError, match=r"margin \(1,\)"):
        bradley_terry(x[:, 0], x[:, 0], mask[:, 0], margin=jnp.zeros(1))
    with pytest.raises(ValueError, match=r"is_desirable \(4,\)"):
        kto(x[:, 0], x[:, 0], mask[0], jnp.array(0.0), mask[:, 0])
    with pytest.raises(ValueError, match=r"chosen_lengths \(4,\)"):
        mpo(x[:, 0], x[:, 0], x[:, 0], x[:, 0], x[0], mask[:, 0])
