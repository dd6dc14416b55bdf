"""Losses of retrieval models: queries, what they should find, and what they should not."""

import jax
import jax.numpy as jnp

from jaxrl_llm.losses.aggregation import Array, Metrics, check_same_shape, masked, masked_sum
from jaxrl_llm.losses.preference import check_rows, constant


def info_nce(
    positive: Array,
    negatives: Array,
    mask: Array,
    *,
    negatives_mask: Array | None = None,
    temperature: float = 0.05,
) -> tuple[Array, Metrics]:
    """InfoNCE: the positive's score is to stand out from those of the negatives.

    ℓ = −log e^{s⁺/τ} / (e^{s⁺/τ} + Σ_k e^{s⁻_k/τ})

    Example:
      >>> positive, negatives = jnp.log(jnp.array([2.0])), jnp.log(jnp.array([[1.0, 1.0, 4.0]]))
      >>> loss, _ = info_nce(positive, negatives, jnp.array([True]), temperature=1.0)
      >>> round(float(loss[0]), 4)  # −ln(2/8)
      1.3863

    With in-batch and hard negatives side by side, for scores f[N, N] and hard_scores f[N, H]:

      positive, negatives, is_negative = in_batch_negatives(scores, mask)
      negatives = jnp.concatenate([negatives, hard_scores], axis=1)
      is_negative = jnp.concatenate([is_negative, hard_mask], axis=1)

    Args:
      positive: f[N] score of every query and its own document.
      negatives: f[N, K] scores of documents that do not belong to the query.
      mask: bool[N] queries that count.
      negatives_mask: bool[N, K] negatives that count; None for all.
      temperature: τ > 0, in units of the scores (0.05 for cosines).

    Returns:
      f[N] loss (nats), 0 where masked, float32 or wider; 0 too for a query without negatives. Metric
      `retrieval/accuracy`, the share of queries whose positive scores above all negatives.

    Raises:
      ValueError: shapes that do not fit, or τ ≤ 0.

    References:
      1807.03748.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be positive")
    check_rows(mask, positive=positive)
    shape = jnp.shape(negatives)
    counts = jnp.ones(shape, bool) if negatives_mask is None else jnp.asarray(negatives_mask, bool)
    check_same_shape(negatives=negatives, negatives_mask=counts)
    if len(shape) != 2 or shape[:1] != jnp.shape(mask):
        raise ValueError(f"negatives {shape} must be {(*jnp.shape(mask), 'K')}, one row per query")
    counts = counts & mask[:, None]
    own = masked(positive, mask)[:, None]
    excess = masked(masked(negatives, counts) - own, counts)
    exponents = jnp.where(counts, excess / temperature, -jnp.inf)
    loss = jax.nn.logsumexp(jnp.concatenate([jnp.zeros_like(own), exponents], axis=1), axis=1)
    return loss, {"retrieval/accuracy": masked_sum(jnp.all(~counts | (excess < 0), axis=1), mask)}


def in_batch_negatives(
    scores: Array, mask: Array, *, documents: Array | None = None
) -> tuple[Array, Array, Array]:
    """Every other query's document as a negative: what `info_nce` takes, from one score matrix.

    Which negatives a query has depends on the batch, so this is a function of the whole batch, before any cut
    into micro-batches.

    Example:
      >>> scores = jnp.array([[9.0, 1.0, 9.0], [2.0, 8.0, 3.0], [7.0, 4.0, 7.0]])
      >>> mask, documents = jnp.ones(3, bool), jnp.array([5, 6, 5])  # queries 0 and 2 share their document
      >>> positive, negatives, is_negative = in_batch_negatives(scores, mask, documents=documents)
      >>> positive.tolist(), is_negative[0].tolist()
      ([9.0, 8.0, 7.0], [False, True, False])

    Args:
      scores: f[N, N] of query i and the document of query j.
      mask: bool[N] queries that count.
      documents: i[N] any integers: the document of query j. Copies of a query's own document are no negatives
        of it; a document that several other queries share counts once for each. None: all are different.

    Returns:
      positive: f[N] the diagonal.
      negatives: f[N, N] the scores.
      negatives_mask: bool[N, N] without the query's own document and without rows that do not count.

    Raises:
      ValueError: shapes that do not fit.
    """
    n = jnp.shape(mask)[0]
    if documents is None:
        documents = jnp.arange(n)
    check_rows(mask, documents=documents)
    if jnp.shape(scores) != (n, n):
        raise ValueError(f"scores {jnp.shape(scores)} must be {(n, n)}, queries by their documents")
    is_other = documents[:, None] != documents
    return jnp.diagonal(scores), scores, is_other & mask[:, None] & mask


def triplet_margin(
    anchor: Array, positive: Array, negative: Array, mask: Array, *, margin: float = 1.0
) -> tuple[Array, Metrics]:
    """Triplet margin loss: the positive is to be nearer than the negative, by a margin.

    ℓ = max(0, ‖a − p‖₂ − ‖a − n‖₂ + margin)

    Example:
      >>> anchor, positive = jnp.array([[0.0, 0.0]]), jnp.array([[3.0, 4.0]])
      >>> negative = jnp.array([[0.0, 5.5]])
      >>> triplet_margin(anchor, positive, negative, jnp.array([True]))[0].tolist()  # 5 − 5.5 + 1
      [0.5]

    Args:
      anchor: f[N, D] embeddings of the queries.
      positive: f[N, D] those of documents that belong to them.
      negative: f[N, D] those of documents that do not.
      mask: bool[N] triplets that count.
      margin: in units of the embeddings.

    Returns:
      f[N] loss, 0 where masked, float32 or wider. A distance of 0 has the gradient 0. Metrics
      `retrieval/accuracy`, the share of triplets whose positive is nearer, and `retrieval/active_ratio`, the
      share with a loss above 0.

    Raises:
      ValueError: shapes that do not fit.

    References:
      As trained by SPECTER and FLeW (2509.07531).
    """
    check_same_shape(anchor=anchor, positive=positive, negative=negative)
    if jnp.ndim(anchor) != 2 or jnp.shape(anchor)[:1] != jnp.shape(mask):
        raise ValueError(f"anchor {jnp.shape(anchor)} must be {(*jnp.shape(mask), 'D')}, one row per triplet")
    a, p, n = (masked(x, mask[:, None]) for x in (anchor, positive, negative))
    to_positive, to_negative = _norm(a - p), _norm(a - n)
    excess = to_positive - to_negative + margin
    is_active = mask & (excess > 0)
    return masked(excess, is_active), {
        "retrieval/accuracy": masked_sum(to_positive < to_negative, mask),
        "retrieval/active_ratio": masked_sum(is_active, mask),
    }


def _norm(x: Array) -> Array:
    """Euclidean norm over the last axis, with gradient 0 at the origin, where the root has none."""
    square = jnp.sum(x * x, axis=-1)
    is_zero = square == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def facet_kl(labels: Array, logits: Array, mask: Array) -> tuple[Array, Metrics]:
    """KL divergence of a facet posterior from its label, of sentences or of whole questions.

    ℓ = KL(y ‖ π) = Σ_k y_k·(log y_k − log π_k), π = softmax_k(logits)

    UniFAR has it twice: for the sentences of a document, whose labels come from a language model and whose
    logits are log α of the facets' attention to the sentence; and for questions, whose labels are a teacher's
    posterior and whose logits are ⟨anchor, question⟩/τ.

    Example:
      >>> labels, logits = jnp.array([[1.0, 0.0], [0.5, 0.5]]), jnp.log(jnp.array([[3.0, 1.0], [3.0, 1.0]]))
      >>> loss, _ = facet_kl(labels, logits, jnp.array([True, True]))
      >>> [round(x, 4) for x in loss.tolist()]  # ln(4/3) and ½·ln(2/3) + ½·ln 2
      [0.2877, 0.1438]

    Args:
      labels: f[N, S, K] of sentences, or f[N, K] of questions: y ≥ 0 with sum 1, one-hot or soft; constants.
      logits: like the labels; −inf is allowed where the label is 0.
      mask: bool[N, S], or bool[N]: sentences with a label, or questions.

    Returns:
      f[N, S], or f[N]: loss (nats), 0 where masked, float32 or wider. Metrics, as means: `facet_kl`, and
      `facet_accuracy`, the share where the most probable facet is the label's.

    Raises:
      ValueError: shapes that do not fit.

    References:
      2602.23766 names both terms; their exact form could not be confirmed.
    """
    check_same_shape(labels=labels, logits=logits)
    if jnp.shape(labels)[:-1] != jnp.shape(mask):
        raise ValueError(f"labels {jnp.shape(labels)} must be {(*jnp.shape(mask), 'K')}, as the mask")
    y, x = constant(labels, mask[..., None]), masked(logits, mask[..., None])
    log_posterior = jax.nn.log_softmax(x, axis=-1)
    is_some = y > 0  # 0·log 0 = 0
    terms = y * (jnp.log(jnp.where(is_some, y, 1)) - jnp.where(is_some, log_posterior, 0))
    loss = jnp.sum(terms, axis=-1)
    is_right = jnp.argmax(x, axis=-1) == jnp.argmax(y, axis=-1)
    return loss, {"facet_kl": masked_sum(loss, mask), "facet_accuracy": masked_sum(is_right, mask)}
