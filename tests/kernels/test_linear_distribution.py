"""Statistics of whole distributions equal their definitions in float64, on one device and on four."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from jaxrl_kernels.linear_distribution import (
    linear_collision,
    linear_gather,
    linear_jsd,
    linear_kl,
    linear_top_k,
    reference,
)
from jaxrl_kernels.linear_logprob import linear_logprob

BETA, TOP, CAP = 0.3, 5, 20.0
"""Of the generalised JSD; k; the teacher's soft cap."""


def single(function, *args):
    """With the arguments of a function of a pair, of which the student counts."""

    def run(student, teacher, ids, *, teacher_softcap=None, **options):
        return function(*student[:2], *args, bias=student[2], **options)

    return run


OURS = {
    "gather": lambda student, teacher, ids, **options: single(linear_gather, ids)(
        student, teacher, ids, **options
    ),
    "top_k": lambda *a, **options: single(linear_top_k, TOP)(*a, **options)[0],
    "forward_kl": lambda s, t, ids, **options: linear_kl(s, t, direction="forward", **options),
    "reverse_kl": lambda s, t, ids, **options: linear_kl(s, t, direction="reverse", **options),
    "jsd": lambda s, t, ids, **options: linear_jsd(s, t, beta=BETA, **options),
    "collision": lambda *a, **options: jnp.stack(single(linear_collision)(*a, **options), axis=1),
}
DEFINED = {
    "gather": lambda p, q, ids: reference.gather(p, ids),
    "top_k": lambda p, q, ids: jax.lax.top_k(p, TOP)[0],
    "forward_kl": lambda p, q, ids: reference.kl(q, p),
    "reverse_kl": lambda p, q, ids: reference.kl(p, q),
    "jsd": lambda p, q, ids: reference.jsd(p, q, BETA),
    "collision": lambda p, q, ids: jnp.stack(reference.collision(p), axis=1),
}
PAIRS = ["forward_kl", "reverse_kl", "jsd"]
DIFFERENTIABLE = ["gather", "top_k", *PAIRS]


def operands(rows, vocab, widths=(8, 5), size=1.0, dtype=np.float32, seed=0):
    """A student, a teacher (hidden, head, bias) of other width, ids some of which are repeated or outside."""
    rng = np.random.default_rng(seed)
    pair = tuple(
        (
            jnp.asarray(rng.normal(size=(rows, width)) * size, dtype),
            jnp.asarray(rng.normal(size=(vocab, width)), dtype),
            jnp.asarray(rng.normal(size=vocab), np.float32),
        )
        for width in widths
    )
    ids = rng.integers(-2, vocab + 2, (rows, 4))
    ids[:, 3] = ids[:, 0]
    return *pair, jnp.asarray(ids, np.int32)


def weighted(function, weights):
    """Σ weights·function and its gradients of the first argument."""

    def total(student, *rest):
        value = function(student, *rest)
        return jnp.sum(value * weights.reshape(weights.shape + (1,) * (value.ndim - 1))), value

    return jax.value_and_grad(total, has_aux=True)


def assert_close(got, wanted, tolerance, message="", least=0.0):
    """Difference at most the tolerance times the largest element, or `least` if that is more."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    atol = max(tolerance * np.max(np.abs(wanted)), least)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=atol, err_msg=message)


@functools.cache
def compiled(name, softcap=None):
    return jax.jit(
        lambda student, teacher, ids, weights, **options: weighted(
            lambda *a: OURS[name](*a, softcap=softcap, teacher_softcap=CAP, **options), weights
        )(student, teacher, ids)
    )


@functools.cache
def compiled_definition(name, softcap=None):
    """In float64: the values, their gradients, and each row's largest logit before the temperature."""

    def run(student, teacher, ids, weights, temperature):
        def function(student, teacher):
            p, q = (
                reference.log_probs(*model[:2], bias=model[2], temperature=temperature, softcap=cap)
                for model, cap in ((student, softcap), (teacher, CAP))
            )
            return DEFINED[name](p, q, ids)

        (_, value), gradients = weighted(function, weights)(student, teacher)
        return value, gradients, jnp.max(jnp.abs(student[0] @ student[1].T + student[2]), axis=1)

    return jax.jit(run)


