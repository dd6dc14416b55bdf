"""`linear_logprob` against logits in full: every body, every option, one device and several."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulation import emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from jaxrl_kernels.linear_logprob import LogprobStats, linear_logprob, pallas_tpu, reference, tiles, xla
from jaxrl_kernels.linear_logprob.tiles import LOWEST, Sums

tiled = functools.partial(linear_logprob, implementation="xla")


def problem(rows, width, vocab, *, seed=0, dtype=jnp.float32, size=2.0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(rows, width)), dtype)
    head = jnp.asarray(rng.normal(size=(vocab, width)) * size / width**0.5, dtype)
    return hidden, head, jnp.asarray(rng.integers(0, vocab, rows), jnp.int32)


def options(rows, vocab, *, seed=1):
    rng = np.random.default_rng(seed)
    return {
        "temperature": jnp.asarray(rng.uniform(0.5, 2, rows), jnp.float32),
        "softcap": 7.0,
        "bias": jnp.asarray(rng.normal(size=vocab), jnp.float32),
    }


def exact(hidden, head, targets, *, temperature=1.0, softcap=None, bias=None):
    """float64 on the same operands: logits [N, V] and the three results."""
    z = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    z = z if bias is None else z + np.asarray(bias, np.float64)
    z = z if softcap is None else softcap * np.tanh(z / softcap)
    z = z / np.broadcast_to(np.asarray(temperature, np.float64), len(z))[:, None]
    peak = z.max(axis=1, keepdims=True)
    lse = peak + np.log(np.exp(z - peak).sum(axis=1, keepdims=True))
    entropy = (np.exp(z - lse) * (lse - z)).sum(axis=1)
    return z, LogprobStats(
        np.take_along_axis(z - lse, np.asarray(targets)[:, None], 1)[:, 0], entropy, lse[:, 0]
    )


def exact_gradients(hidden, head, targets, cotangents):
    """float64, from the closed form, without options."""
    z, stats = exact(hidden, head, targets)
    log_probs = z - stats.lse[:, None]
    g = LogprobStats(*(np.asarray(x, np.float64)[:, None] for x in cotangents))
    dz = -np.exp(log_probs) * (g.logp + g.entropy * (log_probs + stats.entropy[:, None]) - g.lse)
    dz[np.arange(len(z)), np.asarray(targets)] += g.logp[:, 0]
    return dz @ np.asarray(head, np.float64), dz.T @ np.asarray(hidden, np.float64)


def cotangents_of(rows, seed=2):
    return LogprobStats(*jnp.asarray(np.random.default_rng(seed).normal(size=(3, rows)), jnp.float32))


def results_and_gradients(fn, hidden, head, targets, cotangents, *, bias=None, **how):
    """Results, then gradients of hidden, head and bias."""

    @jax.jit
    def run(hidden, head, bias):
        out, vjp = jax.vjp(lambda h, w, b: fn(h, w, targets, bias=b, **how), hidden, head, bias)
        return out, vjp(cotangents)

    return run(hidden, head, bias)


def assert_close(one, other, rtol=2e-5, atol=2e-5):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        scale = max(1.0, float(jnp.max(jnp.abs(y))))
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol * scale)


# the maths of a tile


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40), st.integers(0, 40), st.data())
def test_sums_do_not_depend_on_how_columns_are_cut(values, cut, data):
    """Absorbed in two pieces in either order, the sums are those of all columns at once."""
    target = data.draw(st.integers(0, len(values) - 1))
    z = jnp.asarray(values, jnp.float32)

    def absorb(sums, columns):
        if not len(columns):
            return sums
        sums = tiles.rebase(sums, jnp.maximum(sums.peak, z[columns].max()))
        weight, moment = tiles.terms(z[columns], sums.peak)
        hit = jnp.sum(jnp.where(columns == target, z[columns], 0))
        return Sums(sums.peak, sums.total + weight.sum(), sums.moment + moment.sum(), sums.target + hit)

    empty = Sums(*(jnp.float32(x) for x in (LOWEST, 0, 0, 0)))
    columns = np.arange(len(values))
    whole = tiles.finish(absorb(empty, columns))
    for pieces in ((columns[:cut], columns[cut:]), (columns[cut:], columns[:cut])):
        parts = tiles.finish(functools.reduce(absorb, pieces, empty))
        np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)
        assert parts.logp <= 0
    _, expected = exact(z[None, :], np.eye(len(values)), [target])
    np.testing.assert_allclose(np.stack(whole), np.stack(expected)[:, 0], rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("softcap,scale", [(None, None), (3.0, None), (None, 0.7), (3.0, 0.7)])
def test_gradient_of_logits_is_that_of_the_definition(softcap, scale):
    product = jnp.linspace(-4, 5, 9, dtype=jnp.float32)
    scale = None if scale is None else jnp.full(1, scale, jnp.float32)
    g = LogprobStats(*(jnp.full(1, x, jnp.float32) for x in (0.7, -1.3, 0.4)))
    at_target = jnp.arange(9) == 6

    def definition(product):
        z = tiles.logits(product, None, softcap, scale)
        log_probs = jax.nn.log_softmax(z)
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs)
        stats = LogprobStats(log_probs[6], entropy, jax.nn.logsumexp(z))
        return sum(x * y[0] for x, y in zip(stats, g)), jax.tree.map(lambda x: x[None], stats)

    expected, stats = jax.grad(definition, has_aux=True)(product)
    rows = tiles.coefficients(stats, g, jnp.ones(1, bool), scale, with_entropy=True)
    z = tiles.logits(product, None, softcap, scale)
    np.testing.assert_allclose(tiles.dlogits(z, at_target, rows, softcap, scale), expected, atol=1e-6)


# the whole function, by the body for every platform


@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize("vocab", [97, 32_000, 151_936, 262_144])
def test_equals_the_reference(vocab, implementation):
    hidden, head, targets = problem(6, 16, vocab)
    targets = targets.at[1].set(targets[0]).at[2].set(vocab - 1)  # two alike, and the last column
    how = options(6, vocab)
    run = functools.partial(results_and_gradients, cotangents=cotangents_of(6), **how)
    ours = functools.partial(linear_logprob, implementation=implementation)
    assert_close(run(ours, hidden, head, targets), run(reference.linear_logprob, hidden, head, targets))


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 1100),
    width=st.integers(1, 33),
    vocab=st.integers(1, 5000),
    with_options=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_reference_at_any_size(rows, width, vocab, with_options, seed):
    hidden, head, targets = problem(rows, width, vocab, seed=seed)
    active = jnp.asarray(np.random.default_rng(seed).random(rows) < 0.7)
    how = options(rows, vocab) if with_options else {"temperature": 0.8}
    g = LogprobStats(*(jnp.where(active, x, 0) for x in cotangents_of(rows)))
    run = functools.partial(results_and_gradients, cotangents=g, **how)
    ours, gradients = run(functools.partial(tiled, active=active), hidden, head, targets)
    theirs, expected = run(reference.linear_logprob, hidden, head, targets)
    assert_close(ours, jax.tree.map(lambda x: jnp.where(active, x, 0), theirs))
    assert_close(gradients, expected)


def test_huge_logits_stay_exact():
    """Logits of thousands: the entropy of a few near ties is not lost to cancellation."""
    z = np.array([[4900.0, 4899.0, 4890.0, -5000.0], [-4000.0, -4000.0, -4000.0, -4001.0]])
    stats = tiled(jnp.asarray(z, jnp.float32), jnp.eye(4), jnp.array([1, 3]))
    _, expected = exact(z, np.eye(4), [1, 3])
    for x, y in zip(stats, expected):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)
    gradient = jax.grad(lambda h: sum(x.sum() for x in tiled(h, jnp.eye(4), jnp.array([1, 3]))))
    assert np.isfinite(gradient(jnp.asarray(1e25 * z, jnp.float32))).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 60))
def test_bfloat16_operands_cost_no_accuracy(seed, size):
    """Against float64 of the same operands: the bound of the design, and log-probs that are none positive."""
    hidden, head, targets = problem(64, 128, 1000, seed=seed, dtype=jnp.bfloat16, size=size)
    z, expected = exact(hidden, head, targets)
    bound = 2e-5 * max(1, np.abs(z).max() / 16)
    for fn in (tiled, linear_logprob):  # in tiles, and with so few logits kept
        stats = fn(hidden, head, targets)
        assert np.abs(stats.logp - expected.logp).max() <= bound
        assert np.abs(stats.entropy - expected.entropy).max() <= bound
        assert (stats.logp <= 0).all() and all(x.dtype == jnp.float32 for x in stats)


def gradient_error(gradients, exact):
    return [
        np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y) for x, y in zip(gradients, exact)
    ]


def test_bfloat16_gradients_are_as_good_as_from_float32_logits():
    hidden, head, targets = problem(256, 512, 8192, dtype=jnp.bfloat16)
    g = cotangents_of(256)
    expected = exact_gradients(hidden, head, targets, g)
    _, ours = results_and_gradients(tiled, hidden, head, targets, g)
    _, theirs = results_and_gradients(reference.linear_logprob, hidden, head, targets, g)
    for mine, other in zip(gradient_error(ours[:2], expected), gradient_error(theirs[:2], expected)):
        assert mine <= 1.5 * other


def test_float16_is_upcast():
    hidden, head, targets = problem(8, 16, 97, dtype=jnp.float16)
    stats, (dhidden, dhead, _) = results_and_gradients(tiled, hidden, head, targets, cotangents_of(8))
    assert_close(stats, tiled(hidden.astype(jnp.float32), head.astype(jnp.float32), targets), atol=1e-6)
    assert dhidden.dtype == dhead.dtype == jnp.float16


def test_rows_that_are_not_wanted_are_nothing():
    """Targets outside the vocabulary, and inactive rows with NaN in them, give 0 and no gradient."""
    hidden, head, targets = problem(6, 8, 97)
    hidden = hidden.at[1].set(jnp.nan)
    targets = targets.at[3].set(-100).at[4].set(97)
    active = jnp.arange(6) != 1
    wanted = np.array([True, False, True, False, False, True])
    g = LogprobStats(*(jnp.ones(6) for _ in range(3)))
    fn = functools.partial(tiled, active=active, temperature=jnp.where(active, 1.0, jnp.nan))
    stats, (dhidden, dhead, _) = results_and_gradients(fn, hidden, head, targets, g)
    few, (dfew, dhead_few, _) = results_and_gradients(
        tiled, hidden[wanted], head, targets[wanted], LogprobStats(*(x[wanted] for x in g))
    )
    assert_close([x[wanted] for x in stats], list(few))
    assert_close([dhidden[wanted], dhead], [dfew, dhead_few])
    assert all((x[~wanted] == 0).all() for x in (*stats, dhidden))


def test_no_row_at_all():
    hidden, head, targets = problem(40, 8, 97)
    fn = functools.partial(tiled, active=jnp.zeros(40, bool))
    out = results_and_gradients(
        fn, 1e30 * hidden, head, targets, LogprobStats(*(jnp.ones(40) for _ in range(3)))
    )
    assert all((x == 0).all() for x in jax.tree.leaves(out))


@pytest.mark.parametrize("body", [xla, pallas_tpu])
def test_blocks_without_a_gradient_take_no_step(body):
    """Clipped tokens are known only after the forward pass: their blocks are skipped all the same. The
    infinities that stand there would come out as NaN if they were touched."""
    rows = 6 * 512
    hidden, head, targets = problem(rows, 8, 97)
    touched = jnp.isin(jnp.arange(rows) // 512, jnp.array([1, 3, 4]))
    g = LogprobStats(*(jnp.where(touched, x, 0) for x in cotangents_of(rows)))
    coefficients = tiles.coefficients(tiled(hidden, head, targets), g, touched, None, with_entropy=True)

    def gradients(untouched):
        x = tiles.Operands(jnp.where(touched[:, None], hidden, untouched), head, targets, touched)
        dhidden, dhead, _ = emulated(body.backward)(x, coefficients, softcap=None, head_gradient=True)
        return dhidden[touched], dhead

    for poisoned, clean in zip(gradients(jnp.inf), gradients(0.0)):
        assert np.isfinite(clean).all()
        np.testing.assert_array_equal(poisoned, clean)


def products(fn, *arguments):
    """Matrix products in the program, those of a loop's body counted once."""
    return str(jax.make_jaxpr(fn)(*arguments)).count("dot_general")


