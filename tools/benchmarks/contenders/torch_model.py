"""The benchmark's model in transformers on PyTorch, read from the folder that all contenders read."""

from typing import Any

import torch
import transformers
import worker


def load(task: dict[str, Any]) -> tuple[transformers.PreTrainedModel, dict[str, Any]]:
    """The model in the task's dtype, and what the driver is told first."""
    torch.set_num_threads(task["threads"])
    dtype = getattr(torch, task["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype).eval()
    with torch.inference_mode():
        logits = model(torch.tensor(task["prompts"][:1])).logits[0, -1].float()
    return model, {"versions": worker.versions("transformers", "torch"), "logits": logits.tolist()}