def in_float64(name, student, teacher, ids, weights, temperature=1.0, softcap=None):
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a, np.float64)), (student, teacher, weights, temperature)
        )
        found = compiled_definition(name, softcap)(*wide[:2], ids, *wide[2:])
        return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(("rows", "vocab", "softcap"), [(1, 1000, 6.0), (515, 97, None), (6, 5000, None)])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 99), size=st.sampled_from([0.3, 1.0, 4.0]), data=st.data())
def test_equals_the_definition_in_float64(name, rows, vocab, softcap, seed, size, data):
    """And rows that are not active hold anything: they get 0, no gradient, and add nothing to the head's."""
    student, teacher, ids = operands(rows, vocab, size=size, seed=seed)
    rng = np.random.default_rng(seed)
    weights = jnp.asarray(rng.normal(size=rows), np.float32)
    temperature = jnp.asarray(rng.uniform(0.5, 1.5, rows), np.float32)
    # blocks are of 512 rows: sometimes a whole one is not active
    kind = data.draw(st.sampled_from(["all", "some", "first", "last"]))
    kinds = {"all": rng.random(rows) < 2, "some": rng.random(rows) < 0.5}
    active = kinds.get(kind, (np.arange(rows) < 512) == (kind == "first"))
    wanted, wanted_gradients, largest = in_float64(
        name, student, teacher, ids, np.where(active, weights, 0), temperature, softcap
    )

    garbage = np.where(np.arange(rows)[:, None] % 2 == 0, np.nan, np.inf).astype(np.float32)
    dirty = ((jnp.where(active[:, None], model[0], garbage), *model[1:]) for model in (student, teacher))
    (_, value), gradients = compiled(name, softcap)(
        *dirty, ids, weights, temperature=jnp.where(active, temperature, jnp.nan), active=active
    )
    assert not np.any(value[~active]) and not np.any(gradients[0][~active])
    size = max(1, np.max(largest / temperature) / 16)
    np.testing.assert_allclose(value[active], wanted[active], rtol=1e-6, atol=2e-5 * size)
    if name == "collision":
        assert not any(np.any(part) for part in gradients), "a constant"
        return
    # rounding of logits, times the other factor: JSD's gradient nearly vanishes between strangers
    norm = np.sqrt(np.sum(np.square(weights)))
    least = [np.max(np.abs(weights)) * np.max(np.abs(student[1])), norm * np.max(np.abs(student[0])), norm]
    for part, got, expected, floor in zip(("hidden", "head", "bias"), gradients, wanted_gradients, least):
        assert_close(got, expected, 2e-5, part, least=1e-6 * floor)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "bfloat16") for name in DIFFERENTIABLE), ("gather", "float16")]
)
def test_short_operands_are_accumulated_in_float32(name, dtype):
    student, teacher, ids = operands(9, 2000, (64, 32), size=2.0, dtype=dtype)
    weights = jnp.ones(9)
    (_, value), gradients = compiled(name)(student, teacher, ids, weights)
    wanted, wanted_gradients, largest = in_float64(name, student, teacher, ids, weights)
    assert value.dtype == jnp.float32 and gradients[0].dtype == gradients[1].dtype == dtype
    np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=2e-5 * max(1, largest.max() / 16))
    for got, expected in zip(gradients, wanted_gradients):
        assert_close(got, expected, 2e-2)


