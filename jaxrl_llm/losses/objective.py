"""One policy objective out of its parts: (ratio) × (surrogate) × (aggregation) + auxiliary losses."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

from jaxrl_llm.losses.aggregation import (
    AGGREGATIONS,
    Array,
    Metrics,
    WeightedSum,
    aggregate,
    check_same_shape,
)
from jaxrl_llm.losses.corrections import IMPORTANCE_SAMPLING_CORRECTIONS, importance_sampling_correction
from jaxrl_llm.losses.entropy import entropy_bonus
from jaxrl_llm.losses.kl import KL_ESTIMATORS
from jaxrl_llm.losses.ratios import RATIOS
from jaxrl_llm.losses.sequence_surrogates import gmpo, gspo, luspo
from jaxrl_llm.losses.soft_clipping import aspo, ce_gppo, cispo, dgpo, gppo, sapo
from jaxrl_llm.losses.supervised import negative_log_likelihood
from jaxrl_llm.losses.surrogates import dppo, ppo_clip, reinforce

Part: TypeAlias = Callable[..., tuple[Array, Metrics]]
Objective: TypeAlias = Callable[..., tuple[WeightedSum, Metrics]]
Options: TypeAlias = Mapping[str, Any]

SURROGATES: dict[str, Part] = {
    "reinforce": reinforce,
    "ppo_clip": ppo_clip,
    "gspo": gspo,
    "gmpo": gmpo,
    "luspo": luspo,
    "cispo": cispo,
    "dgpo": dgpo,
    "gppo": gppo,
    "ce_gppo": ce_gppo,
    "aspo": aspo,
    "sapo": sapo,
    "dppo": dppo,
}

AUXILIARY: dict[str, Part] = {
    **KL_ESTIMATORS,
    "entropy": entropy_bonus,
    "nll": negative_log_likelihood,
}
"""Losses that are added to a surrogate's with a coefficient: of named arrays, see `policy_objective`."""

NOTHING: Options = MappingProxyType({})


