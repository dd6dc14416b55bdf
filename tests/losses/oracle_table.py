"""What of ours is the same as each case of golden/<library>.json: `OURS[library][case]`, of its inputs.

Where a preset has the setting, the case goes through `PRESETS`.
"""

import jax.numpy as jnp
from oracle_parts import (
    TRL,
    TUNIX,
    VERL,
    Ours,
    adaptive_entropy,
    aggregated,
    all_pairs,
    both_rewards,
    by_covariance,
    corrected_by_sequence,
    distilled,
    dpo,
    entropy_of,
    every,
    far,
    fused,
    generalised_advantages,
    given,
    halves,
    kl,
    kto,
    mean,
    objective,
    odds_ratio,
    of_means,
    of_tokens,
    off_policy_mask,
    on_policy_distillation,
    orpo_over_tokens,
    outcome,
    overlong,
    pairs,
    rejected,
    rloo_clip,
    rows,
    scaled,
    straight_through,
    top_k_of_student,
    two_groups,
    value_loss,
    weighed,
)

from jaxrl_llm import advantages, losses
from jaxrl_llm.advantages.group import opo, reinforce_plus_plus_baseline
from jaxrl_llm.advantages.pass_at_k import grpo_pass_at_k
from jaxrl_llm.advantages.returns import reinforce_plus_plus, remax
from jaxrl_llm.advantages.several_rewards import gdpo
from jaxrl_llm.losses import divergences, preference
from jaxrl_llm.losses.aggregation import masked
from jaxrl_llm.losses.presets import PRESETS

CLIP_15 = {"surrogate_options": {"epsilon": 0.1, "epsilon_high": 0.28, "delta": 1.5}}

