"""Other libraries' objectives, and the papers', as keywords: `PRESETS[preset][method]`.

    preset = PRESETS["verl-0.9"]["grpo"]
    objective = policy_objective(**preset["objective"])

An entry says what the library does when the method is chosen and every number is left at its default. It has

  objective: keywords of `policy_objective`;
  advantage: {"name": one of the functions of `advantages`, and its options};
  sampler: keywords to add to the objective's where another program samples (`{}` for none by default).

| what differs             | trl-1.16            | verl-0.9           | tunix-0.1.7         | paper        |
|--------------------------|---------------------|--------------------|---------------------|--------------|
| GRPO's aggregation       | seq_mean_token_mean | token_mean         | seq_mean_token_mean | as TRL       |
| rows without a token     | count as rows       | do not             | do not              | do not       |
| GRPO's reference KL      | r·k3, β = 0         | k3 ≤ 10, β = 0     | k1, β = 0.04        | k3, β = 0.04 |
| dual clip                | none                | 3                  | none                | none         |
| ε of the advantage       | 1e-4                | 1e-6               | 1e-6                | 1e-6         |
| norm of Dr.GRPO          | longest completion  | width of the mask  | width of the mask   | as TRL       |
| CISPO's weight           | at most 5           | from 0.8 to 1.2    | has none            | 1 ± ε        |
| GSPO's form, bounds      | sequence, 0.2       | token, 0.2         | token, 0.2          | 3e-4, 4e-4   |
| GSPO's aggregation       | seq_mean_token_mean | token_mean         | seq_mean_token_mean | as TRL       |
| GMPO's bounds            | 0.4                 | 0.2                | has none            | 0.4          |
| sampler correction       | sequence_mask, 3    | none               | none                | none         |

`seq_mean_token_sum_norm` needs `norm=` besides, which no default can know. A reference KL that is off by
default stands there with the coefficient 0, so that it is the one a coefficient switches on. All standard
deviations are the sample's. Log-ratios are clamped to ±20 nats as everywhere here, as in Tunix's GRPO and
most of verl, while TRL's gradient is not finite where a ratio overflows. Tunix's k1 as a loss pulls
nowhere: its expected gradient on-policy is 0 (`losses.kl`).

What a preset cannot say: TRL takes its entropy bonus as a mean over tokens in every aggregation, and with
sequence ratios corrects the KL by those; verl gives a group of one its reward as advantage, here it is 0.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from jaxrl_llm.losses.covariance import clip_cov, kl_cov

INFINITE = float("inf")

Preset: TypeAlias = dict[str, dict[str, Any]]
Surrogate: TypeAlias = str | Callable[..., Any]


def _entry(
    surrogate: Surrogate,
    options: dict[str, Any],
    advantage: dict[str, Any],
    aggregation: str,
    *,
    sampler: dict[str, Any] | None = None,
    **objective: Any,
) -> Preset:
    parts = {"surrogate": surrogate, "surrogate_options": options, "aggregation": aggregation}
    return {"objective": parts | objective, "advantage": advantage, "sampler": sampler or {}}


def _trl(
    surrogate: Surrogate,
    options: dict[str, Any],
    aggregation: str = "token_mean",
    scale: str = "group",
    **more: Any,
) -> Preset:
    return _entry(
        surrogate,
        options,
        {"name": "group", "scale": scale, "epsilon": 1e-4},
        aggregation,
        count_empty=True,
        auxiliary={"k3_corrected": 0.0},
        sampler={"correction": "sequence_mask", "correction_options": {"cap": 3.0}},
        **more,
    )


def _verl(
    surrogate: Surrogate = "ppo_clip",
    options: dict[str, Any] | None = None,
    advantage: dict[str, Any] | None = None,
    aggregation: str = "token_mean",
    **more: Any,
) -> Preset:
    """By default its `vanilla` loss; the losses that have no advantage of their own get GRPO's."""
    return _entry(
        surrogate,
        {"epsilon": 0.2, "delta": 3.0} if options is None else options,
        {"name": "grpo", "epsilon": 1e-6} if advantage is None else advantage,
        aggregation,
        auxiliary={"k3": 0.0},
        auxiliary_options={"k3": {"value_clamp": 10.0}},
        **more,
    )


def _tunix(
    options: dict[str, Any],
    aggregation: str,
    advantage: str = "grpo",
    surrogate: Surrogate = "ppo_clip",
    **more: Any,
) -> Preset:
    epsilon = {"epsilon": 1e-6} if advantage == "grpo" else {}
    return _entry(surrogate, options, {"name": advantage} | epsilon, aggregation, **more)


def _paper(
    surrogate: Surrogate,
    options: dict[str, Any],
    aggregation: str = "seq_mean_token_mean",
    advantage: str = "grpo",
    **more: Any,
) -> Preset:
    return _entry(surrogate, options, {"name": advantage}, aggregation, **more)


CLIP: dict[str, Any] = {"epsilon": 0.2}
GSPO_CLAMP: dict[str, Any] = {"clamp": INFINITE, "clamp_high": 10.0}

