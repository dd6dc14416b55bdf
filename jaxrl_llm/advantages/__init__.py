"""Advantages: rewards in, one number per sequence or token out. Imports jax alone."""

from jaxrl_llm.advantages.group import ADVANTAGES, dr_grpo, group_advantage, grpo, rloo

__all__ = ["ADVANTAGES", "dr_grpo", "group_advantage", "grpo", "rloo"]
