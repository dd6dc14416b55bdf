"""Divergences of whole distributions: against their definitions in float64, and what must hold of them."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_kernels.linear_distribution import linear_gather, linear_kl, linear_top_k
from jaxrl_llm.losses import (
    aopd_top_k_kl,
    finalize,
    forward_kl,
    gathered_top_k_kl,
    generalized_jsd,
    reverse_kl,
    top_k_kl,
)

ROWS, VOCAB = 3, 12
MASK = np.ones((1, ROWS), bool)


def logits_of(seed, size=2.0, vocab=VOCAB, dtype=np.float64):
    """Of a student and a teacher, [1, 3, V]."""
    return np.random.default_rng(seed).normal(size=(2, 1, ROWS, vocab)).astype(dtype) * size


def log_softmax(z):
    z = np.asarray(z, np.float64)
    return z - np.log(np.sum(np.exp(z), axis=-1, keepdims=True))


def kl(log_p, log_q):
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


@cache
def compiled(function, options):
    def total(x, *rest):
        loss, _ = function(x, *rest, MASK, **dict(options))
        return jnp.sum(loss), loss

    return jax.jit(jax.grad(total, has_aux=True))


def run(function, *arrays, **options):
    """The losses, and the gradient of their sum by the first array, in the arrays' precision."""
    with jax.enable_x64(arrays[0].dtype == np.float64):
        gradient, loss = compiled(function, tuple(options.items()))(*arrays)
    return np.asarray(loss), np.asarray(gradient)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_forward_kl_and_its_gradient(temperature):
    """(p − q)/T, the temperature being on both sides."""
    z, teacher = logits_of(0)
    log_p, log_q = log_softmax(z / temperature), log_softmax(teacher / temperature)
    loss, gradient = run(forward_kl, z, teacher, temperature=temperature)
    np.testing.assert_allclose(loss, kl(log_q, log_p), rtol=1e-12)
    np.testing.assert_allclose(gradient, (np.exp(log_p) - np.exp(log_q)) / temperature, atol=1e-13)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_reverse_kl_and_its_gradient(temperature):
    """p·(log p − log q − KL)/T."""
    z, teacher = logits_of(1)
    log_p, log_q = log_softmax(z / temperature), log_softmax(teacher / temperature)
    loss, gradient = run(reverse_kl, z, teacher, temperature=temperature)
    wanted = kl(log_p, log_q)
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)
    np.testing.assert_allclose(
        gradient, np.exp(log_p) * (log_p - log_q - wanted[..., None]) / temperature, atol=1e-13
    )


def test_rows_have_their_own_temperature():
    z, teacher = logits_of(2, dtype=np.float32)
    z, teacher, mask = z[0][:, None], teacher[0][:, None], jnp.ones((ROWS, 1), bool)  # [3, 1, V]
    both, _ = forward_kl(z, teacher, mask, temperature=jnp.array([0.5, 1.0, 2.0]))
    for i, temperature in enumerate([0.5, 1.0, 2.0]):
        alone, _ = forward_kl(z, teacher, mask, temperature=temperature)
        np.testing.assert_allclose(both[i], alone[i], rtol=1e-5)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_generalized_jsd(beta):
    """Against the definition; at most the entropy of (β, 1−β); its gradient by finite differences."""
    z, teacher = logits_of(3)
    p, q = np.exp(log_softmax(z)), np.exp(log_softmax(teacher))
    log_m = np.log(beta * q + (1 - beta) * p)
    wanted = beta * kl(np.log(q), log_m) + (1 - beta) * kl(np.log(p), log_m)
    loss, gradient = run(generalized_jsd, z, teacher, beta=beta)
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)
    assert np.all(loss <= -beta * np.log(beta) - (1 - beta) * np.log(1 - beta))
    step = np.random.default_rng(0).normal(size=z.shape) * 1e-5
    up, down = (run(generalized_jsd, z + sign * step, teacher, beta=beta)[0] for sign in (1, -1))
    np.testing.assert_allclose(np.sum(up - down), 2 * np.sum(gradient * step), rtol=1e-6)


