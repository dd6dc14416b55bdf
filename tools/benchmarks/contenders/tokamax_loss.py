"""tokamax's fused cross-entropy in its XLA form: no policy loss, hence fewer operations than the others'."""

import jax
import jax_loss
import loss_worker
import tokamax
from loss_worker import Problem


def arrange(problem: Problem) -> Problem:
    """Rows, and the head as it wants it: [D, V]."""
    return problem._replace(
        hidden=problem.hidden.reshape(-1, problem.hidden.shape[-1]), head=problem.head.T.copy()
    )


def loss(problem: Problem) -> jax.Array:
    return tokamax.linear_softmax_cross_entropy_loss(
        problem.hidden, problem.targets.reshape(-1), problem.head, reduction="mean", implementation="xla"
    )


if __name__ == "__main__":
    loss_worker.serve(jax_loss.JaxLoss(loss, arrange, "cross-entropy"), "tokamax", "jax")
