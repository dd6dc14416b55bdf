"""TRL's GRPO loss: `GRPOTrainer._compute_loss` on a stand-in model with TRL's fused head.

The trainer is made without its constructor and given the settings that the method reads: "bnpo", which is the
mean over tokens, and nothing optional. The method always computes the entropy too, for its metrics.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import accelerate
import loss_worker
import torch
import torch_loss
from loss_worker import Problem
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head


class Model(torch.nn.Module):
    """A causal language model whose backbone is a constant [B, T + 1, D]."""

    def __init__(self, hidden: torch.Tensor, head: torch.Tensor) -> None:
        super().__init__()
        self.hidden, self.lm_head = hidden, SimpleNamespace(weight=head, bias=None)
        text = SimpleNamespace(model_type="qwen3")
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def base_model(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.hidden)

    def get_output_embeddings(self) -> SimpleNamespace:
        return self.lm_head

    def forward(self) -> None:
        """Replaced by the fused head."""


class Trl(torch_loss.TorchLoss):
    def arrange(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.nn.functional.pad(problem.hidden, (0, 0, 0, 1)).requires_grad_()
        head = problem.head.requires_grad_()
        self._model = Model(hidden, head)
        add_fused_lm_head(self._model, outputs=("log_probs", "entropy"))  # as the constructor does
        prompt = torch.zeros_like(problem.targets[:, :1], dtype=torch.long)
        self._inputs = {
            "prompt_ids": prompt,
            "prompt_mask": torch.ones_like(prompt),
            "completion_ids": problem.targets.long(),
            "completion_mask": problem.mask.long(),
            "advantages": problem.advantages,
            "old_per_token_logps": problem.old_logp,
        }
        self._trainer = object.__new__(GRPOTrainer)
        settings = {
            "model": self._model,
            "accelerator": accelerate.Accelerator(cpu=True),
            "args": SimpleNamespace(delta=None, report_to=[]),
            "loss_type": "bnpo",
            "beta": 0.0,
            "epsilon_low": loss_worker.EPSILON,
            "epsilon_high": loss_worker.EPSILON,
            "importance_sampling_level": "token",
            "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None,
            "_entropy_bonus_enabled": False,
            "aux_loss_enabled": False,
            "use_vllm": False,
            "current_gradient_accumulation_steps": 1,
            "_metrics": {"train": defaultdict(list)},
        }
        vars(self._trainer).update(settings)
        return hidden, head

    def loss(self) -> torch.Tensor:
        return self._trainer._compute_loss(self._model, self._inputs)


if __name__ == "__main__":
    loss_worker.serve(Trl(), "trl", "transformers", "torch")
