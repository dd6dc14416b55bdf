"""One surrogate at ratios of one's choice: token losses, their gradient by logp, and metrics."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.losses import finalize

NAN = float("nan")


def value_and_grad(ratio, advantages, surrogate, **options):
    """Of one row of ratios, with old_logp = 0: losses [T], gradients [T], metrics (padded to 4 tokens)."""
    n = len(ratio)
    padding = np.zeros(max(4 - n, 0))
    ratios = np.append(ratio, padding + NAN)[None]
    loss, gradient, metrics = rows_of(ratios, np.append(advantages, padding)[None], surrogate, **options)
    return loss[0, :n], gradient[0, :n], metrics


def rows_of(ratios, advantages, surrogate, **options):
    """The same for rows [N, T] of ratios; NaN is a token that does not count."""
    ratios = np.asarray(ratios)
    logp, a = (jnp.asarray(x, jnp.result_type(float)) for x in (np.log(ratios), advantages))

    def total(x):
        loss, metrics = surrogate(x, jnp.zeros_like(x), a, ~np.isnan(ratios), **options)
        return jnp.sum(loss), (loss, metrics)

    gradient, (loss, metrics) = jax.grad(total, has_aux=True)(logp)
    return np.asarray(loss), np.asarray(gradient), finalize(metrics)
