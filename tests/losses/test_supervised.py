"""The supervised loss."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.losses import aggregate, finalize, negative_log_likelihood


def test_nll_is_cross_entropy():
    """The token mean of −log π is numpy's cross-entropy, and its gradient softmax − one-hot over 3 tokens."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 5)).astype(np.float32)
    tokens = rng.integers(0, 5, (2, 3))
    mask = np.array([[True, True, False], [True, False, False]])

    def loss(x):
        logp = jnp.take_along_axis(jax.nn.log_softmax(x), tokens[..., None], axis=-1)[..., 0]
        per_token, metrics = negative_log_likelihood(logp, mask)
        total = aggregate(per_token, mask)
        return total.sum / total.weight, metrics

    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    one_hot = np.eye(5)[tokens]
    np.testing.assert_allclose(value, -np.log((p * one_hot).sum(-1))[mask].mean(), rtol=1e-6)
    np.testing.assert_allclose(gradient, (p - one_hot) * mask[..., None] / 3, atol=1e-6)
    np.testing.assert_allclose(finalize(metrics)["nll"], value, rtol=1e-6)