def test_a_constant_head_costs_no_product():
    hidden, head, targets = problem(8, 16, 97)

    def loss(hidden, head):
        return tiled(hidden, head, targets).logp.sum()

    def frozen(hidden, head):
        return loss(hidden, jax.lax.stop_gradient(head))

    assert products(jax.grad(loss, (0, 1)), hidden, head) == 1 + 3
    assert products(jax.grad(loss), hidden, head) == 1 + 2
    assert products(jax.grad(frozen), hidden, head) == 1 + 2
    np.testing.assert_array_equal(jax.grad(frozen)(hidden, head), jax.grad(loss)(hidden, head))


def test_no_logits_in_memory():
    rows, width, vocab = 2048, 64, 32_768
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, width), (vocab, width))]
    targets = jnp.zeros(rows, jnp.int32)
    loss = lambda hidden, head: tiled(hidden, head, targets).logp.sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * vocab * 4 / 10
    assert not re.search(rf"\[({rows},{vocab}|{vocab},{rows})\]", compiled.as_text())


def test_under_remat_and_scan():
    """As the trainer uses it: a micro-batch at a time, recomputed backwards."""
    hidden, head, targets = problem(12, 8, 97)

    def loss(fn, head):
        def step(total, piece):
            return total + jax.checkpoint(lambda h, y: fn(h, head, y).logp.sum())(*piece), None

        return jax.lax.scan(step, 0.0, (hidden.reshape(3, 4, 8), targets.reshape(3, 4)))[0]

    assert_close(*(jax.grad(functools.partial(loss, f))(head) for f in (tiled, reference.linear_logprob)))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"hidden": jnp.ones((3, 5))}, r"hidden \(3, 5\) and head \(7, 4\) must be \[N, D\] and \[V, D\]"),
        ({"hidden": jnp.ones((0, 4)), "targets": jnp.zeros(0, int)}, "must not be empty"),
        ({"targets": jnp.zeros(2, int)}, r"targets .*\(2,\) must be integers \[N\], N=3"),
        ({"targets": jnp.zeros(3)}, "must be integers"),
        ({"bias": jnp.ones(4)}, r"bias \(4,\) must be \[V\], V=7"),
        ({"active": jnp.ones(3)}, r"active float32\(3,\) must be bool \[N\]"),
        ({"implementation": "cuda"}, "unknown implementation 'cuda'; one of xla, pallas_tpu"),
        ({"row_axes": ("data",)}, "pass mesh="),
    ],
)
def test_bad_input_is_refused_when_traced(change, message):
    arguments = {"hidden": jnp.ones((3, 4)), "head": jnp.ones((7, 4)), "targets": jnp.zeros(3, int)} | change
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(linear_logprob, **arguments))