def test_generalized_jsd_has_both_kls_as_limits():
    """ℓ/β as β → 0, ℓ/(1−β) as β → 1; and it is symmetric in the middle."""
    z, teacher = logits_of(4, size=1.0)
    for beta, share, limit in ((1e-6, 1e-6, forward_kl), (1 - 1e-6, 1e-6, reverse_kl)):
        near, _ = run(generalized_jsd, z, teacher, beta=beta)
        np.testing.assert_allclose(near / share, run(limit, z, teacher)[0], rtol=1e-4)
    there, back = (run(generalized_jsd, *pair)[0] for pair in ((z, teacher), (teacher, z)))
    np.testing.assert_allclose(there, back, rtol=1e-12)


EVERY = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "jsd": generalized_jsd,
    "top k": partial(top_k_kl, k=3),
    "top k reverse": partial(top_k_kl, k=3, direction="reverse"),
}


@pytest.mark.parametrize("name", EVERY)
def test_no_divergence_is_negative(name):
    """Not even by rounding, in float32 between almost equal distributions; and it is 0 between equal ones."""
    z, _ = logits_of(5, dtype=np.float32)
    noise = np.random.default_rng(0).normal(size=z.shape).astype(np.float32)
    function = jax.jit(lambda x, t: EVERY[name](x, t, MASK)[0])
    for size in (0, 1e-4, 1e-2, 1, 100):
        loss = function(z + size * noise, z)
        assert np.all(loss >= 0)
        assert np.all((loss > 0) == (size > 0))


def test_a_small_kl_survives_float32():
    """Against float64: Σ q·(log q − log p) alone would lose all digits to cancellation."""
    z, noise = logits_of(6, dtype=np.float32)
    teacher = (z + 1e-3 * noise).astype(np.float32)
    exact = kl(log_softmax(teacher), log_softmax(z))
    loss, _ = forward_kl(z, teacher, MASK)
    assert np.all(exact < 1e-5)
    np.testing.assert_allclose(loss, exact, rtol=1e-2)


@pytest.mark.parametrize("name", EVERY)
def test_tokens_that_neither_model_may_write(name):
    """Logits of −inf on both sides are tokens that are not there, in value and gradient."""
    z, teacher = logits_of(7)
    padding = np.full((1, ROWS, 2), -np.inf)
    wide, gradient = run(EVERY[name], np.append(z, padding, 2), np.append(teacher, padding, 2))
    loss, wanted = run(EVERY[name], z, teacher)
    np.testing.assert_allclose(wide, loss, rtol=1e-13)
    np.testing.assert_allclose(gradient, np.append(wanted, np.zeros_like(padding), 2), atol=1e-14)


def test_tokens_that_one_model_may_not_write():
    """The student alone may: with q = (1, 0, 0, …) the forward KL is −log p_0, its gradient p − q."""
    teacher = np.where(np.arange(VOCAB) < 1, 0.0, -np.inf) + np.zeros((1, ROWS, 1))
    z, _ = logits_of(8)
    log_p = log_softmax(z)
    loss, gradient = run(forward_kl, z, teacher)
    np.testing.assert_allclose(loss, -log_p[..., 0], rtol=1e-12)
    np.testing.assert_allclose(gradient, np.exp(log_p) - np.exp(teacher), atol=1e-14)
    for x in run(generalized_jsd, z, teacher):
        assert np.all(np.isfinite(x))


@pytest.mark.parametrize("direction, whole", [("forward", forward_kl), ("reverse", reverse_kl)])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), size=st.sampled_from([0.1, 2.0, 8.0]))
def test_top_k_kl_rises_to_the_whole(direction, whole, seed, size):
    """Merging events loses information: at most the whole KL, and no less with more tokens listed."""
    z, teacher = logits_of(seed, size)
    options = {"direction": direction}
    values = [run(top_k_kl, z, teacher, k=k, **options)[0] for k in (1, 4, VOCAB)]
    assert np.all(np.array(values) >= 0)
    assert np.all(np.diff(values, axis=0) >= -1e-13)
    np.testing.assert_allclose(values[-1], run(whole, z, teacher)[0], rtol=1e-12, atol=1e-14)


