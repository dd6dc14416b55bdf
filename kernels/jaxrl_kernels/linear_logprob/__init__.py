"""Log-prob and entropy of target tokens straight from hidden states."""

from jaxrl_kernels.linear_logprob.api import LogprobStats, linear_logprob

__all__ = ["LogprobStats", "linear_logprob"]
