"""Statistics of whole next-token distributions straight from hidden states."""

from jaxrl_kernels.linear_distribution.api import (
    Collision,
    linear_collision,
    linear_gather,
    linear_jsd,
    linear_kl,
    linear_top_k,
)

__all__ = [
    "Collision",
    "linear_collision",
    "linear_gather",
    "linear_jsd",
    "linear_kl",
    "linear_top_k",
]