# on a mesh


MESHES = {
    "rows and vocabulary, gathered head": ((1, 2, 2), ("data", "fsdp"), "tensor", "fsdp"),
    "copies of the head": ((2, 1, 2), ("data", "fsdp"), "tensor", "fsdp"),
    "both kinds of rows": ((2, 2, 1), ("data", "fsdp"), "tensor", "fsdp"),
    "rows alone": ((4, 1, 1), ("data",), None, None),
    "vocabulary alone": ((1, 1, 4), (), "tensor", None),
}


def mesh_of(sizes):
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize("name", MESHES)
def test_four_devices_compute_what_one_does(name, implementation):
    """Results and gradients: one that is wrong by the number of shards is the usual mistake."""
    sizes, row_axes, vocab_axis, embed_axis = MESHES[name]
    hidden, head, targets = problem(24, 16, 100)
    how = options(24, 100) | {"active": jnp.arange(24) % 5 != 3}
    sharded = functools.partial(
        linear_logprob,
        implementation=implementation,
        mesh=mesh_of(sizes),
        row_axes=row_axes,
        vocab_axis=vocab_axis,
        embed_axis=embed_axis,
    )
    run = functools.partial(results_and_gradients, cotangents=cotangents_of(24), **how)
    assert_close(run(sharded, hidden, head, targets), run(tiled, hidden, head, targets), 1e-5, 2e-6)


