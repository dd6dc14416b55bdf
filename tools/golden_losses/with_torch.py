"""What the libraries on PyTorch share."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from golden_losses.inputs import Case

torch.set_default_dtype(torch.float64)


def evaluate(case: Case, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The case's value, and the gradients of its sum by what it trains; in float64."""
    tensors = {key: torch.tensor(x) for key, x in inputs.items()}
    trained = [tensors[key].requires_grad_() for key in case.trains]
    value = case.run(**tensors, **case.options)
    gradients = torch.autograd.grad(value.sum(), trained) if trained else ()
    return value.detach().numpy(), {key: g.numpy() for key, g in zip(case.trains, gradients)}


class Accelerator:
    """One process, for trainers that ask for the others'."""

    num_processes = 1
    process_index = 0
    sync_gradients = True
    device = torch.device("cpu")

    def gather(self, x: Any) -> Any:
        return x

    gather_for_metrics = unwrap_model = gather

    def reduce(self, x: Any, reduction: str = "sum") -> Any:
        return x


def model(**more: Any) -> SimpleNamespace:
    """A model in training, of which trainers ask no more than this."""
    return SimpleNamespace(training=True, is_gradient_checkpointing=False, **more)
