"""Numbers that reduce exactly: (sum, weight) pairs, extremes, and the reduction of token losses to them."""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

Array = jax.Array


class WeightedSum(NamedTuple):
    """A mean before its division: add the pieces, divide once. Both fields are scalars."""

    sum: Array
    weight: Array


class Max(NamedTuple):
    """A maximum over the batch (scalar)."""

    value: Array


class Min(NamedTuple):
    """A minimum over the batch (scalar)."""

    value: Array


class EffectiveSize(NamedTuple):
    """What an effective sample size needs of the weights w: Σw, Σw² and their number n (scalars).

    (Σw)² / (n·Σw²) lies in (0, 1]: 1 when all weights are equal, 1/n when one of them is all. It is no
    mean of anything, so it cannot travel as one (sum, weight); these three sums add up over pieces.
    """

    sum: Array
    square: Array
    weight: Array


Metric: TypeAlias = WeightedSum | Max | Min | EffectiveSize
Metrics: TypeAlias = dict[str, Metric]

AGGREGATIONS = (
    "token_mean",
    "seq_mean_token_mean",
    "seq_mean_token_sum",
    "seq_mean_token_sum_norm",
)


def float_of(x: Array) -> Array:
    """`x` in at least float32; float64 stays float64."""
    return jnp.asarray(x, jnp.promote_types(jnp.asarray(x).dtype, jnp.float32))


def masked(x: Array, mask: Array) -> Array:
    """`x` where `mask`, else 0: garbage (NaN, inf) at masked positions reaches neither value nor gradient."""
    return jnp.where(mask, float_of(x), 0)


def check_same_shape(**arrays: Array) -> None:
    """Raises a ValueError that names every array and its shape unless all shapes are equal."""
    shapes = {name: jnp.shape(x) for name, x in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def masked_sum(x: Array, mask: Array) -> WeightedSum:
    """Sum of `x` over `mask` and the number of its True entries; shapes broadcast."""
    mask = jnp.broadcast_to(mask, jnp.broadcast_shapes(jnp.shape(x), jnp.shape(mask)))
    total = jnp.sum(masked(x, mask))
    return WeightedSum(total, jnp.sum(mask, dtype=total.dtype))


def masked_max(x: Array, mask: Array) -> Max:
    """Largest `x` under `mask`; -inf when the mask is empty."""
    return Max(jnp.max(jnp.where(mask, float_of(x), -jnp.inf), initial=-jnp.inf))


def masked_min(x: Array, mask: Array) -> Min:
    """Smallest `x` under `mask`; inf when the mask is empty."""
    return Min(jnp.min(jnp.where(mask, float_of(x), jnp.inf), initial=jnp.inf))


def aggregate(
    per_token: Array,
    mask: Array,
    mode: str = "token_mean",
    *,
    norm: float | None = None,
    count_empty: bool = False,
) -> WeightedSum:
    """Reduces a token loss [N, T] to a (sum, weight) pair whose quotient is the loss.

    Weights do not depend on params, so sums of gradients and sums of weights over any cut into
    micro-batches give the gradient of the whole batch exactly.

    | mode                    | sum                    | weight             | used by        |
    |-------------------------|------------------------|--------------------|----------------|
    | token_mean              | Σ_i Σ_t ℓ              | number of tokens   | DAPO           |
    | seq_mean_token_mean     | Σ_i (Σ_t ℓ / length_i) | number of rows     | GRPO           |
    | seq_mean_token_sum      | Σ_i Σ_t ℓ              | number of rows     | REINFORCE      |
    | seq_mean_token_sum_norm | Σ_i Σ_t ℓ / norm       | number of rows     | Dr.GRPO        |

    Example:
      >>> loss, mask = jnp.array([[1.0, 3.0], [5.0, 0.0]]), jnp.array([[True, True], [True, False]])
      >>> total = aggregate(loss, mask, "seq_mean_token_mean")  # ((1 + 3) / 2 + 5 / 1) over 2 rows
      >>> float(total.sum), float(total.weight)
      (7.0, 2.0)

    Args:
      per_token: f[N, T] loss of every token (nats).
      mask: bool[N, T] tokens that count.
      mode: one of `AGGREGATIONS`.
      norm: the constant length (tokens) of `seq_mean_token_sum_norm`, as a rule the longest completion
        allowed. It has no default: the width of the mask changes with padding and micro-batches.
      count_empty: whether rows without a token count as rows (they do in TRL, not in verl).

    Returns:
      WeightedSum of scalars; a fully masked batch gives (0, 0) unless `count_empty`.

    Raises:
      ValueError: unknown mode, shapes that differ, or `seq_mean_token_sum_norm` without `norm`.
    """
    check_same_shape(per_token=per_token, mask=mask)
    loss = masked(per_token, mask)
    tokens = jnp.sum(mask, axis=1, dtype=loss.dtype)
    rows = jnp.full_like(tokens, 1) if count_empty else (tokens > 0).astype(loss.dtype)
    if mode == "token_mean":
        return WeightedSum(jnp.sum(loss), jnp.sum(tokens))
    if mode == "seq_mean_token_mean":
        per_row = jnp.sum(loss, axis=1) / jnp.maximum(tokens, 1)
    elif mode == "seq_mean_token_sum":
        per_row = jnp.sum(loss, axis=1)
    elif mode == "seq_mean_token_sum_norm":
        if norm is None:
            raise ValueError(f"{mode} needs norm, a constant length: pass the longest completion allowed")
        per_row = jnp.sum(loss, axis=1) / norm
    else:
        raise ValueError(f"unknown aggregation {mode!r}; one of {', '.join(AGGREGATIONS)}")
    return WeightedSum(jnp.sum(per_row), jnp.sum(rows))


def merge(a: Metrics, b: Metrics) -> Metrics:
    """Two pieces' metrics as one: sums and weights add, extremes meet. Keys may differ.

    Raises:
      TypeError: one name stands for two kinds of number.
    """

    def one(name: str, x: Metric, y: Metric) -> Metric:
        if type(x) is not type(y):
            raise TypeError(f"metric {name!r} is a {type(x).__name__} here and a {type(y).__name__} there")
        meet = jnp.maximum if isinstance(x, Max) else jnp.minimum if isinstance(x, Min) else jnp.add
        return type(x)(*map(meet, x, y))

    return a | b | {name: one(name, a[name], b[name]) for name in a if name in b}


def finalize(metrics: Metrics) -> dict[str, float]:
    """The numbers themselves; a mean over nothing and an extreme over nothing are left out."""
    out = {}
    for name, metric in zip(metrics, jax.device_get(list(metrics.values()))):
        match metric:
            case WeightedSum(total, weight) if weight > 0:
                out[name] = float(total) / float(weight)
            case EffectiveSize(total, square, weight) if square > 0:
                out[name] = float(total) ** 2 / (float(weight) * float(square))
            case Max(value) | Min(value) if abs(value) != float("inf"):
                out[name] = float(value)
    return out