@pytest.mark.parametrize("name", OURS)
def test_huge_logits(name):
    """Up to 1e4, where log-sum-exps are good to 1e-3 alone."""
    student, teacher, ids = operands(6, 5000, size=1e3)
    weights, ones, active = jnp.ones(6), jnp.ones(6), np.ones(6, bool)
    run = compiled(name, None)
    (_, value), gradients = run(student, teacher, ids, weights, temperature=ones, active=active)
    wanted, _, largest = in_float64(name, student, teacher, ids, weights, ones)
    assert largest.max() > 5e3
    np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=2e-5 * largest.max() / 16)
    assert all(np.all(np.isfinite(g)) for g in gradients)
    if name in ("gather", "top_k"):
        assert np.all(value <= 0)


@pytest.mark.parametrize("name", PAIRS)
def test_models_that_agree(name):
    """Distances are not negative, 0 from a model to itself, and right to rounding for small ones."""
    student, _, ids = operands(20, 1000, size=2.0)
    rng = np.random.default_rng(1)
    for size in (0.0, 1e-6, 1e-4, 1e-2):
        noise = jnp.asarray(rng.normal(size=student[0].shape) * size, np.float32)
        pair = student, (student[0] + noise, *student[1:])
        (_, value), gradients = compiled(name, CAP)(*pair, ids, jnp.ones(20))
        wanted, _, _ = in_float64(name, *pair, ids, jnp.ones(20), softcap=CAP)
        assert np.all(value >= 0)
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=2e-6)
        if size == 0:
            assert np.all(value <= 1e-6)
            assert all(np.max(np.abs(part)) < 2e-5 for part in gradients)


@pytest.mark.parametrize("name", PAIRS)
def test_the_teacher_is_a_constant(name):
    student, teacher, ids = operands(2, 97)
    gradients = jax.grad(lambda teacher: jnp.sum(OURS[name](student, teacher, ids)))(teacher)
    assert not any(np.any(part) for part in gradients)


def test_closed_forms():
    """Against a uniform teacher KL is ln V − H or a mean of log-probs; between strangers JSD is a coin's."""
    rows, vocab = 5, 130
    student, _, _ = operands(rows, vocab)
    uniform = (jnp.zeros((rows, 1)), jnp.zeros((vocab, 1)))
    column, one = jnp.arange(vocab)[:, None], jnp.ones((rows, 1))
    first, last = (one, jnp.where(column == 0, 200.0, 0.0)), (one, jnp.where(column == vocab - 1, 200.0, 0.0))

    @jax.jit
    def run():
        every = jnp.broadcast_to(jnp.arange(vocab), (rows, vocab))
        return (
            linear_kl(student, uniform, direction="reverse"),
            linear_logprob(*student[:2], jnp.zeros(rows, jnp.int32), bias=student[2]).entropy,
            linear_kl(student, uniform, direction="forward"),
            jnp.mean(linear_gather(*student[:2], every, bias=student[2]), axis=1),
            linear_jsd(first, last, beta=BETA),
            linear_collision(*uniform),
            linear_collision(*first),
        )

    reverse, entropy, forward, mean, jsd, even, certain = run()
    np.testing.assert_allclose(reverse, np.log(vocab) - entropy, atol=1e-5)
    np.testing.assert_allclose(forward, -np.log(vocab) - mean, atol=1e-5)
    np.testing.assert_allclose(jsd, -BETA * np.log(BETA) - (1 - BETA) * np.log(1 - BETA), rtol=1e-6)
    np.testing.assert_allclose(even.probability, 1 / vocab, rtol=1e-6)
    np.testing.assert_allclose(certain.probability, 1, rtol=1e-6)
    np.testing.assert_allclose((even.covariance, certain.covariance), 0, atol=1e-9)


