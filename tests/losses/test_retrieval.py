"""Retrieval losses: InfoNCE with its negatives, triplets, and facet divergences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import losses
from jaxrl_llm.losses import finalize, in_batch_negatives, triplet_margin

info_nce = jax.jit(losses.info_nce, static_argnames="temperature")
facet_kl = jax.jit(losses.facet_kl)

# InfoNCE


def test_info_nce_by_hand():
    """τ = ½, e^{s/τ} = s⁺: 2² = 4 against 1² + 3² = 10: −ln(4/14); and 4 against 1: −ln(4/5)."""
    positive, negatives = jnp.log(jnp.array([2.0, 2.0])), jnp.log(jnp.array([[1.0, 3.0], [1.0, 3.0]]))
    counts = jnp.array([[True, True], [True, False]])
    mask = jnp.ones(2, bool)
    loss, metrics = info_nce(positive, negatives, mask, negatives_mask=counts, temperature=0.5)
    np.testing.assert_allclose(loss, [np.log(14 / 4), np.log(5 / 4)], rtol=1e-6)
    assert finalize(metrics) == {"retrieval/accuracy": 0.5}


def test_closed_form_gradient_of_info_nce():
    """Softmax over (s⁺, s⁻)/τ less the positive's one, over τ."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        s = rng.normal(size=(4, 6))

        def total(p, n):
            return jnp.sum(info_nce(p, n, jnp.ones(4, bool), temperature=0.3)[0])

        gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(s[:, 0], s[:, 1:])
        p = np.exp(s / 0.3) / np.exp(s / 0.3).sum(1, keepdims=True)
        np.testing.assert_allclose(gradients[0], (p[:, 0] - 1) / 0.3, rtol=1e-12)
        np.testing.assert_allclose(gradients[1], p[:, 1:] / 0.3, rtol=1e-12)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_negatives_left_out_are_not_there(garbage):
    positive = jnp.array([0.3, 0.9])
    negatives, counts = jnp.array([[0.1, 0.7], [0.2, 0.4]]), jnp.array([[True, False], [False, False]])

    def total(p, n):
        loss, _ = info_nce(p, n, jnp.ones(2, bool), negatives_mask=counts)
        return jnp.sum(loss), loss

    gradient = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    clean = gradient(positive, negatives)
    jax.tree.map(
        np.testing.assert_array_equal, gradient(positive, jnp.where(counts, negatives, garbage)), clean
    )
    (of_positive, of_negatives), loss = clean
    assert loss[1] == 0 and of_positive[1] == 0  # a query without negatives
    assert np.all(np.asarray(of_negatives)[~np.asarray(counts)] == 0)


def test_scores_matter_up_to_a_constant_and_the_temperature_is_their_unit():
    rng = np.random.default_rng(1)
    p, n, mask = rng.normal(size=4), rng.normal(size=(4, 3)), jnp.ones(4, bool)
    loss = info_nce(p, n, mask, temperature=0.5)[0]
    np.testing.assert_allclose(info_nce(p + 3, n + 3, mask, temperature=0.5)[0], loss, rtol=1e-5)
    np.testing.assert_allclose(info_nce(4 * p, 4 * n, mask, temperature=2.0)[0], loss, rtol=1e-6)
    np.testing.assert_allclose(info_nce(p, n[:, ::-1], mask, temperature=0.5)[0], loss, rtol=1e-6)