def policy_objective(
    *,
    surrogate: str | Part = "ppo_clip",
    surrogate_options: Options = NOTHING,
    ratio: str | Part | None = None,
    ratio_options: Options = NOTHING,
    correction: str | Part = "none",
    correction_options: Options = NOTHING,
    auxiliary: Mapping[Any, float] = NOTHING,
    auxiliary_options: Mapping[Any, Options] = NOTHING,
    aggregation: str = "token_mean",
    norm: float | None = None,
    count_empty: bool = False,
) -> Objective:
    """Builds `objective(logp, old_logp, advantages, mask, **arrays) -> (WeightedSum, metrics)`.

    loss = aggregate(surrogate(ratio)·correction + Σ_k coefficient_k·auxiliary_k)

    Each part is a name or a function. A part is called with the arrays that its parameters name: logp,
    old_logp, advantages, mask, and whatever else the objective is given, for instance ref_logp (f[N, T], for
    KL estimators), behaviour_logp (for corrections), entropy, teacher_logp. Options are fixed when the
    objective is built. Weights of advantages (HA-DW, DynaMO) are factors of what is passed as advantages.

    Example:
      >>> import jax.numpy as jnp
      >>> objective = policy_objective(
      ...     surrogate="dgpo", ratio="sequence", auxiliary={"k3": 0.04}, aggregation="seq_mean_token_mean"
      ... )
      >>> logp, mask = jnp.log(jnp.array([[0.5, 0.2]])), jnp.ones((1, 2), bool)
      >>> loss, metrics = objective(logp, logp, jnp.array([[1.0]]), mask, ref_logp=logp)
      >>> float(loss.sum / loss.weight)  # ratios are 1, the KL is 0
      -1.0

    Args:
      surrogate: of `SURROGATES`, or any function with its arguments.
      surrogate_options: its keywords.
      ratio: of `RATIOS`, or a function; None for the surrogate's own.
      ratio_options: its keywords.
      correction: of `IMPORTANCE_SAMPLING_CORRECTIONS`, or a function whose result is multiplied by the
        surrogate's loss.
      correction_options: its keywords.
      auxiliary: coefficients of the losses to add, of `AUXILIARY` or functions. A coefficient of 0 leaves
        the loss out.
      auxiliary_options: keywords of each, by the same key.
      aggregation, norm, count_empty: as `aggregate`.

    Returns:
      The objective. Its metrics are those of all parts; of two with one name the earlier part's.

    Raises:
      ValueError: a name or an option that does not exist, when the objective is built; an array that a
        part needs and was not given, when it is called.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {aggregation!r}; one of {', '.join(AGGREGATIONS)}")
    main = Bound(surrogate, SURROGATES, "surrogate", surrogate_options)
    own_ratio = None if ratio is None else Bound(ratio, RATIOS, "ratio", ratio_options)
    if own_ratio is not None and "ratio" not in main.parameters:
        raise ValueError(f"{main.name} takes no other ratio than its own: leave ratio out")
    if own_ratio is None and ratio_options:
        raise ValueError(f"ratio_options {dict(ratio_options)} without a ratio; one of {', '.join(RATIOS)}")
    corrections = {
        mode: partial(importance_sampling_correction, mode=mode) for mode in IMPORTANCE_SAMPLING_CORRECTIONS
    }
    weighting = None
    if correction != "none":
        weighting = Bound(correction, corrections, "correction", correction_options)
    unused = auxiliary_options.keys() - auxiliary.keys()
    if unused:
        raise ValueError(f"auxiliary_options for {', '.join(map(str, unused))}, which auxiliary lacks")
    added = [
        (coefficient, Bound(part, AUXILIARY, "auxiliary", auxiliary_options.get(part, NOTHING)))
        for part, coefficient in auxiliary.items()
        if coefficient
    ]

    def objective(
        logp: Array, old_logp: Array, advantages: Array, mask: Array, **arrays: Array
    ) -> tuple[WeightedSum, Metrics]:
        check_same_shape(logp=logp, old_logp=old_logp, mask=mask)
        arrays |= {"logp": logp, "old_logp": old_logp, "advantages": advantages, "mask": mask}
        fixed = {} if own_ratio is None else {"ratio": own_ratio.over(arrays)}
        loss, metrics = main(arrays, **fixed)
        if weighting is not None:
            factor, more = weighting(arrays)
            loss, metrics = loss * factor, more | metrics
        for coefficient, part in added:
            extra, more = part(arrays)
            loss, metrics = loss + coefficient * extra, more | metrics
        return aggregate(loss, mask, aggregation, norm=norm, count_empty=count_empty), metrics

    return objective


class Bound:
    """A part with its options, to be called with arrays by name."""

    def __init__(self, part: str | Part, table: Mapping[str, Part], role: str, options: Options):
        """Raises a ValueError for a name that `table` lacks or an option that the part lacks."""
        if isinstance(part, str) and part not in table:
            raise ValueError(f"unknown {role} {part!r}; one of {', '.join(table)}")
        self.function = table[part] if isinstance(part, str) else part
        self.options = options
        self.name = f"{role} {part if isinstance(part, str) else getattr(part, '__name__', part)!r}"
        self.parameters = inspect.signature(self.function).parameters
        unknown = options.keys() - self.parameters.keys()
        if unknown:
            has = ", ".join(self.parameters)
            raise ValueError(f"{self.name} has no option {', '.join(sorted(unknown))}; it has {has}")

    def arguments(self, arrays: Mapping[str, Array], **fixed: Any) -> dict[str, Any]:
        """What the part is called with.

        Raises:
          ValueError: an array without a default is missing.
        """
        given = {name: arrays[name] for name in self.parameters if name in arrays} | {**self.options, **fixed}
        missing = [name for name, p in self.parameters.items() if p.default is p.empty and name not in given]
        if missing:
            raise ValueError(f"{self.name} needs {', '.join(missing)}: pass it to the objective by that name")
        return given

    def __call__(self, arrays: Mapping[str, Array], **fixed: Any) -> tuple[Array, Metrics]:
        return self.function(**self.arguments(arrays, **fixed))

    def over(self, arrays: Mapping[str, Array]) -> Part:
        """The part as a `Ratio`: its first three arrays come from the surrogate, others from `arrays`."""
        more = {
            name: value
            for name, value in self.arguments(arrays).items()
            if name not in ("logp", "old_logp", "mask")
        }
        return lambda logp, old_logp, mask: self.function(logp, old_logp, mask, **more)
