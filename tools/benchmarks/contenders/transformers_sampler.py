"""transformers' `generate` on PyTorch, with its dynamic cache and no top-k."""

import time

import torch
import transformers
import worker


def main() -> None:
    channel, task = worker.Channel(), worker.task()
    model = transformers.AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor(task["prompts"][:1])).logits[0, -1]
    channel.send({"versions": worker.versions("transformers", "torch"), "logits": logits.tolist()})
    while (request := channel.receive()) is not None:
        prompts = torch.tensor(request["prompts"])
        torch.manual_seed(request["seed"])
        start = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                temperature=request["temperature"],
                top_p=request["top_p"],
                top_k=0,
                num_return_sequences=request["num_generations"],
                max_new_tokens=task["new_tokens"],
            )
        seconds = time.perf_counter() - start
        channel.send({"seconds": seconds, "tokens": output[:, prompts.shape[1] :].numel()})


if __name__ == "__main__":
    main()