def test_collision_gives_the_change_of_entropy():
    """A step Δz = 1[a] − π changes H by −(π_a·Λ_a − Σπ²·Λ), and has the squared norm 1 − 2π_a + Σπ²."""
    (hidden, head, bias), _, _ = operands(1, 130, size=2.0)

    @jax.jit
    def run(bias):
        stats, back = jax.vjp(lambda bias: linear_logprob(hidden, head, jnp.array([77]), bias=bias), bias)
        zero, one = jnp.zeros(1), jnp.ones(1)
        step, slope = (
            back(stats._replace(logp=a, entropy=b, lse=zero))[0] for a, b in ((one, zero), (zero, one))
        )
        found = linear_collision(hidden, head, bias=bias)
        return stats, jnp.vdot(step, slope), jnp.vdot(step, step), found

    stats, change, norm, found = run(bias)
    pi, surplus = jnp.exp(stats.logp), stats.logp + stats.entropy
    np.testing.assert_allclose(change, -(pi * surplus - found.covariance)[0], rtol=1e-5)
    np.testing.assert_allclose(norm, (1 - 2 * pi + found.probability)[0], rtol=1e-5)
    assert found.covariance > 0


def ties(rows, vocab):
    """Logits that are small integers: exact, and equal in hundreds of columns of every tile."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.integers(-1, 2, (rows, 3)), np.float32)
    return hidden, jnp.asarray(rng.integers(-1, 2, (vocab, 3)), np.float32)


@pytest.mark.parametrize(("vocab", "k"), [(5000, 300), (97, 97)])
def test_top_k_breaks_ties_as_lax_does(vocab, k):
    hidden, head = ties(5, vocab)
    logp, ids = linear_top_k(hidden, head, k)
    wanted, wanted_ids = jax.lax.top_k(hidden @ head.T, k)
    np.testing.assert_array_equal(ids, wanted_ids)
    np.testing.assert_allclose(logp, jax.lax.top_k(reference.log_probs(hidden, head), k)[0], atol=1e-5)
    np.testing.assert_array_equal(np.diff(logp), np.diff(logp[:, :1] + wanted - wanted[:, :1]))


def four(shape):
    return Mesh(np.array(jax.devices()[:4]).reshape(shape), ("data", "tensor"))


LAYOUTS = {
    "all": ((2, 2), {"row_axes": ("data",), "vocab_axis": "tensor", "embed_axis": "data"}),
    "vocabulary": ((1, 4), {"vocab_axis": "tensor"}),
    "rows": ((2, 2), {"row_axes": ("data", "tensor")}),
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, "all") for name in OURS if name != "forward_kl"),
        ("forward_kl", "vocabulary"),
        ("gather", "rows"),
    ],
)
def test_four_devices_equal_one(name, layout):
    """One of them has no active row, and gradients of what they share add up once."""
    student, teacher, ids = operands(8, 4 * 30, (8, 6))
    options = {
        "temperature": jnp.linspace(0.5, 1.5, 8),
        "softcap": 4.0,
        "active": jnp.arange(8) < 6,
    }
    weights = jnp.linspace(-1, 1, 8)
    shape, axes = LAYOUTS[layout]
    one = jax.jit(weighted(lambda *a: OURS[name](*a, **options), weights))
    all_four = jax.jit(weighted(lambda *a: OURS[name](*a, mesh=four(shape), **axes, **options), weights))
    (_, value), gradients = one(student, teacher, ids)
    (_, got), got_gradients = all_four(student, teacher, ids)
    np.testing.assert_allclose(got, value, rtol=1e-6, atol=1e-6)
    for part, a, b in zip(("hidden", "head", "bias"), got_gradients, gradients):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6, err_msg=part)


def test_top_k_over_shards_breaks_ties_as_lax_does():
    """k is larger than a shard of the vocabulary; and nothing is jitted here."""
    hidden, head = ties(4, 100)
    _, ids = linear_top_k(hidden, head, 60, mesh=four((1, 4)), vocab_axis="tensor")
    np.testing.assert_array_equal(ids, jax.lax.top_k(hidden @ head.T, 60)[1])


def test_ids_outside_the_vocabulary():
    student, _, _ = operands(2, 97)
    ids = jnp.array([[-100, 97], [2**31 - 1, 3]])
    run = jax.jit(weighted(lambda hidden: linear_gather(hidden, student[1], ids), jnp.ones(2)))
    (_, value), gradient = run(student[0])
    np.testing.assert_array_equal(value == 0, [[True, True], [True, False]])
    np.testing.assert_array_equal(np.any(gradient, axis=1), [False, True])


@pytest.mark.parametrize("name", OURS)
def test_memory_does_not_grow_with_the_vocabulary(name):
    rows, width, vocab = 1024, 64, 262_144
    model = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, width), (vocab, width))]
    model.append(jax.ShapeDtypeStruct((vocab,), jnp.float32))
    ids = jax.ShapeDtypeStruct((rows, 4), jnp.int32)
    program = jax.jit(weighted(OURS[name], jnp.ones(rows))).lower(model, model, ids).compile()
    assert not re.search(rf"\[({rows},{vocab}|{vocab},{rows})\]", program.as_text())
    logits = rows * vocab * 4
    assert program.memory_analysis().temp_size_in_bytes < logits / 50


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_frozen_head_costs_no_product(name):
    student, teacher, ids = operands(4, 97)

    def products(*wanted):
        def total(*parts):
            return jnp.sum(OURS[name]((*parts, *student[len(parts) :]), teacher, ids))

        return str(jax.make_jaxpr(jax.grad(total, wanted))(*student[: len(wanted)])).count("dot_general")

    assert products(0) == products(0, 1) - 1


@pytest.mark.parametrize("name", OURS)
def test_lowers_for_accelerators(name):
    run = jax.jit(weighted(OURS[name], jnp.ones(4)))
    assert run.trace(*operands(4, 97)).lower(lowering_platforms=("tpu", "cuda")).as_text()


HIDDEN, HEAD = jnp.ones((4, 3)), jnp.ones((6, 3))
PAIR = (HIDDEN, HEAD)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_gather(HIDDEN, HEAD[:, :2], jnp.zeros((4, 1), int)), r"\(6, 2\) must be \[N, D\]"),
        (lambda: linear_gather(HIDDEN, HEAD, jnp.zeros((4, 1))), r"ids float32\(4, 1\) must be integers"),
        (
            lambda: linear_gather(HIDDEN, HEAD, jnp.zeros(4, int)),
            r"ids int32\(4,\) must be integers \[N, K\]",
        ),
        (lambda: linear_collision(HIDDEN, HEAD, bias=jnp.ones(5)), r"bias \(5,\) must be \[V\], V=6"),
        (lambda: linear_collision(HIDDEN, HEAD, active=jnp.ones(4)), r"active float32\(4,\) must be bool"),
        (lambda: linear_top_k(HIDDEN, HEAD, 7), r"k=7 must be from 1 to V=6"),
        (lambda: linear_top_k(HIDDEN, HEAD, 0), r"k=0 must be from 1 to V=6"),
        (
            lambda: linear_kl(PAIR, PAIR, direction="backward"),
            r"'backward' must be \"forward\" or \"reverse\"",
        ),
        (lambda: linear_kl(PAIR, (HIDDEN, HEAD[:5]), direction="forward"), r"the same V, not 6 and 5"),
        (lambda: linear_kl(PAIR, (HIDDEN[:2], HEAD), direction="forward"), r"the same N, not 4 and 2"),
        (lambda: linear_kl((HIDDEN,), PAIR, direction="forward"), r"student must be \(hidden, head\)"),
        (lambda: linear_jsd(PAIR, PAIR, beta=1.0), r"beta=1.0 must be in \(0, 1\).*linear_kl"),
        (lambda: linear_top_k(HIDDEN, HEAD, 1, vocab_axis="tensor"), r"pass mesh="),
        (
            lambda: linear_top_k(HIDDEN, HEAD, 1, mesh=four((1, 4)), vocab_axis="tensor"),
            r"V=6 is not divisible by 4",
        ),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
