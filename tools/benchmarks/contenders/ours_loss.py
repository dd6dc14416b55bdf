"""jaxrl_llm's policy loss on log-probs straight from hidden states; the bare matrix products beside it.

The three products are those without which there is no value and no gradient: logits [N, V], gradient of
hidden [N, D] and of the head [V, D], each jitted by itself.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax_loss
import loss_worker
from loss_worker import Problem

from jaxrl_kernels.linear_logprob import linear_logprob
from jaxrl_llm import losses

Logp = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""(hidden [N, D], head [V, D], targets [N], mask bool[N]) -> log-probs [N]."""


def fused(hidden: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    return linear_logprob(hidden, head, targets, active=mask).logp


def contender(function: Logp, beside: Callable[[Problem], Any] | None = None) -> jax_loss.JaxLoss:
    """PPO's clipped loss and, to check others by, the cross-entropy, on some log-probs."""

    def logp(problem: Problem, mask: jax.Array) -> jax.Array:
        flat = function(problem.hidden, problem.head, problem.targets.reshape(-1), mask.reshape(-1))
        return flat.reshape(mask.shape)

    def policy(problem: Problem) -> jax.Array:
        mask = problem.mask > 0
        token_loss, _ = losses.ppo_clip(
            logp(problem, mask),
            problem.old_logp,
            problem.advantages[:, None],
            mask,
            epsilon=loss_worker.EPSILON,
        )
        total = losses.aggregate(token_loss, mask, "token_mean")
        return total.sum / total.weight

    return jax_loss.JaxLoss(
        policy,
        lambda problem: problem._replace(hidden=problem.hidden.reshape(-1, problem.hidden.shape[-1])),
        others={"cross-entropy": lambda problem: -logp(problem, problem.mask >= 0).mean()},
        beside=beside,
    )


@jax.jit
def logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    return hidden @ head.T


@jax.jit
def hidden_gradient(logits: jax.Array, head: jax.Array) -> jax.Array:
    return logits @ head


@jax.jit
def head_gradient(logits: jax.Array, hidden: jax.Array) -> jax.Array:
    return logits.T @ hidden


def products(problem: Problem) -> tuple[jax.Array, jax.Array]:
    z = logits(problem.hidden, problem.head)
    return hidden_gradient(z, problem.head), head_gradient(z, problem.hidden)


if __name__ == "__main__":
    loss_worker.serve(contender(fused, products), "jax")
