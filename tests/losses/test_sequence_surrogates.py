"""GMPO, LUSPO and HACPO: closed forms. (GSPO's own tests stand with those of the other surrogates.)"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import NAN, rows_of

from jaxrl_llm.losses import aggregate, finalize, gmpo, gspo, hacpo, luspo

INFINITE = float("inf")


# GMPO


def test_gmpo_clips_tokens_before_the_mean():
    """ε = ln 2, so ratios are held at 2 for A > 0 and at 1/2 for A < 0.

    ratios 4 and 1/8, A = 3:  √(2·1/8) = 1/2   loss −3/2   gradient 0 and −3/2
    ratios 4 and 1/8, A = −1: √(4·1/2) = √2    loss √2     gradient √2 and 0
    ratio 4 alone, A = 0                       loss 0      gradient 0
    """
    ratios = [[4, 1 / 8, NAN], [4, NAN, 1 / 8], [NAN, 4, NAN]]
    loss, gradient, metrics = rows_of(ratios, [[3], [-1], [0]], gmpo, epsilon=np.log(2))
    np.testing.assert_allclose(loss, [[-1.5, -1.5, 0], [2**0.5, 0, 2**0.5], [0] * 3], rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0, -1.5, 0], [2**0.5, 0, 0], [0] * 3], rtol=1e-6)
    assert metrics == pytest.approx(
        {"clip_ratio/low_mean": 1 / 5, "clip_ratio/high_mean": 1 / 5, "clip_ratio/region_mean": 2 / 5}
        | {"clamped_ratio": 0}
    )


def test_gmpo_weighs_all_tokens_alike():
    """Without a clip every token gets −A·(geometric mean), not its own ratio: (½·2·9·9)^¼ = 3, A = −2."""
    loss, gradient, _ = rows_of([[0.5, 2, 9, 9]], [[-2.0]], gmpo, epsilon=INFINITE)
    np.testing.assert_allclose(loss, [[6.0] * 4], rtol=1e-6)
    np.testing.assert_allclose(gradient, [[6.0] * 4], rtol=1e-6)


def test_gmpo_counts_the_bounds_as_inside():
    d = jnp.array([[0.5, -0.5], [0.5, -0.5]])
    mask, a = jnp.ones((2, 2), bool), jnp.array([[1.0], [-1.0]])
    zeros = jnp.zeros((2, 2))
    gradient = jax.grad(lambda x: jnp.sum(gmpo(x, zeros, a, mask, epsilon=0.5)[0]))(d)
    assert gradient.tolist() == [[-1, -1], [1, 1]]
    assert finalize(gmpo(d, zeros, a, mask, epsilon=0.5)[1])["clip_ratio/region_mean"] == 0


def test_gmpo_clamps_the_mean_and_not_its_tokens():
    """A token at e^60 among four: mean 15, not clamped. Two of them: mean 30, held at 20 without gradient."""
    far, ones = np.exp(60), np.ones(2)
    loss, gradient, metrics = rows_of([[far, 1, *ones], [far, far, *ones]], [[-1], [-1]], gmpo)
    np.testing.assert_allclose(loss[:, 0], [np.exp(15), np.exp(20)], rtol=1e-5)
    np.testing.assert_allclose(gradient[0], [np.exp(15)] * 4, rtol=1e-5)
    assert gradient[1].tolist() == [0] * 4
    assert metrics["clamped_ratio"] == 0.5


# LUSPO


def test_luspo_gives_every_token_the_same_weight():
    """Per row −length·min(s·A, clip(s)·A) under seq_mean_token_sum; its gradient by a token is −s·A.

    Bounds 0.998 and 1.0025. s = 1.002 at length 1 and 4, A = 2 and −1; s = 1.01, A = 1 is clipped.
    """
    s = np.array([1.002, 1.002, 1.01])
    ratios = np.where(np.arange(4) < np.array([[1], [4], [2]]), s[:, None], NAN)
    loss, gradient, _ = rows_of(ratios, [[2], [-1], [1]], luspo)
    np.testing.assert_allclose(np.sum(loss, axis=1), [-2 * 1.002, 4 * 1.002, -2 * 1.0025], rtol=1e-5)
    wanted = np.array([[-2.004, 0, 0, 0], [1.002] * 4, [0] * 4])
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5)
    mask = jnp.asarray(~np.isnan(ratios))
    total = aggregate(jnp.asarray(loss), mask, "seq_mean_token_sum")
    assert float(total.sum / total.weight) == pytest.approx((-2.004 + 4.008 - 2.005) / 3, abs=1e-5)


# HACPO

LOW, OPTIONS = 0.2, {"delta": 0.8, "delta_step": 0.025}  # the lower bound at step 0, and the paper's options


def cross(s, advantages, weight=1.0, **options):
    """Rows of another agent with ratios `s`, of two tokens each (filled up to six rows, for one shape).

    Losses of the rows, gradients of their means by one token, and metrics.
    """
    n, shape = len(s), (6, 2)
    ratios, a = np.ones(6), np.ones((6, 1))
    ratios[:n], a[:n, 0] = s, advantages
    logp, mask = jnp.broadcast_to(np.log(ratios)[:, None] - 1, shape), np.arange(6)[:, None] < [n, n]

    def total(x):
        loss, metrics = hacpo(
            x,
            jnp.full(shape, NAN),  # not read
            jnp.asarray(a),
            mask,
            is_own=jnp.zeros(6, bool),
            source_mean_logp=jnp.full(6, -1.0),
            source_weight=jnp.full(6, weight),
            **OPTIONS | options,
        )
        return jnp.sum(jnp.mean(loss, axis=1)), (loss, metrics)

    gradient, (loss, metrics) = jax.grad(total, has_aux=True)(logp)
    np.testing.assert_array_equal(loss, np.broadcast_to(loss[:, :1], shape))
    np.testing.assert_array_equal(gradient, np.broadcast_to(gradient[:, :1], shape))
    return np.asarray(loss)[:n, 0], np.asarray(gradient)[:n, 0], finalize(metrics)


def test_hacpo_of_one_agent_is_gspo_bit_for_bit():
    rng = np.random.default_rng(0)
    logp, old_logp = -rng.uniform(0, 1, (2, 5, 6)).astype(np.float32)
    a, mask = rng.normal(size=(5, 1)).astype(np.float32), rng.random((5, 6)) > 0.3
    nothing = jnp.full(5, NAN)
    alone = {"is_own": jnp.ones(5, bool), "source_mean_logp": nothing, "source_weight": nothing}

    def result(surrogate, **options):
        def total(x):
            loss, metrics = surrogate(x, old_logp, a, mask, epsilon=0.1, epsilon_high=0.2, **options)
            return jnp.sum(loss * jnp.cos(jnp.arange(6.0))), (loss, metrics)

        gradient, (loss, metrics) = jax.jit(jax.grad(total, has_aux=True))(logp)
        return gradient, loss, finalize(metrics)

    jax.tree.map(np.testing.assert_array_equal, result(hacpo, **alone), result(gspo))


def test_hacpo_on_rows_of_others():
    """Bounds 0.2 and 1, ω = 2, α = 1: loss −c²·2·A.

    s = 0.5, A = 3: inside   loss −0.25·6 = −1.5    gradient of the row mean by one of two tokens −0.75
    s = 0.5, A = −1: inside  loss  0.5              gradient 0.25
    s = 0.1, A = 1: below    loss −0.04·2 = −0.08   none
    s = 3, A = ±1: above     loss ∓2                none, whatever the sign: there is no min
    """
    loss, gradient, metrics = cross([0.5, 0.5, 0.1, 3, 3], [3, -1, 1, 1, -1], weight=2.0)
    np.testing.assert_allclose(loss, [-1.5, 0.5, -0.08, -2, 2], rtol=1e-5)
    np.testing.assert_allclose(gradient, [-0.75, 0.25, 0, 0, 0], rtol=1e-5)
    assert metrics == pytest.approx(
        {"cross/clip_ratio/low_mean": 0.2, "cross/clip_ratio/high_mean": 0.4}
        | {"cross/clip_ratio/region_mean": 0.6, "clamped_ratio": 0}
    )


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
def test_hacpo_cross_gradient(alpha):
    """−c^(α+1)·ω·A·∇log s inside the bounds, 0 outside; ∇log s is 1/2 at each of two tokens."""
    s, a = np.array([0.05, 0.21, 0.6, 0.99, 1.01, 7]), np.array([1.0, -2, 3, -1, 2, -1])
    _, gradient, _ = cross(s, a, weight=1.5, alpha=alpha)
    inside = (s > LOW) & (s < 1)
    np.testing.assert_allclose(gradient, -(s ** (alpha + 1)) * 1.5 * a / 2 * inside, rtol=2e-5)


def test_hacpo_weight_falls_with_alpha():
    s = [0.1, 0.3, 0.6, 0.9, 2.0]
    losses = np.abs([cross(s, 1.0, alpha=alpha)[0] for alpha in (0.0, 0.5, 1.0, 3.0)])
    np.testing.assert_allclose(losses[0], np.clip(s, LOW, 1), rtol=1e-6)  # α = 0: the clipped ratio alone
    assert np.all(np.diff(losses[:, :4], axis=0) < 0) and np.all(losses[:, 4] == 1)


def test_hacpo_bounds_are_inside():
    """At s = 1, where equal agents start, and at the lower bound exactly, the gradient is the whole one."""
    low = float(jnp.exp(jnp.float32(-1) + np.log(0.5) + 1))
    _, gradient, metrics = cross([1.0, 0.5], 1.0, alpha=0.0, delta=1 - low)
    np.testing.assert_allclose(gradient, [-0.5, -0.25], rtol=1e-6)
    assert metrics["cross/clip_ratio/region_mean"] == 0


def test_hacpo_lower_bound_rises_with_the_step():
    """0.2 + 0.025·m: s = 0.5 is inside up to m = 12. From m = 0.8/0.025 = 32 on nothing is, nor s = 1."""
    s = [0.51, 0.9, 1.0]
    learns = {m: (cross(s, 1.0, step=m)[1] != 0).tolist() for m in (0, 12, 13, 28, 29, 32, 33, 100)}
    assert learns == {
        0: [True, True, True],
        12: [True, True, True],
        13: [False, True, True],
        28: [False, True, True],
        29: [False, False, True],
        **{m: [False, False, False] for m in (32, 33, 100)},
    }
    np.testing.assert_allclose(cross(s, 1.0, step=40, alpha=3.0)[0], [-1, -1, -1], rtol=1e-6)


def test_hacpo_compiles_once_for_all_steps():
    x, rows = jnp.zeros((2, 3)), jnp.ones(2)
    options = {"is_own": rows > 0, "source_mean_logp": rows, "source_weight": rows}
    compiled = jax.jit(lambda step: hacpo(x, x, rows[:, None], x == 0, step=step, **options)[0])
    for step in range(3):
        compiled(step)
    assert compiled._cache_size() == 1


def test_hacpo_ratio_takes_each_side_by_its_own_length():
    """Equal means per token make s = 1, whether the text has 4, 2 or 1 tokens here and any number there."""
    mask = jnp.array([[True] * 4, [True, False, True, False], [False, True, False, False]])
    logp, ones = jnp.where(mask, -1.0, NAN), jnp.ones(3)
    loss, _ = hacpo(
        *(logp, logp, ones[:, None], mask), is_own=ones < 0, source_mean_logp=-ones, source_weight=ones
    )
    np.testing.assert_array_equal(loss, -mask.astype(float))


def test_hacpo_normalisation():
    """Two agents with two answers each: twice the mean over all four is J_self + J_cross, each over two."""
    logp = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.9], [0.4, 0.4], [0.3, 0.3]]))
    a, mask, ones = jnp.array([[1.0], [-2], [3], [-1]]), jnp.ones((4, 2), bool), jnp.ones(4)
    options = {"is_own": jnp.arange(4) < 2, "source_mean_logp": jnp.log(ones / 2), "source_weight": ones}
    loss, _ = hacpo(logp, logp, a, mask, **options)
    total = aggregate(loss, mask, "seq_mean_token_mean")
    # own: (−1 + 2)/2; others: s = 0.8 and 0.6, (−0.64·3 + 0.36)/2 = −0.78
    assert float(2 * total.sum / total.weight) == pytest.approx(0.5 - 0.78, rel=1e-6)


def test_hacpo_beyond_the_clamp():
    """With an open lower bound, log s = −50 counts as −20: loss −e^−40 at α = 1, no gradient."""
    loss, gradient, metrics = cross([np.exp(-50), 0.5], 1.0, delta=1.0)
    np.testing.assert_allclose(loss, [-np.exp(-40), -0.25], rtol=1e-4)
    np.testing.assert_allclose(gradient, [0, -0.125], rtol=1e-5)
    assert metrics["clamped_ratio"] == 0.5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"delta": 1.5}, r"delta=1.5 lie in \[0, 1\]"),
        ({"delta_step": -0.1}, "delta_step=-0.1"),
        ({"epsilon": -0.1}, "epsilon=-0.1"),
        ({"is_own": jnp.ones((2, 2), bool)}, r"is_own \(2, 2\).*rows \(2,\)"),
        ({"source_weight": jnp.ones(3)}, r"source_weight \(3,\)"),
    ],
)
def test_hacpo_names_what_is_wrong(options, message):
    x, rows = jnp.zeros((2, 2)), jnp.ones(2)
    arrays = {"is_own": rows > 0, "source_mean_logp": rows, "source_weight": rows}
    with pytest.raises(ValueError, match=message):
        hacpo(x, x, x, x == 0, **arrays | options)


def test_gmpo_names_a_negative_epsilon():
    x = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match="must not be negative"):
        gmpo(x, x, x, x == 0, epsilon=-0.1)