PRESETS: dict[str, dict[str, Preset]] = {
    "trl-1.16": {
        "grpo": _trl("ppo_clip", CLIP, "seq_mean_token_mean"),
        "dr_grpo": _trl("ppo_clip", CLIP, "seq_mean_token_sum_norm", scale="none"),
        "dapo": _trl("ppo_clip", CLIP),
        "bnpo": _trl("ppo_clip", CLIP),  # TRL's mean is over one micro-batch, here it is over the batch
        "gspo": _trl("ppo_clip", CLIP, "seq_mean_token_mean", ratio="sequence"),
        # its epsilon_high is the weight's bound itself; by default 0.2, while its documentation asks for 5
        "cispo": _trl("cispo", {"epsilon": INFINITE, "epsilon_high": 4.0}),
        "sapo": _trl("sapo", {"temperature_pos": 1.0, "temperature_neg": 1.05}, "seq_mean_token_mean"),
        "luspo": _trl("ppo_clip", CLIP, "seq_mean_token_sum", ratio="sequence"),
        "gmpo": _trl("gmpo", {"epsilon": 0.4}, "seq_mean_token_mean"),
    },
    "verl-0.9": {
        "grpo": _verl(),
        "dr_grpo": _verl(advantage={"name": "dr_grpo"}, aggregation="seq_mean_token_sum_norm"),
        "gspo": _verl("ppo_clip", CLIP, ratio="sequence_token", ratio_options=GSPO_CLAMP),
        "sapo": _verl(
            "sapo", {"temperature_pos": 1.0, "temperature_neg": 1.05}, aggregation="seq_mean_token_mean"
        ),
        "cispo": _verl("cispo", CLIP),
        "gmpo": _verl("gmpo", CLIP, aggregation="seq_mean_token_mean", count_empty=True),
        "dppo_tv": _verl("dppo", {"form": "tv", "epsilon": 0.2, "cap": 3.0}),  # its dual clip's 3 is the cap
        "dppo_kl": _verl("dppo", {"form": "kl", "epsilon": 0.2, "cap": 3.0}),
        "clip_cov": _verl(clip_cov, CLIP),
        "kl_cov": _verl(kl_cov, {"coefficient": 0.1}),
        "rloo": _verl(advantage={"name": "rloo"}),
        "opo": _verl(advantage={"name": "opo"}),
        "remax": _verl(advantage={"name": "remax"}),
        "reinforce_plus_plus": _verl(advantage={"name": "reinforce_plus_plus", "beta": 0.0, "epsilon": 0.0}),
        "reinforce_plus_plus_baseline": _verl(
            advantage={"name": "reinforce_plus_plus_baseline", "epsilon": 0.0}
        ),
        "gdpo": _verl(advantage={"name": "gdpo", "epsilon": 1e-6}),
        "pass_at_k": _verl(advantage={"name": "grpo_pass_at_k", "epsilon": 1e-6}),
        "ppo": _verl(advantage={"name": "gae", "gamma": 1.0, "lam": 1.0}),  # whitened over tokens afterwards
    },
    "tunix-0.1.7": {
        "grpo": _tunix(CLIP, "seq_mean_token_mean", auxiliary={"k1": 0.04}),
        "dr_grpo": _tunix(CLIP, "seq_mean_token_sum_norm", "dr_grpo", auxiliary={"k1": 0.04}),
        "dapo": _tunix({"epsilon": 0.2, "epsilon_high": 0.28}, "token_mean"),
        "gspo": _tunix(
            CLIP,
            "seq_mean_token_mean",
            ratio="sequence_token",
            ratio_options=GSPO_CLAMP,
            auxiliary={"k1": 0.04},
        ),
        "rloo": _tunix(CLIP, "seq_mean_token_mean", "rloo", auxiliary={"k1": 0.04}),
        "ppo": _entry("ppo_clip", CLIP, {"name": "gae", "gamma": 1.0, "lam": 0.95}, "token_mean"),
    },
    "paper": {
        "reinforce": _paper("reinforce", {}, "seq_mean_token_sum"),
        "grpo": _paper("ppo_clip", CLIP, auxiliary={"k3": 0.04}),
        "dr_grpo": _paper("ppo_clip", CLIP, "seq_mean_token_sum_norm", "dr_grpo"),
        "rloo": _paper("reinforce", {}, "seq_mean_token_sum", "rloo"),
        "dapo": _paper("ppo_clip", {"epsilon": 0.2, "epsilon_high": 0.28}, "token_mean"),
        "gspo": _paper("gspo", {"epsilon": 3e-4, "epsilon_high": 4e-4}),
        "luspo": _paper("luspo", {"epsilon": 2e-3, "epsilon_high": 2.5e-3}, "seq_mean_token_sum"),
        "gmpo": _paper("gmpo", {"epsilon": 0.4}),
        "cispo": _paper("cispo", {"epsilon": 0.2}, "token_mean"),  # the paper names no number
        "sapo": _paper("sapo", {"temperature_pos": 1.0, "temperature_neg": 1.05}),
        "gppo": _paper("gppo", CLIP, "token_mean"),
        "ce_gppo": _paper("ce_gppo", {"epsilon": 0.2, "beta1": 0.75, "beta2": 1.0}, "token_mean"),
        "aspo": _paper("aspo", CLIP, "token_mean"),
        "dppo_tv": _paper("dppo", {"form": "tv", "epsilon": 0.15}, "token_mean"),
        "dppo_kl": _paper("dppo", {"form": "kl", "epsilon": 0.05}, "token_mean"),
        "clip_cov": _paper(clip_cov, {"epsilon": 1.0}, "token_mean"),
        "kl_cov": _paper(kl_cov, {"coefficient": 1.0}, "token_mean"),
        "dgpo": _paper("dgpo", {"epsilon": 0.2, "left_decay": 1.0, "right_decay": 2.0}, "token_mean"),
    },
}
