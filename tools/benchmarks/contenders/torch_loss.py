"""A loss in PyTorch on the CPU as a contender."""

import time
from abc import ABC, abstractmethod
from typing import Any

import torch
import worker
from loss_worker import Problem, norm


class TorchLoss(ABC):
    """See `loss_worker.Contender`."""

    def __init__(self) -> None:
        torch.set_num_threads(worker.task()["threads"])

    @abstractmethod
    def arrange(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the problem (of tensors) over; what is differentiated, hidden and head."""

    @abstractmethod
    def loss(self) -> torch.Tensor:
        """Scalar."""

    def prepare(self, problem: Problem) -> dict[str, Any]:
        self._weights = self.arrange(Problem(*(torch.from_numpy(array) for array in problem)))
        value, gradients = self._value_and_grad()
        return {
            "losses": {"policy": float(value)},
            "gradients": [norm(gradient.numpy()) for gradient in gradients],
            "temporaries": None,
        }

    def time(self) -> dict[str, Any]:
        start = time.perf_counter()
        self._value_and_grad()
        return {"seconds": time.perf_counter() - start}

    def compile_for(self, topology: str, **sizes: int) -> None:
        return None

    def _value_and_grad(self) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        value = self.loss()
        return value.detach(), torch.autograd.grad(value, self._weights)
