"""Statistics of whole next-token distributions straight from hidden states."""

from jaxrl_kernels.linear_distribution.api import (
    Collision,
    linear_collision,
    linear_gather,
    linear_jsd,
    linear_kl,
    linear_top_k,
)
from jaxrl_kernels.linear_distribution.top_k import top_k_forward_kl

__all__ = [
    "Collision",
    "linear_collision",
    "linear_gather",
    "linear_jsd",
    "linear_kl",
    "linear_top_k",
    "top_k_forward_kl",
]
