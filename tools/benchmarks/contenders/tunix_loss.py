"""google-tunix's `grpo_loss_fn` on a stand-in model whose parameters are the hidden states and the head.

The function takes its logits from a model of prompt and completion and drops those of the last token, so
every sequence has one row more here than a loss needs. Its metrics are not asked for, and the compiler leaves
them out.
"""

import jax
import jax.numpy as jnp
import jax_loss
import loss_worker
from flax import nnx
from loss_worker import Problem
from tunix.rl import algo_core, common
from tunix.rl.grpo.grpo_learner import GRPOConfig

OUTSIDE = -1
"""No padding and no end among the tokens."""


class Head(nnx.Module):
    """The last layer of a model, and what it would be given."""

    def __init__(self, hidden: jax.Array, head: jax.Array) -> None:
        self.hidden, self.head = nnx.Param(hidden), nnx.Param(head)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, cache: None, attention_mask: jax.Array
    ) -> tuple[jax.Array, None]:
        return self.hidden[...] @ self.head[...].T, None


def arrange(problem: Problem) -> Problem:
    return problem._replace(hidden=jnp.pad(problem.hidden, ((0, 0), (0, 1), (0, 0))))


def main() -> None:
    config = GRPOConfig(beta=0.0, epsilon=loss_worker.EPSILON, loss_agg_mode="token-mean")
    config.temperature = 1.0  # which its learner copies from the rollout's

    def loss(problem: Problem) -> jax.Array:
        prompt = jnp.zeros_like(problem.targets[:, :1])
        example = common.TrainExample(
            prompt_ids=prompt,
            prompt_mask=jnp.ones_like(prompt),
            completion_ids=problem.targets,
            completion_mask=problem.mask,
            advantages=problem.advantages,
            ref_per_token_logps=None,
            old_per_token_logps=problem.old_logp,
        )
        value, _ = algo_core.grpo_loss_fn(
            Head(problem.hidden, problem.head), example, config, OUTSIDE, OUTSIDE
        )
        return value

    loss_worker.serve(jax_loss.JaxLoss(loss, arrange), "google-tunix", "jax")


if __name__ == "__main__":
    main()
