"""Liger's `LigerFusedLinearGRPOLoss` in the form that is fastest on a CPU.

All sequences in one chunk (with its default, one a chunk, the head's gradient is added up eight times), and
without torch.compile, which here touches the few operations on [B, T] alone.
"""

import loss_worker
import torch
import torch_loss
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from loss_worker import Problem


class Liger(torch_loss.TorchLoss):
    def arrange(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        self._problem = problem._replace(targets=problem.targets.long())
        self._function = LigerFusedLinearGRPOLoss(
            beta=0.0,
            compiled=False,
            use_ref_model=False,
            chunk_size=len(problem.hidden),
            epsilon_low=loss_worker.EPSILON,
            epsilon_high=loss_worker.EPSILON,
            loss_type="bnpo",
        )
        return problem.hidden.requires_grad_(), problem.head.requires_grad_()

    def loss(self) -> torch.Tensor:
        p = self._problem
        value, _ = self._function(
            p.hidden, p.head, p.targets, p.mask, p.advantages, old_per_token_logps=p.old_logp
        )
        return value


if __name__ == "__main__":
    loss_worker.serve(Liger(), "liger-kernel", "torch")
