"""A policy loss with its clip fractions, KL and gradient in one pass over the tokens."""

from jaxrl_kernels.clipped_policy_loss.api import PolicyLoss, clipped_policy_loss

__all__ = ["PolicyLoss", "clipped_policy_loss"]
