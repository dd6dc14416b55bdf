"""Losses: arrays in, per-token losses and (sum, weight) metrics out. Imports jax alone."""

from jaxrl_llm.losses.aggregation import (
    AGGREGATIONS,
    EffectiveSize,
    Max,
    Metric,
    Metrics,
    Min,
    WeightedSum,
    aggregate,
    finalize,
    merge,
)
from jaxrl_llm.losses.corrections import IMPORTANCE_SAMPLING_CORRECTIONS, importance_sampling_correction
from jaxrl_llm.losses.entropy import entropy_bonus
from jaxrl_llm.losses.kl import KL_ESTIMATORS, kl_k1, kl_k2, kl_k3, kl_k3_corrected
from jaxrl_llm.losses.ratios import log_ratio, ratio_statistics, sequence_log_ratio
from jaxrl_llm.losses.supervised import negative_log_likelihood
from jaxrl_llm.losses.surrogates import SURROGATES, cispo, dgpo, gspo, ppo_clip, reinforce

__all__ = [
    "AGGREGATIONS",
    "IMPORTANCE_SAMPLING_CORRECTIONS",
    "KL_ESTIMATORS",
    "SURROGATES",
    "EffectiveSize",
    "Max",
    "Metric",
    "Metrics",
    "Min",
    "WeightedSum",
    "aggregate",
    "cispo",
    "dgpo",
    "entropy_bonus",
    "finalize",
    "gspo",
    "importance_sampling_correction",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_k3_corrected",
    "log_ratio",
    "merge",
    "negative_log_likelihood",
    "ppo_clip",
    "ratio_statistics",
    "reinforce",
    "sequence_log_ratio",
]
