"""Losses: arrays in, per-token losses and (sum, weight) metrics out. Imports jax alone.

Every surrogate is `(logp, old_logp, advantages, mask, *, options) -> (loss f[N, T], metrics)`, and
`losses.aggregate` reduces the loss. The published methods are choices of three things:

| method      | surrogate                   | advantage           | aggregation             | paper      |
|-------------|-----------------------------|---------------------|-------------------------|------------|
| REINFORCE   | reinforce                   | reward − a baseline | seq_mean_token_sum      |            |
| PPO         | ppo_clip                    | of a value function | token_mean              | 1707.06347 |
| GRPO        | ppo_clip (+ β·KL)           | group mean and std  | seq_mean_token_mean     | 2402.03300 |
| Dr.GRPO     | ppo_clip                    | group mean          | seq_mean_token_sum_norm | 2503.20783 |
| DAPO        | ppo_clip, epsilon_high=0.28 | group mean and std  | token_mean              | 2503.14476 |
| PGPO        | ppo_clip, epsilon_high=0.28 | of gated rewards    | token_mean              | 2604.20755 |
| BNPO in TRL | ppo_clip                    | group mean and std  | token_mean ¹            |            |
| RLOO        | reinforce                   | leave-one-out       | seq_mean_token_sum      | 2402.14740 |
| GSPO        | gspo                        | group mean and std  | seq_mean_token_mean     | 2507.18071 |
| LUSPO       | luspo                       | group mean and std  | seq_mean_token_sum      | 2602.05261 |
| GMPO        | gmpo                        | group mean and std  | seq_mean_token_mean     | 2507.20673 |
| HACPO       | hacpo ³                     | hacpo               | seq_mean_token_mean     | 2603.02604 |
| PRP         | prp ³                       | pooled with peers'  | seq_mean_token_mean     | 2605.07244 |
| SGT         | ppo_clip + λ·sgt ³          | group mean and std  | seq_mean_token_mean     | 2605.07244 |
| Dual-Track  | dual_track ³                | one per track       | seq_mean_token_mean     | 2603.16448 |
| RLAD        | ppo_clip, ratio="trrd" ³    | group mean and std  | seq_mean_token_mean     | 2602.22495 |
| CISPO       | cispo                       | group mean and std  | token_mean              | 2506.13585 |
| DGPO        | dgpo                        | group mean and std  | token_mean              | 2603.14389 |
| GPPO        | gppo                        | group mean and std  | token_mean              | 2508.07629 |
| CE-GPPO     | ce_gppo                     | group mean and std  | token_mean              | 2509.20712 |
| ASPO        | aspo                        | group mean and std  | token_mean              | 2510.06062 |
| SAPO        | sapo                        | group mean and std  | seq_mean_token_mean     | 2511.20347 |
| DPPO        | dppo                        | of a group          | token_mean              | 2602.04879 |
| Clip-Cov    | clip_cov ²                  | group mean and std  | token_mean              | 2505.22617 |
| KL-Cov      | kl_cov ²                    | group mean and std  | token_mean              | 2505.22617 |

¹ divided by the tokens of each micro-batch instead of all, so that the loss depends on the cut. The paper of
  that name, 2506.02864, has another advantage instead.
² takes a fifth array, the tokens chosen from the global batch by clip_cov_tokens or kl_cov_tokens.
³ takes further arrays by name: of peers, of the second track, of the teacher.

Masked-diffusion LMs have no log-prob of a response: `diffusion_policy` has what stands for it (diffu-GRPO,
UniGRPO, coupled-GRPO, a trace) under any surrogate, and SPG; `diffusion` has the masks and the loss of
pre-training.

How much a token counts: the loss's gradient is −A·w·∇log π, with w a function of r = π/π_old (under gspo
r is the sequence's and w is shared by its tokens). Inside the bounds w = r; outside them:

| surrogate | r < 1−ε, A < 0     | r > 1+ε_high, A > 0      | r outside, A of the other sign | r = 1 |
|-----------|--------------------|--------------------------|--------------------------------|-------|
| reinforce | 1                  | 1                        | 1                              | 1     |
| ppo_clip  | 0                  | 0                        | r; 0 beyond δ where A < 0      | 1     |
| gspo      | 0                  | 0                        | r                              | 1     |
| luspo     | 0                  | 0                        | r                              | 1     |
| cispo     | 1−ε                | 1+ε_high                 | the bound                      | 1     |
| dgpo      | r^(n+1) / (1−ε)^n  | r^(1−1/m)·(1+ε_h)^(1/m)  | r                              | 1     |
| gppo      | 1−ε                | 1+ε_high                 | r; 0 beyond δ where A < 0      | 1     |
| ce_gppo   | β1·(1−ε)           | β2·(1+ε_high)            | r; 0 beyond δ where A < 0      | 1     |

Others have no such bounds, or other weights inside them:

| surrogate | w                                                                                          |
|-----------|--------------------------------------------------------------------------------------------|
| gmpo      | the geometric mean of the row's clipped ratios; 0 where log r is beyond −ε or ε_high       |
| hacpo     | own rows as gspo; others ω·s^(α+1), s the row's ratio to its author; 0 outside the bounds  |
| aspo      | A > 0: min(1/r, cap), 0 where r > 1+ε_high; A < 0: min(r, cap), 0 where r < 1−ε            |
| sapo      | 4σ(1−σ)·r with σ = sigmoid(τ·(r−1))                                                        |
| dppo      | min(r, cap); 0 where A moves a probability that has moved too far still further            |
| clip_cov  | that of ppo_clip; 0 for the chosen tokens                                                  |
| kl_cov    | r; the chosen tokens have sign(log r)·∇log π besides                                       |
"""

