"""WMSS: training goes on in a mixture with a weaker checkpoint, on samples chosen by how entropy moved.

The weak model is the one before a first epoch of supervised training, the strong one the one after it. In the
next stage their logits are mixed and the mixture is trained; the strong model alone is kept.
"""

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, float_of, masked_sum
from jaxrl_llm.losses.divergences import log_probs
from jaxrl_llm.losses.supervised import negative_log_likelihood


def wmss(
    logits: Array,
    weak_logits: Array,
    tokens: Array,
    mask: Array,
    *,
    mixing: float = 0.5,
    freeze_weak: bool = False,
) -> tuple[Array, Metrics]:
    """Cross-entropy of the given tokens under a mixture of a strong and a weak model's logits.

    ℓ = −log softmax(z)_y with z = (1−λ)·z_weak + λ·z_strong

    The gradient by the strong model's logits is λ·(p_mix − e_y), by the weak model's (1−λ)·(p_mix − e_y).
    Where the strong model is already sure of y and the weak one is not, p_mix is further from e_y than the
    strong model's own p: between two tokens, with margins m_s and m_w between their logits, both large, the
    strong model's gradient is larger than that of plain training once m_s − m_w > −ln λ / (1−λ), by a factor
    near λ·e^((1−λ)·(m_s − m_w)). λ = 1 is plain training. A constant added to either model's logits changes
    nothing.

    Example:
      >>> logits, weak_logits = jnp.array([[[4.0, 0.0]]]), jnp.array([[[0.0, 0.0]]])
      >>> loss, _ = wmss(logits, weak_logits, jnp.array([[0]]), jnp.ones((1, 1), bool))
      >>> round(float(loss[0, 0]), 4)  # z = (2, 0): ln(1 + e^−2)
      0.1269

    Args:
      logits: f[N, T, V] of the strong model; the gradient flows here.
      weak_logits: f[N, T, V] of the weak model; the gradient flows here too unless it is frozen.
      tokens: i[N, T] in [0, V); any value where masked.
      mask: bool[N, T] tokens to learn.
      mixing: λ in (0, 1].
      freeze_weak: whether the weak model's logits are constants. In the released code both are trained.

    Returns:
      f[N, T] token loss (nats), 0 where masked, float32 or wider; metric `nll` of the mixture, its mean over
      tokens. Where V is large: the mixture is one model with hidden states and head put side by side,
      [λ·h_strong, (1−λ)·h_weak] and [W_strong, W_weak], for `jaxrl_kernels.linear_logprob`.

    Raises:
      ValueError: shapes that do not fit, or mixing outside (0, 1].

    References:
      2602.08222, in the form of the authors' code.
    """
    if not 0 < mixing <= 1:
        raise ValueError(f"mixing={mixing} must lie in (0, 1]; 1 is the strong model alone")
    check_same_shape(logits=logits, weak_logits=weak_logits)
    check_same_shape(tokens=tokens, mask=mask)
    strong, weak = float_of(logits), float_of(weak_logits)
    if freeze_weak:
        weak = jax.lax.stop_gradient(weak)
    logp = log_probs((1 - mixing) * weak + mixing * strong, mask)
    logp = jnp.take_along_axis(logp, jnp.where(mask, tokens, 0)[..., None], axis=-1)[..., 0]
    return negative_log_likelihood(logp, mask)


def wmss_sampling_weights(
    weak_entropy: Array,
    entropy: Array,
    valid: Array | None = None,
    *,
    difficulty: float = 0.1,
    consolidation: float = 0.8,
    repair: float = 0.1,
) -> tuple[Array, Metrics]:
    """Probabilities of drawing a data set's samples for the next stage, from how their entropy moved.

    p_i ∝ α·H0_i/ΣH0 + β·[−ΔH_i]₊/Σ[−ΔH]₊ + γ·[ΔH_i]₊/Σ[ΔH]₊ with ΔH = H1 − H0

    H0 and H1 are a sample's mean entropies over its answer tokens under the weak and the strong model. The
    three terms are what was hard to begin with, what has just been learnt, and what has got worse. A term
    without any sample is left out; without all three (H0 = H1 = 0) the samples are drawn uniformly.

    Example:
      >>> weak_entropy, entropy = jnp.array([1.0, 1.0]), jnp.array([0.5, 1.5])
      >>> p, _ = wmss_sampling_weights(weak_entropy, entropy)
      >>> [round(x, 4) for x in p.tolist()]  # 0.05 + 0.8 and 0.05 + 0.1; they add up to 1 already
      [0.85, 0.15]

    Args:
      weak_entropy: f[N] H0 ≥ 0 (nats) of every sample of the data set; constants.
      entropy: f[N] H1 ≥ 0 (nats); constants.
      valid: bool[N] samples that may be drawn; None for all.
      difficulty, consolidation, repair: α, β and γ, at least 0 and not all 0. The defaults are the released
        script's; the released code's own are 0.2, 0.7 and 0.1.

    Returns:
      p: f[N] without gradient, at least 0, sum 1 (0 if no sample is valid); float32 or wider. Draw with
        replacement.
      metrics: `wmss/entropy_change`, mean ΔH (nats), and `wmss/rebound`, share of the samples with ΔH > 0.

    Raises:
      ValueError: shapes that differ, a negative mass, or no mass at all.

    References:
      2602.08222, in the form of the authors' code.
    """
    masses = difficulty, consolidation, repair
    if min(masses) < 0 or sum(masses) == 0:
        raise ValueError(
            f"difficulty={difficulty}, consolidation={consolidation} and repair={repair} must not be "
            "negative, nor all 0"
        )
    before, after = (jax.lax.stop_gradient(float_of(x)) for x in (weak_entropy, entropy))
    counts = jnp.ones(before.shape, bool) if valid is None else jnp.asarray(valid, bool)
    check_same_shape(weak_entropy=before, entropy=after, valid=counts)
    before, after = jnp.where(counts, before, 0), jnp.where(counts, after, 0)
    change = after - before
    p = jnp.zeros_like(before)
    for mass, term in zip(masses, (before, jnp.maximum(-change, 0), jnp.maximum(change, 0))):
        total = jnp.sum(term)
        p += jnp.where(total > 0, mass * term / jnp.where(total > 0, total, 1), 0)
    p = jnp.where(jnp.sum(p) > 0, p, counts.astype(p.dtype))
    total = jnp.sum(p)
    return p / jnp.where(total > 0, total, 1), {
        "wmss/entropy_change": masked_sum(change, counts),
        "wmss/rebound": masked_sum(change > 0, counts),
    }