def test_in_batch_negatives_make_the_cross_entropy_of_the_score_matrix():
    """Different documents: row i's loss is −log softmax(scores/τ)_ii; hard ones are further columns."""
    rng = np.random.default_rng(2)
    scores, hard, mask = rng.normal(size=(5, 5)), rng.normal(size=(5, 2)), jnp.ones(5, bool)
    positive, negatives, is_negative = in_batch_negatives(scores, mask)
    loss, _ = info_nce(positive, negatives, mask, negatives_mask=is_negative, temperature=0.7)
    np.testing.assert_allclose(loss, -np.diag(jax.nn.log_softmax(scores / 0.7, axis=1)), rtol=1e-5)
    both = np.concatenate([negatives, hard], axis=1)
    is_negative = np.concatenate([is_negative, np.ones((5, 2), bool)], axis=1)
    loss, _ = info_nce(positive, both, mask, negatives_mask=is_negative, temperature=0.7)
    wanted = -np.diag(jax.nn.log_softmax(np.concatenate([scores, hard], axis=1) / 0.7, axis=1))
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def test_no_query_has_its_own_document_or_a_masked_one_for_a_negative():
    """Queries 0 and 2 share document 8, and query 3 does not count; its scores are NaN."""
    scores = np.random.default_rng(3).normal(size=(4, 4)).astype(np.float32)
    mask, documents = jnp.array([True, True, True, False]), jnp.array([8, 5, 8, 6])
    *arrays, is_negative = in_batch_negatives(scores, mask, documents=documents)
    wanted = [[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(is_negative, np.array(wanted, bool))
    loss, _ = info_nce(*arrays, mask, negatives_mask=is_negative)
    dirty = scores.copy()
    dirty[3], dirty[:, 3] = np.nan, np.nan
    *arrays, is_negative = in_batch_negatives(dirty, mask, documents=documents)
    np.testing.assert_array_equal(info_nce(*arrays, mask, negatives_mask=is_negative)[0], loss)


# triplets


def triplet(anchor, positive, negative, **options):
    arrays = [jnp.asarray(x, jnp.float32) for x in (anchor, positive, negative)]

    def total(*x):
        loss, metrics = triplet_margin(*x, jnp.ones(x[0].shape[0], bool), **options)
        return jnp.sum(loss), (loss, metrics)

    gradients, (loss, metrics) = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return loss, gradients, finalize(metrics)


def test_triplets_by_hand():
    """Anchor 0, positive (3, 4) at 5; negatives at 13, 5.5 and 4: losses 0, 5 − 5.5 + 1 and 5 − 4 + 1.

    Gradients where active: −(p/5) + n/‖n‖ of the anchor, p/5 = (0.6, 0.8), and −n/‖n‖.
    """
    negative = np.array([[5.0, 12.0], [0.0, 5.5], [4.0, 0.0]])
    loss, gradients, metrics = triplet(np.zeros((3, 2)), [[3, 4]] * 3, negative)
    np.testing.assert_allclose(loss, [0, 0.5, 2], rtol=1e-6)
    np.testing.assert_allclose(gradients[0], [[0, 0], [-0.6, 0.2], [0.4, -0.8]], atol=1e-6)
    np.testing.assert_allclose(gradients[1], [[0, 0], [0.6, 0.8], [0.6, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(gradients[2], [[0, 0], [0, -1], [-1, 0]], atol=1e-6)
    assert metrics == pytest.approx({"retrieval/accuracy": 2 / 3, "retrieval/active_ratio": 2 / 3})


def test_distances_do_not_know_the_origin_or_the_axes():
    rng = np.random.default_rng(4)
    arrays = rng.normal(size=(3, 6, 4))
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    loss, _, _ = triplet(*arrays)
    assert np.any(np.asarray(loss) > 0)
    np.testing.assert_allclose(triplet(*(arrays + rng.normal(size=4)))[0], loss, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(triplet(*(arrays @ rotation))[0], loss, rtol=1e-4, atol=1e-5)


def test_coinciding_embeddings_have_a_finite_gradient():
    """All three equal: the margin, with gradient 0; positive on the anchor: the negative's gradient alone."""
    loss, gradients, _ = triplet(np.ones((1, 2)), np.ones((1, 2)), np.ones((1, 2)))
    assert loss[0] == 1 and np.all(np.array(gradients) == 0)
    loss, gradients, _ = triplet(np.zeros((1, 2)), np.zeros((1, 2)), [[0.5, 0]])
    assert loss[0] == 0.5
    np.testing.assert_array_equal(np.array(gradients)[:, 0], [[1, 0], [0, 0], [-1, 0]])


# facets


def test_facets_by_hand():
    """y = (½, ½, 0), π = (¼, ½, ¼): ½·ln 2 + ½·ln 1; and y = (0, 1, 0): ln 2. Sentences are [N, S, K]."""
    labels = jnp.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    logits = jnp.log(jnp.array([[0.25, 0.5, 0.25]] * 2))
    wanted = [np.log(2) / 2, np.log(2)]
    loss, metrics = facet_kl(labels, logits, jnp.ones(2, bool))
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert finalize(metrics) == pytest.approx({"facet_kl": 0.75 * np.log(2), "facet_accuracy": 0.5})
    loss, _ = facet_kl(labels[None], logits[None] + 7, jnp.ones((1, 2), bool))
    np.testing.assert_allclose(loss, [wanted], rtol=1e-6)


def test_closed_form_gradient_of_facet_kl():
    """π − y by logits and nothing by labels; the loss is ≥ 0, and 0 at π = y."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(5)
        y, x = rng.dirichlet(np.ones(4), 6), rng.normal(0, 2, (6, 4))
        mask = jnp.ones(6, bool)

        def total(y, x):
            loss, _ = facet_kl(y, x, mask)
            return jnp.sum(loss), loss

        (of_y, of_x), loss = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(y, x)
        np.testing.assert_allclose(of_x, jax.nn.softmax(x) - y, rtol=1e-12)
        assert np.all(of_y == 0) and np.all(loss > 0)
        np.testing.assert_allclose(facet_kl(y, np.log(y) + 3, mask)[0], 0, atol=1e-14)
        order = rng.permutation(4)  # facets may be named in any order
        np.testing.assert_allclose(facet_kl(y[:, order], x[:, order], mask)[0], loss, rtol=1e-12)


def test_a_facet_that_is_out_of_the_question():
    """Logit −inf where the label is 0: the loss and the gradient of the facets that are left."""
    labels, logits = jnp.array([[0.5, 0.5, 0.0]]), jnp.array([[0.0, 1.0, -np.inf]])

    def total(labels, logits):
        return facet_kl(labels, logits, jnp.ones(1, bool))[0][0]

    value_and_gradient = jax.jit(jax.value_and_grad(total, argnums=1))
    value, gradient = value_and_gradient(labels, logits)
    left, of_left = value_and_gradient(labels[:, :2], logits[:, :2])
    np.testing.assert_allclose(value, left, rtol=1e-6)
    np.testing.assert_allclose(gradient, np.append(of_left, [[0]], axis=1), rtol=1e-6)


def test_bad_arguments_are_named():
    x, mask = jnp.zeros((3, 4)), jnp.ones(3, bool)
    with pytest.raises(ValueError, match=r"temperature=0\.0"):
        info_nce(x[:, 0], x, mask, temperature=0.0)
    with pytest.raises(ValueError, match=r"negatives \(4, 3\)"):
        info_nce(x[:, 0], x.T, mask)
    with pytest.raises(ValueError, match=r"negatives_mask \(3,\)"):
        info_nce(x[:, 0], x, mask, negatives_mask=mask)
    with pytest.raises(ValueError, match=r"scores \(3, 4\)"):
        in_batch_negatives(x, mask)
    with pytest.raises(ValueError, match=r"anchor \(3,\)"):
        triplet_margin(x[:, 0], x[:, 0], x[:, 0], mask)
    with pytest.raises(ValueError, match=r"labels \(3, 4\)"):
        facet_kl(x, x, jnp.ones((3, 4), bool))
