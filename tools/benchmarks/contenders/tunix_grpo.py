"""google-tunix's `GRPOLearner`, one global step per request.

The learner owns the loop, so the data set paces it: asking for the next batch is where a step ends (the
updated model is waited for) and where the next request is awaited. Timed is everything between two such
points: tokenizing, rollout, reward, advantages, loss, gradient, optimizer and the learner's own bookkeeping.
No reference model, no checkpoints, no metrics back end. `rollout` ends when the reward function is called.
"""

import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import tunix_model
import worker
from flax import nnx
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig


def main() -> None:
    channel, task = worker.Channel(), worker.task()
    tokenizer = worker.Numbers(task["config"]["vocab_size"])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    model = tunix_model.load(task, mesh)
    rewarded: dict[str, Any] = {}

    def even_share(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        rewarded["at"] = time.perf_counter()
        ids = [tokenizer.encode(text) for text in completions]
        rewarded["tokens"] = sum(map(len, ids))
        return worker.even_share(prompts, completions, ids)

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(task["learning_rate"], weight_decay=0.0)
    )
    cluster = rl_cluster.RLCluster(
        actor=model,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={rl_cluster.Role.ACTOR: mesh, rl_cluster.Role.ROLLOUT: mesh},
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optimizer,
                eval_every_n_steps=1_000_000,
                max_steps=1_000_000,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=task["new_tokens"],
                max_prompt_length=task["prompt_length"],
                kv_cache_size=task["prompt_length"] + task["new_tokens"],
                temperature=task["temperature"],
                top_p=task["top_p"],
            ),
        ),
    )
    learner = GRPOLearner(
        cluster,
        GRPOConfig(num_generations=task["num_generations"], beta=0.0),
        reward_fns=even_share,
    )
    channel.send(
        {
            "versions": worker.versions("google-tunix", "jax", "flax", "optax"),
            "logits": tunix_model.last_logits(model, task["prompts"]),
        }
    )

    def batches() -> Iterator[dict[str, np.ndarray]]:
        while (request := channel.receive()) is not None:
            start = time.perf_counter()
            yield {"prompts": np.array([tokenizer.decode(prompt) for prompt in request["prompts"]])}
            jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
            end = time.perf_counter()
            channel.send(
                {
                    "seconds": end - start,
                    "tokens": rewarded["tokens"],
                    "parts": {"rollout": rewarded["at"] - start, "update": end - rewarded["at"]},
                }
            )

    learner.train(batches())


if __name__ == "__main__":
    main()