def listed(z, teacher, k):
    """Log-probs [1, 3, K] of the teacher's top k under both, and where they are."""
    log_p, log_q = log_softmax(z), log_softmax(teacher)
    ids = np.argsort(-log_q, axis=-1, kind="stable")[..., :k]
    is_listed = np.zeros(log_q.shape, bool)
    np.put_along_axis(is_listed, ids, True, axis=-1)
    return *(np.take_along_axis(x, ids, axis=-1) for x in (log_p, log_q)), is_listed


def test_top_k_gradient_is_that_of_merged_events():
    """p_u − q_u for a listed token; p_u·(1 − q̄/p̄) for another."""
    z, teacher = logits_of(8)
    p, q = np.exp(log_softmax(z)), np.exp(log_softmax(teacher))
    _, _, is_listed = listed(z, teacher, 4)
    rest, teacher_rest = (np.sum(np.where(is_listed, 0, x), axis=-1, keepdims=True) for x in (p, q))
    wanted = np.where(is_listed, p - q, p * (1 - teacher_rest / rest))
    np.testing.assert_allclose(run(top_k_kl, z, teacher, k=4)[1], wanted, atol=1e-13)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_tail_from_listed_log_probs_is_that_of_the_logits(direction):
    z, teacher = logits_of(9)
    top_logp, teacher_top_logp, _ = listed(z, teacher, 4)
    from_logits, metrics = top_k_kl(z, teacher, MASK, k=4, direction=direction)
    gathered, same = gathered_top_k_kl(top_logp, teacher_top_logp, MASK, direction=direction)
    np.testing.assert_allclose(gathered, from_logits, rtol=1e-5)
    assert finalize(metrics)["distillation/top_k_mass"] == pytest.approx(
        np.mean(np.exp(teacher_top_logp).sum(-1)), rel=1e-5
    )
    assert finalize(metrics) == pytest.approx(finalize(same), rel=1e-5)


def test_tiny_tails_come_from_the_logits_exactly():
    """The tail's masses are e^−50 and e^−60: 1 − Σ would be 0, or below."""
    z, teacher = np.full((1, ROWS, 4), -50.0), np.full((1, ROWS, 4), -60.0)
    z[..., 0], teacher[..., 0] = 0, 0
    loss, gradient = run(partial(top_k_kl, k=1, direction="reverse"), z, teacher)
    np.testing.assert_allclose(loss, 3 * np.exp(-50) * (10 - 1), rtol=1e-3)  # p̄·ln(p̄/q̄) − p̄, q̄ ≪ p̄
    assert np.all(np.isfinite(gradient))


def test_small_tails_of_listed_log_probs():
    """Against float64; of one token with nearly all the mass a sum of probabilities would leave nothing."""
    teacher = np.array([[[-1e-4, -14.0], [-3e-5, -12.0], [-0.7, -0.8]]])
    student = np.array([[[-4e-3, -11.0], [-2e-6, -16.0], [-0.8, -0.7]]])
    rest, teacher_rest = (np.log(1 - np.exp(x).sum(-1)) for x in (student, teacher))
    wanted = kl(teacher, student) + np.exp(teacher_rest) * (teacher_rest - rest)
    found, _ = run(gathered_top_k_kl, student.astype(np.float32), teacher.astype(np.float32))
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize("function", [gathered_top_k_kl, aopd_top_k_kl])
def test_tails_without_mass(function):
    """Both gone: nothing is added. The student's gone, or tokens that cannot be: finite."""
    student = np.array([[[-1e-7, -20.0], [-0.01, -4.6], [-70.0, -0.1]]], np.float32)
    teacher = np.array([[[0.0, -np.inf], [-0.7, -1.4], [-0.7, -70.0]]], np.float32)
    value, gradient = run(function, student, teacher)
    np.testing.assert_allclose(value[0, 0], 0, atol=1e-6)
    assert np.all(np.isfinite(value)) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize("scale", [None, 1.0])
