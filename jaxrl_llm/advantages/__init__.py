"""Advantages: rewards in, one number per sequence or token out. Imports jax alone.

Every advantage in `ADVANTAGES` is `(rewards f[N], group i[N], valid bool[N] | None, *, options) ->
(advantages f[N], metrics)`. Weighting and adding several reward functions comes before: the total arrives
here.

| method        | name    | baseline                | scale        | further            | paper      |
|---------------|---------|-------------------------|--------------|--------------------|------------|
| GRPO          | grpo    | group mean              | group's std  |                    | 2402.03300 |
| Dr.GRPO       | dr_grpo | group mean              | none         |                    | 2503.20783 |
| RLOO          | rloo    | mean of the others      | none         |                    | 2402.14740 |
| HACPO         | hacpo   | group mean of ω·reward  | group's std  | ω of capabilities  | 2603.02604 |
| HA-DW on GRPO | ha_dw   | group mean              | group's std  | weight Φ, anchor C | 2601.08521 |
"""

from collections.abc import Callable

from jaxrl_llm.advantages.difficulty import (
    HaDwState,
    ha_dw,
    ha_dw_anchor,
    ha_dw_init,
    ha_dw_update,
    ha_dw_weights,
)
from jaxrl_llm.advantages.group import dr_grpo, group_advantage, grpo, hacpo, rloo
from jaxrl_llm.losses.aggregation import Array, Metrics

ADVANTAGES: dict[str, Callable[..., tuple[Array, Metrics]]] = {
    "group": group_advantage,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "hacpo": hacpo,
    "ha_dw": ha_dw,
}

__all__ = [
    "ADVANTAGES",
    "HaDwState",
    "dr_grpo",
    "group_advantage",
    "grpo",
    "ha_dw",
    "ha_dw_anchor",
    "ha_dw_init",
    "ha_dw_update",
    "ha_dw_weights",
    "hacpo",
    "rloo",
]