OURS: dict[str, dict[str, Ours]] = {
    "trl": {
        "grpo": objective(TRL, "grpo"),
        "bnpo": objective(TRL, "bnpo"),
        "dr_grpo": objective(TRL, "dr_grpo", norm=10),
        "dapo": objective(TRL, "dapo"),
        "sapo": objective(TRL, "sapo"),
        "gspo": objective(TRL, "gspo"),
        "cispo": objective(TRL, "cispo", surrogate_options={"epsilon_high": 0.5}),
        "luspo": objective(TRL, "luspo"),
        "gmpo": given(objective(TRL, "gmpo"), advantages="counted_advantages"),
        "rloo": rloo_clip,
        "grpo, two sides and dual": objective(TRL, "grpo", **CLIP_15),
        "dapo, advantages of tokens": of_tokens(
            objective(TRL, "dapo", surrogate_options={"epsilon_high": 0.28})
        ),
        "luspo, ratios of tokens": objective(TRL, "luspo", ratio="token"),
        "sapo, temperatures": objective(
            TRL, "sapo", surrogate_options={"temperature_pos": 0.7, "temperature_neg": 1.9}
        ),
        "grpo, kl": objective(TRL, "grpo", auxiliary={"k3_corrected": 0.04}),
        "grpo, kl uncorrected": objective(TRL, "grpo", auxiliary={"k3": 0.04}),
        "gspo, kl": objective(TRL, "gspo", auxiliary={corrected_by_sequence: 0.04}),
        "dapo, entropy bonus": objective(TRL, "dapo", auxiliary={"entropy": 0.01}),
        "adaptive entropy": adaptive_entropy,
        "off-policy sequence mask": off_policy_mask,
        **{
            f"correction {mode}": objective(
                TRL, "grpo", correction=mode, correction_options={"floor": 0.8, "cap": 1.4}
            )
            for mode in ("token_truncate", "token_mask", "sequence_truncate")
        },
        "correction sequence_mask": objective(TRL, "grpo", **PRESETS[TRL]["grpo"]["sampler"]),
        **{f"advantages, scale {scale}": scaled(scale) for scale in ("group", "batch", "none")},
        "advantages, normalised one by one": lambda b: gdpo(
            both_rewards(b), two_groups(b), weights=[1.0, 0.5], epsilon=1e-4
        )[0],
        "advantages, one without a verdict": scaled("group", "partial_rewards"),
        "rloo advantages": lambda b: advantages.rloo(b["rewards"], two_groups(b))[0],
        "dpo": dpo(beta=0.1),
        "ipo": lambda b: all_pairs(preference.ipo(*pairs(b, normalise=True), every(4), beta=0.1)),
        "kto": kto(beta=0.3, undesirable_weight=0.7),
        "bradley-terry": halves(preference.bradley_terry, "scores"),
        "bradley-terry, margin": lambda b: all_pairs(
            preference.bradley_terry(*jnp.split(b["scores"], 2), every(4), margin=b["margin"])
        ),
        "odds ratio": odds_ratio,
        "simpo": halves(preference.simpo, "mean_logp", beta=2.0, gamma=0.5),
        "jsd, beta 0.0": distilled(divergences.forward_kl),
        "jsd, beta 0.3": distilled(divergences.generalized_jsd, beta=0.3),
        "jsd, beta 0.5": distilled(divergences.generalized_jsd, beta=0.5, temperature=2.0),
        "jsd, beta 1.0": distilled(divergences.reverse_kl),
        "top-2 forward kl with tail": distilled(divergences.top_k_kl, k=2),
        "top-2 reverse kl with tail": top_k_of_student,
        "on-policy distillation": on_policy_distillation,
        "overlong penalty": overlong,
    },
    "verl": {
        "vanilla": objective(VERL, "grpo"),
        "gspo": objective(VERL, "gspo"),
        "sapo": objective(VERL, "sapo"),
        "gpg": lambda b: mean(
            losses.reinforce(b["logp"], b["old_logp"], b["advantages"][:, None], b["mask"])[0], b["mask"]
        ),
        "geo_mean": objective(VERL, "gmpo"),
        "cispo": objective(VERL, "cispo"),
        "dppo_tv": objective(VERL, "dppo_tv"),
        "dppo_kl": objective(VERL, "dppo_kl"),
        "vanilla, two sides and dual": of_tokens(objective(VERL, "grpo", **CLIP_15)),
        "vanilla, far ratios": far(
            objective(VERL, "grpo", surrogate_options={"epsilon": 0.9999, "epsilon_high": 1e9, "delta": 1e9})
        ),
        "sapo, far ratios": far(objective(VERL, "sapo")),
        "gspo, far ratios": far(objective(VERL, "gspo")),
        "cispo, far ratios": far(objective(VERL, "cispo")),
        "gspo, mean of sequences": of_tokens(
            objective(
                VERL,
                "gspo",
                aggregation="seq_mean_token_mean",
                surrogate_options={"epsilon": 0.1, "epsilon_high": 0.15},
            )
        ),
        "dppo_tv, two sides": of_tokens(
            objective(VERL, "dppo_tv", surrogate_options={"epsilon": 0.1, "epsilon_high": 0.15})
        ),
        "dppo_kl, two sides": of_tokens(
            objective(VERL, "dppo_kl", surrogate_options={"epsilon": 0.01, "epsilon_high": 0.1})
        ),
        "clip_cov": by_covariance("clip_cov", share=1.0, lower=0.1, upper=0.5),
        "kl_cov": by_covariance("kl_cov", share=0.15),
        "correction tis": objective(
            VERL, "grpo", correction="token_truncate", correction_options={"cap": 1.4}
        ),
        "correction icepop": objective(
            VERL, "grpo", correction="token_mask", correction_options={"floor": 0.8, "cap": 1.4}
        ),
        "correction sequence tis": objective(
            VERL, "grpo", correction="sequence_truncate", correction_options={"cap": 1.4}
        ),
        "correction sequence rejection": rejected,
        "kl k1": kl("k1"),
        "kl k2": kl("k2"),
        "kl k3": kl("k3", **PRESETS[VERL]["grpo"]["objective"]["auxiliary_options"]["k3"]),
        "kl k1+": straight_through("k1"),
        "kl k3+": kl("k3_straight_through", value_clamp=10.0),
        "aggregation token-mean": aggregated("token_mean"),
        "aggregation seq-mean-token-mean": aggregated("seq_mean_token_mean"),
        "aggregation seq-mean-token-sum": aggregated("seq_mean_token_sum"),
        "aggregation seq-mean-token-sum-norm": aggregated("seq_mean_token_sum_norm", norm=6),
        "entropy": lambda b: -mean(losses.entropy_bonus(entropy_of(b["logits"]), b["mask"])[0], b["mask"]),
        "value loss": value_loss,
        "garbage where masked": of_tokens(given(objective(VERL, "grpo"), logp="garbage_logp")),
        "grpo advantages": outcome(advantages.grpo),
        "dr_grpo advantages": outcome(advantages.dr_grpo),
        "grpo_vectorized advantages": outcome(advantages.grpo),
        "rloo advantages": outcome(advantages.rloo),
        "rloo_vectorized advantages": outcome(advantages.rloo),
        "opo advantages": weighed(opo),
        "pass@k advantages": outcome(grpo_pass_at_k),
        "reinforce++ baseline advantages": weighed(reinforce_plus_plus_baseline, epsilon=0.0),
        "reinforce++ advantages": lambda b: reinforce_plus_plus(
            b["token_rewards"],
            jnp.zeros_like(b["token_rewards"]),
            b["mask"],
            beta=0.0,
            gamma=0.97,
            epsilon=0.0,
        )[0],
        "remax advantages": lambda b: rows(remax(b["rewards"], b["greedy_rewards"])[0], b["mask"]),
        "gdpo advantages": lambda b: rows(
            gdpo(both_rewards(b), b["group"], weights=[1.0, 0.5], lengths=b["mask"].sum(1))[0], b["mask"]
        ),
        "gae": generalised_advantages,
        "kl in the reward": lambda b: masked(
            b["token_rewards"] - 0.05 * losses.kl_k1(b["old_logp"], b["ref_logp"], b["mask"])[0], b["mask"]
        ),
    },
    "liger": {
        **{name: fused(objective(TRL, name)) for name in ("grpo", "bnpo", "dapo", "sapo", "gspo", "luspo")},
        "dr_grpo": fused(objective(TRL, "dr_grpo", norm=10)),
        "cispo": fused(objective(TRL, "cispo", surrogate_options={"epsilon_high": 0.5})),
        "grpo, two sides and dual": fused(objective(TRL, "grpo", **CLIP_15)),
        "dapo, kl": fused(objective(TRL, "dapo", auxiliary={"k3": 0.04})),
        "dapo, kl corrected": fused(objective(TRL, "dapo", auxiliary={"k3_corrected": 0.04})),
        "grpo, corrected": fused(
            objective(TRL, "grpo", correction="token_truncate", correction_options={"cap": 1.4})
        ),
        "dpo": fused(dpo(beta=0.1)),
        "kto": fused(kto(beta=0.3)),
        "orpo": fused(orpo_over_tokens),
        "simpo": fused(of_means(preference.simpo, beta=2.0, gamma=0.5)),
        "jsd, beta 0.0": fused(distilled(divergences.generalized_jsd, beta=0.0)),
        "jsd, beta 0.3": fused(distilled(divergences.generalized_jsd, beta=0.3)),
        "jsd, beta 1.0": fused(distilled(divergences.generalized_jsd, beta=1.0)),
    },
    "tunix": {
        "grpo": objective(TUNIX, "grpo"),
        "dr_grpo": objective(TUNIX, "dr_grpo", norm=6),
        "dapo": objective(TUNIX, "dapo"),
        "gspo": objective(TUNIX, "gspo", auxiliary={"k1": 0.0}),
        "grpo, k3": objective(TUNIX, "grpo", auxiliary={"k1": 0.0, "k3": 0.04}),
        "grpo, k2": objective(TUNIX, "grpo", auxiliary={"k1": 0.0, "k2": 0.04}),
        "grpo, k3 clamped": objective(
            TUNIX, "grpo", auxiliary={"k1": 0.0, "k3": 0.04}, auxiliary_options={"k3": {"value_clamp": 10.0}}
        ),
        "grpo, dual": objective(
            TUNIX, "grpo", auxiliary={"k1": 0.0}, surrogate_options={"epsilon_high": 0.28, "delta": 1.5}
        ),
        "grpo, far ratios": far(objective(TUNIX, "grpo", auxiliary={"k1": 0.0}, aggregation="token_mean")),
        "grpo, corrected": objective(
            TUNIX,
            "grpo",
            auxiliary={"k1": 0.0},
            correction="token_truncate",
            correction_options={"cap": 1.4},
        ),
        "ppo": lambda b: of_tokens(objective(TUNIX, "ppo", auxiliary={"entropy": 0.01}, **CLIP_15))(
            b | {"entropy": entropy_of(b["logits"])}
        ),
        "value loss": value_loss,
        "gae": generalised_advantages,
        "aggregation token-mean": aggregated("token_mean"),
        "aggregation sequence-mean-token-mean": aggregated("seq_mean_token_mean"),
        "aggregation sequence-mean-token-scale": aggregated("seq_mean_token_sum_norm", norm=6),
        "aggregation seq-mean-token-sum": aggregated("seq_mean_token_sum"),
        # whose default norm is the number of rows: no norm at all
        "aggregation sequence-mean-token-sum-norm": aggregated("seq_mean_token_sum"),
        "kl kl": kl("k1"),
        "kl mse_kl": kl("k2"),
        "kl low_var_kl": kl("k3"),
        "grpo advantages": lambda b: advantages.grpo(b["rewards"], two_groups(b))[0],
        "rloo advantages": lambda b: advantages.rloo(b["rewards"], two_groups(b))[0],
        "dr_grpo advantages": lambda b: advantages.dr_grpo(b["rewards"], two_groups(b))[0],
        "dpo": dpo(beta=0.1),
        "dpo, smoothed": dpo(beta=0.1, label_smoothing=0.1),
        # over all positions, and times T²
        "forward kl": lambda b: (
            4
            * mean(
                divergences.forward_kl(
                    b["logits"], b["teacher_logits"], jnp.ones((8, 6), bool), temperature=2.0
                )[0],
                jnp.ones((8, 6), bool),
            )
        ),
    },
}
