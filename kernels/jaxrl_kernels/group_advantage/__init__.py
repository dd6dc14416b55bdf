"""Advantages of rows compared with the others of their group, on groups of any size in any order."""

from jaxrl_kernels.group_advantage.api import GroupAdvantage, group_advantage

__all__ = ["GroupAdvantage", "group_advantage"]
