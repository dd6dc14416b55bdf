"""google-tunix's vanilla `Sampler`, called as its users call it: strings in, tokens and text out.

It returns no log-probs here (its default), which spares it work that the other JAX contender does.
"""

import time

import tunix_model
import worker
from tunix.generate.sampler import CacheConfig, Sampler


def main() -> None:
    channel, task = worker.Channel(), worker.task()
    config = task["config"]
    model = tunix_model.load(task)
    cache = CacheConfig(
        cache_size=task["prompt_length"] + task["new_tokens"],
        num_layers=config["num_hidden_layers"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
    )
    tokenizer = worker.Numbers(config["vocab_size"])
    sampler = Sampler(model, tokenizer, cache)
    channel.send(
        {
            "versions": worker.versions("google-tunix", "jax", "flax"),
            "logits": tunix_model.last_logits(model, task["prompts"]),
        }
    )
    while (request := channel.receive()) is not None:
        prompts = [tokenizer.decode(prompt) for prompt in request["prompts"]]
        texts = [prompt for prompt in prompts for _ in range(request["num_generations"])]
        start = time.perf_counter()
        output = sampler(
            texts,
            max_generation_steps=task["new_tokens"],
            max_prompt_length=task["prompt_length"],
            temperature=request["temperature"],
            top_p=request["top_p"],
            seed=request["seed"],
        )
        seconds = time.perf_counter() - start
        channel.send({"seconds": seconds, "tokens": sum(len(row) for row in output.tokens)})


if __name__ == "__main__":
    main()