def test_aopd_form(scale):
    """Gradient scale·(m·p − q·1_S), absolute values at most 2·m·scale in sum; 0 and least at p = q·1_S/m."""
    k = 4
    factor = 1 / k if scale is None else scale
    z, teacher = logits_of(10)
    _, _, is_listed = listed(z, teacher, k)
    p, q = np.exp(log_softmax(z)), np.exp(log_softmax(teacher))
    listed_q = np.where(is_listed, q, 0)
    mass = listed_q.sum(axis=-1, keepdims=True)
    ids = jnp.asarray(np.nonzero(is_listed)[2].reshape(1, ROWS, k))

    def of_logits(x, log_q, mask):
        pair = (jnp.take_along_axis(y, ids, axis=-1) for y in (jax.nn.log_softmax(x), log_q))
        return aopd_top_k_kl(*pair, mask, scale=scale)

    loss, gradient = run(of_logits, z, np.log(q))
    np.testing.assert_allclose(gradient, factor * (mass * p - listed_q), atol=1e-14)
    assert np.all(np.abs(gradient).sum(-1) <= 2 * mass[..., 0] * factor)

    best = np.where(is_listed, np.log(listed_q / mass, where=is_listed, out=np.zeros_like(q)), -800.0)
    least, gradient = run(of_logits, best, np.log(q))
    np.testing.assert_allclose(least, factor * (mass * np.log(mass))[..., 0], rtol=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-13)
    assert np.all(least < 0) and np.all(least < loss)


def test_top_k_of_a_teacher_without_logits():
    """From hidden states: a top k, the student's log-probs at its ids, their KL; at k = V the whole."""
    rng = np.random.default_rng(0)
    hidden, head, teacher_hidden, teacher_head = (
        rng.normal(size=shape).astype(np.float32) for shape in ((6, 4), (20, 4), (6, 3), (20, 3))
    )

    def distance(head):
        q, ids = linear_top_k(teacher_hidden, teacher_head, 20)
        p = linear_gather(hidden, head, ids)
        return jnp.sum(gathered_top_k_kl(p[None], q[None], np.ones((1, 6), bool))[0])

    def whole(head):
        return jnp.sum(linear_kl((hidden, head), (teacher_hidden, teacher_head), direction="forward"))

    got, wanted = (jax.jit(jax.value_and_grad(f))(head) for f in (distance, whole))
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], wanted[1], rtol=1e-4, atol=1e-5)


LOGITS, TOP = jnp.zeros((1, 3, 4)), jnp.zeros((1, 3, 2)) - 1.0


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: forward_kl(LOGITS, LOGITS[..., :3], MASK),
            r"logits \(1, 3, 4\), teacher_logits \(1, 3, 3\)",
        ),
        (lambda: forward_kl(LOGITS[0], LOGITS[0], MASK), r"logits \(3, 4\) must be \[N, T, V\]"),
        (lambda: forward_kl(LOGITS, LOGITS, MASK, temperature=jnp.ones(3)), r"temperature \(3,\)"),
        (lambda: generalized_jsd(LOGITS, LOGITS, MASK, beta=1.5), r"beta=1\.5 must lie in \[0, 1\]"),
        (lambda: top_k_kl(LOGITS, LOGITS, MASK, k=5), r"k=5 must be from 1 to V=4"),
        (lambda: top_k_kl(LOGITS, LOGITS, MASK, k=1, direction="back"), "unknown direction 'back'"),
        (lambda: gathered_top_k_kl(TOP, TOP[..., :1], MASK), r"\(1, 3, 2\), teacher_top_logp \(1, 3, 1\)"),
        (lambda: aopd_top_k_kl(TOP[..., :0], TOP[..., :0], MASK), r"top_logp \(1, 3, 0\).*K > 0"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
