"""What a step of unmasking reads from logits at masked positions, in one pass over them."""

from jaxrl_kernels.denoising_step.api import DenoisingStep, Look, denoising_step
from jaxrl_kernels.denoising_step.xla import (
    Sureness,
    contrast,
    jensen_shannon,
    log_prob,
    sureness,
    without,
)

__all__ = [
    "DenoisingStep",
    "Look",
    "Sureness",
    "contrast",
    "denoising_step",
    "jensen_shannon",
    "log_prob",
    "sureness",
    "without",
]
