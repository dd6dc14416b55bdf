"""Advantages: rewards in, one number per sequence or token out. Imports jax alone.

Every advantage in `ADVANTAGES` is `(rewards f[N], group i[N], valid bool[N] | None, *, options) ->
(advantages f[N], metrics)`. Weighting and adding several reward functions comes before: the total arrives
here. `opo` needs the rows' lengths, `pass_at_k` its k.

| method        | name    | baseline                | scale        | further            | paper      |
|---------------|---------|-------------------------|--------------|--------------------|------------|
| GRPO          | grpo    | group mean              | group's std  |                    | 2402.03300 |
| Dr.GRPO       | dr_grpo | group mean              | none         |                    | 2503.20783 |
| RLOO          | rloo    | mean of the others      | none         |                    | 2402.14740 |
| OPO           | opo     | mean, by length         | none         |                    | 2505.23585 |
| REINFORCE++   | (1)     | group mean              | batch's std  | less batch's mean  | 2501.03262 |
| BNPO          | bnpo    | group mean              | Beta density | a, b over prompts  | 2506.02864 |
| GRPO pass@k   | (2)     | second best row         | group's std  | the best row alone | 2503.19595 |
| pass@k train. | (3)     | pass@k of the group     | its std      | mean over k-sets   | 2508.10751 |
| HACPO         | hacpo   | group mean of ω·reward  | group's std  | ω of capabilities  | 2603.02604 |
| HA-DW on GRPO | ha_dw   | group mean              | group's std  | weight Φ, anchor C | 2601.08521 |
| XGRPO         | xgrpo   | mean of own and peers   | their std    | own rows alone     | 2605.07244 |
| one track     | (4)     | group mean              | population's | clipped at ±10     | 2603.16448 |

(1) reinforce_plus_plus_baseline, (2) grpo_pass_at_k, (3) pass_at_k, (4) clipped_grpo. With signatures of
their own: over tokens and turns `gae`, `turn_level_gae`, `reinforce_plus_plus` and `dual_track`; of several
rewards `gdpo` and `hian`; `remax`. Around them: factors of the advantage from difficulty (`ha_dw_weights`)
and entropy (`modulation_weights`), the agents' capabilities (`capability_ratios`), rewards by what a turn or
a role added (`praise_rewards`, `search_role_rewards`, `coding_role_rewards`), and shaped rewards
(`waypoint_reward`, `importance_length_penalty`, `process_gated_reward`; `length_filter` for prompts).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxrl_llm.advantages.beta_normalization import beta_parameters, bnpo, success_rate_statistics
from jaxrl_llm.advantages.differences import (
    coding_role_rewards,
    praise_rewards,
    search_role_rewards,
    shared_role_rewards,
    turn_differences,
    turn_ends,
    with_format_penalty,
)
from jaxrl_llm.advantages.difficulty import (
    HaDwState,
    baseline_bias,
    ha_dw,
    ha_dw_anchor,
    ha_dw_init,
    ha_dw_step,
    ha_dw_update,
    ha_dw_weights,
)
from jaxrl_llm.advantages.group import (
    dr_grpo,
    group_advantage,
    grpo,
    hacpo,
    opo,
    reinforce_plus_plus_baseline,
    rloo,
    usable_rows,
)
from jaxrl_llm.advantages.modulation import (
    MODULATIONS,
    Extremes,
    entropy_change,
    modulation_extremes,
    modulation_weights,
)
from jaxrl_llm.advantages.pass_at_k import grpo_pass_at_k, pass_at_k_training
from jaxrl_llm.advantages.peers import (
    CapabilityState,
    capability,
    capability_init,
    capability_ratios,
    capability_update,
    xgrpo,
)
from jaxrl_llm.advantages.returns import (
    at_last_token,
    discounted_returns,
    gae,
    reinforce_plus_plus,
    reinforce_plus_plus_returns,
    remax,
    turn_level_gae,
    turns_to_tokens,
    usable_tokens,
)
from jaxrl_llm.advantages.several_rewards import gdpo, gdpo_scores, hian, usable_scores
from jaxrl_llm.advantages.shaping import (
    LengthBounds,
    helper_probe_reward,
    importance_length_penalty,
    length_filter,
    length_penalised_reward,
    length_quantiles,
    process_gated_reward,
    waypoint_coverage,
    waypoint_reward,
)
from jaxrl_llm.advantages.tracks import clipped_grpo, dual_track
from jaxrl_llm.advantages.whitening import (
    BatchStatistics,
    batch_statistics,
    merge_statistics,
    whiten,
    whiten_groups,
)
from jaxrl_llm.losses.aggregation import Array, Metrics

ADVANTAGES: dict[str, Callable[..., tuple[Array, Metrics]]] = {
    "group": group_advantage,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "hacpo": hacpo,
    "ha_dw": ha_dw,
    "clipped_grpo": clipped_grpo,
    "xgrpo": xgrpo,
    "opo": opo,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "bnpo": bnpo,
    "grpo_pass_at_k": grpo_pass_at_k,
    "pass_at_k": pass_at_k_training,
}


class Tracked(NamedTuple):
    """An advantage that remembers earlier batches, as pure functions.

    Attributes:
      init: () -> the state before the first batch, a pytree of arrays.
      step: (state, rewards, group, valid, *, options) -> (advantages, state after the batch, metrics).
    """

    init: Callable[[], Any]
    step: Callable[..., tuple[Array, Any, Metrics]]


TRACKED: dict[str, Tracked] = {"ha_dw": Tracked(ha_dw_init, ha_dw_step)}
"""Where training takes these instead of the function of the same name in `ADVANTAGES`."""

__all__ = [
    "ADVANTAGES",
    "MODULATIONS",
    "TRACKED",
    "BatchStatistics",
    "CapabilityState",
    "Extremes",
    "HaDwState",
    "LengthBounds",
    "at_last_token",
    "baseline_bias",
    "batch_statistics",
    "beta_parameters",
    "bnpo",
    "capability",
    "capability_init",
    "capability_ratios",
    "capability_update",
    "clipped_grpo",
    "coding_role_rewards",
    "discounted_returns",
    "dr_grpo",
    "dual_track",
    "entropy_change",
    "gae",
    "gdpo",
    "gdpo_scores",
    "group_advantage",
    "grpo",
    "grpo_pass_at_k",
    "ha_dw",
    "ha_dw_anchor",
    "ha_dw_init",
    "ha_dw_step",
    "ha_dw_update",
    "ha_dw_weights",
    "hacpo",
    "helper_probe_reward",
    "hian",
    "importance_length_penalty",
    "length_filter",
    "length_penalised_reward",
    "length_quantiles",
    "merge_statistics",
    "modulation_extremes",
    "modulation_weights",
    "opo",
    "pass_at_k_training",
    "praise_rewards",
    "process_gated_reward",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "reinforce_plus_plus_returns",
    "remax",
    "rloo",
    "search_role_rewards",
    "shared_role_rewards",
    "success_rate_statistics",
    "turn_differences",
    "turn_ends",
    "turn_level_gae",
    "turns_to_tokens",
    "usable_rows",
    "usable_scores",
    "usable_tokens",
    "waypoint_coverage",
    "waypoint_reward",
    "whiten",
    "whiten_groups",
    "with_format_penalty",
    "xgrpo",
]
