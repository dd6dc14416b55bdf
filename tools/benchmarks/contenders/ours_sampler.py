"""jaxrl_llm's sampler: token ids in; tokens, lengths and log-probs out, fetched to the host."""

import time

import jax
import numpy as np
import ours_model
import worker

from jaxrl_llm.sampling.autoregressive import generate, prepare
from jaxrl_llm.sampling.logits import sampling_params


def main() -> None:
    channel, task = worker.Channel(), worker.task()
    params, cfg = ours_model.load(task)
    prepared = prepare(params, cfg)
    channel.send(
        {
            "versions": worker.versions("jax"),
            "logits": ours_model.last_logits(params, cfg, task["prompts"]),
        }
    )
    while (request := channel.receive()) is not None:
        start = time.perf_counter()
        prompts = np.array(request["prompts"], np.int32)
        batch = len(prompts) * request["num_generations"]
        trajectories = generate(
            prepared,
            cfg,
            prompts,
            np.full(len(prompts), prompts.shape[1], np.int32),
            num_generations=request["num_generations"],
            max_new_tokens=task["new_tokens"],
            sampling=sampling_params(batch, temperature=request["temperature"], top_p=request["top_p"]),
            key=jax.random.key(request["seed"]),
            uids=np.arange(batch, dtype=np.int32),
            stop_ids=(),
        )
        fetched = jax.device_get(trajectories)
        seconds = time.perf_counter() - start
        channel.send({"seconds": seconds, "tokens": int(fetched.action_mask.sum())})


if __name__ == "__main__":
    main()