from jaxrl_llm.losses.aggregation import (
    AGGREGATIONS,
    Array,
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
from jaxrl_llm.losses.corrections import (
    IMPORTANCE_SAMPLING_CORRECTIONS,
    importance_sampling_correction,
    off_policy_sequence_mask,
)
from jaxrl_llm.losses.covariance import (
    clip_cov,
    clip_cov_tokens,
    covariance_means,
    kl_cov,
    kl_cov_tokens,
    token_covariance,
)
from jaxrl_llm.losses.diffusion import add_noise, example_mean, likelihood_bound, masked_cross_entropy
from jaxrl_llm.losses.diffusion_policy import (
    coupled_logp,
    full_mask_logp,
    partial_logp,
    spg,
    spg_bounds,
    spread_shares,
    trace_logp,
)
from jaxrl_llm.losses.distillation import aopd, aopd_from_logits, kdrl, kdrl_beta, opd, rlad
from jaxrl_llm.losses.divergences import (
    aopd_top_k_kl,
    forward_kl,
    gathered_top_k_kl,
    generalized_jsd,
    reverse_kl,
    top_k_kl,
)
from jaxrl_llm.losses.entropy import (
    AdaptiveEntropyState,
    adaptive_entropy_coefficient,
    adaptive_entropy_init,
    adaptive_entropy_update,
    entropy_bonus,
)
from jaxrl_llm.losses.error_suppression import error_suppression
from jaxrl_llm.losses.kl import (
    KL_ESTIMATORS,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_k3_corrected,
    kl_k3_score_corrected,
    kl_k3_straight_through,
)
from jaxrl_llm.losses.objective import AUXILIARY, SURROGATES, Objective, policy_objective
from jaxrl_llm.losses.peers import prp, rescue_weights, sgt
from jaxrl_llm.losses.preference import (
    bradley_terry,
    dpo,
    ipo,
    kto,
    kto_reference_point,
    mpo,
    orpo,
    sequence_logp,
    simpo,
)
from jaxrl_llm.losses.presets import PRESETS
from jaxrl_llm.losses.ratios import (
    RATIOS,
    Ratio,
    log_ratio,
    ratio_statistics,
    sequence_log_ratio,
    trrd_log_ratio,
)
from jaxrl_llm.losses.retrieval import facet_kl, in_batch_negatives, info_nce, triplet_margin
from jaxrl_llm.losses.reward_models import arm, extreme_rows, group_reward_entropy, r2m, uniarm
from jaxrl_llm.losses.scope import scope, scope_weights
from jaxrl_llm.losses.sequence_surrogates import gmpo, gspo, hacpo, luspo
from jaxrl_llm.losses.soft_clipping import aspo, ce_gppo, cispo, dgpo, gppo, sapo
from jaxrl_llm.losses.supervised import negative_log_likelihood
from jaxrl_llm.losses.surrogates import dppo, ppo_clip, reinforce
from jaxrl_llm.losses.tracks import dual_track, prefix_mask, segmented_whitening, summed_advantages
from jaxrl_llm.losses.value import clipped_value_loss
from jaxrl_llm.losses.wmss import wmss, wmss_sampling_weights

__all__ = [
    "AGGREGATIONS",
    "AUXILIARY",
    "IMPORTANCE_SAMPLING_CORRECTIONS",
    "KL_ESTIMATORS",
    "PRESETS",
    "RATIOS",
    "SURROGATES",
    "AdaptiveEntropyState",
    "Array",
    "EffectiveSize",
    "Max",
    "Metric",
    "Metrics",
    "Min",
    "Objective",
    "Ratio",
    "WeightedSum",
    "adaptive_entropy_coefficient",
    "adaptive_entropy_init",
    "adaptive_entropy_update",
    "add_noise",
    "aggregate",
    "aopd",
    "aopd_from_logits",
    "aopd_top_k_kl",
    "arm",
    "aspo",
    "bradley_terry",
    "ce_gppo",
    "cispo",
    "clip_cov",
    "clip_cov_tokens",
    "clipped_value_loss",
    "coupled_logp",
    "covariance_means",
    "dgpo",
    "dpo",
    "dppo",
    "dual_track",
    "entropy_bonus",
    "error_suppression",
    "example_mean",
    "extreme_rows",
    "facet_kl",
    "finalize",
    "forward_kl",
    "full_mask_logp",
    "gathered_top_k_kl",
    "generalized_jsd",
    "gmpo",
    "gppo",
    "group_reward_entropy",
    "gspo",
    "hacpo",
    "importance_sampling_correction",
    "in_batch_negatives",
    "info_nce",
    "ipo",
    "kdrl",
    "kdrl_beta",
    "kl_cov",
    "kl_cov_tokens",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_k3_corrected",
    "kl_k3_score_corrected",
    "kl_k3_straight_through",
    "kto",
    "kto_reference_point",
    "likelihood_bound",
    "log_ratio",
    "luspo",
    "masked_cross_entropy",
    "merge",
    "mpo",
    "negative_log_likelihood",
    "off_policy_sequence_mask",
    "opd",
    "orpo",
    "partial_logp",
    "policy_objective",
    "ppo_clip",
    "prefix_mask",
    "prp",
    "r2m",
    "ratio_statistics",
    "reinforce",
    "rescue_weights",
    "reverse_kl",
    "rlad",
    "sapo",
    "scope",
    "scope_weights",
    "segmented_whitening",
    "sequence_log_ratio",
    "sequence_logp",
    "sgt",
    "simpo",
    "spg",
    "spg_bounds",
    "spread_shares",
    "summed_advantages",
    "token_covariance",
    "top_k_kl",
    "trace_logp",
    "triplet_margin",
    "trrd_log_ratio",
    "uniarm",
    "wmss",
    "wmss_sampling_weights",
]