def test_a_mesh_without_jit():
    hidden, head, targets = problem(8, 4, 10)
    how = {"mesh": mesh_of((2, 1, 2)), "row_axes": ("data",), "vocab_axis": "tensor"}
    one = jax.grad(lambda h: linear_logprob(h, head, targets, **how).logp.sum())(hidden)
    other = jax.grad(lambda h: linear_logprob(h, head, targets).logp.sum())(hidden)
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_what_is_sent_between_devices():
    """A maximum and a sum of three numbers per row; the hidden gradient's sum; the head's shards."""
    mesh = mesh_of((1, 2, 2))
    put = lambda x, *axes: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*axes)))  # noqa: E731
    hidden, head, targets = problem(24, 16, 100)
    arguments = put(hidden, "fsdp"), put(head, "tensor", "fsdp"), put(targets, "fsdp")

    def loss(hidden, head, targets):
        how = {"mesh": mesh, "row_axes": ("fsdp",), "vocab_axis": "tensor", "embed_axis": "fsdp"}
        # the sum over rows is left to the caller, as is its collective
        return linear_logprob(hidden, head, targets, **how).logp

    def gradients(*arguments):
        out, vjp = jax.vjp(lambda h, w: loss(h, w, arguments[2]), *arguments[:2])
        return out, vjp(jnp.ones(24))

    shardings = (arguments[2].sharding, (arguments[0].sharding, arguments[1].sharding))
    text = jax.jit(gradients, out_shardings=shardings).lower(*arguments).compile().as_text()
    sent = re.findall(r"= ([a-z0-9]+\[[0-9,]*\])\S* (all-reduce|all-gather|reduce-scatter)\(", text)
    assert sorted(sent) == sorted(
        [
            ("f32[12]", "all-reduce"),  # maximum
            ("f32[3,12]", "all-reduce"),  # total, moment, target
            ("f32[12,16]", "all-reduce"),  # dhidden over the vocabulary
            ("f32[16,50]", "all-gather"),  # head
            ("f32[8,50]", "reduce-scatter"),  # its gradient
        ]
    )


@pytest.mark.parametrize(
    "how,message",
    [
        ({"row_axes": ("rows",)}, "must be distinct of"),
        ({"row_axes": ("tensor",), "vocab_axis": "tensor"}, "must be distinct of"),
        ({"embed_axis": "fsdp"}, "embed_axis 'fsdp' must be one of row_axes"),
        ({"row_axes": ("data", "fsdp")}, "N=6 is not divisible by 4"),
        ({"vocab_axis": "fsdp"}, "V=97 is not divisible by 2"),
        ({"row_axes": ("fsdp",), "embed_axis": "fsdp"}, "D=9 is not divisible by 2"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(how, message):
    hidden, head, targets = problem(6, 9, 97)
    with pytest.raises(ValueError, match=message):
        linear_logprob(hidden, head, targets, mesh=mesh_of((2, 2, 1)), **how)
