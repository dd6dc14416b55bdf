"""LLaDA's decoding as its authors publish it, a Python loop over steps, on a plain model in PyTorch.

One block, greedy, low confidence first (2502.09992, algorithm 5): every step runs the whole row, applies the
head to it, takes the likeliest token of each position, and commits the surest masked ones.
"""

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import worker
from safetensors.torch import load_file

Tensor = torch.Tensor


class Llada:
    """The bidirectional trunk in float32."""

    def __init__(self, folder: str, config: dict[str, Any]) -> None:
        weights = load_file(Path(folder) / "model.safetensors")
        self.weights = {name.removeprefix("model.transformer."): w for name, w in weights.items()}
        self.layers, self.heads = config["n_layers"], config["n_heads"]
        self.width, self.eps = config["d_model"] // self.heads, config["rms_norm_eps"]
        self.inverse = config["rope_theta"] ** -(torch.arange(0, self.width, 2) / self.width)

    def __call__(self, ids: Tensor) -> Tensor:
        """ids i64[B, L] -> logits f32[B, L, V]."""
        w = self.weights
        batch, length = ids.shape
        angles = torch.outer(torch.arange(length), self.inverse).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()

        def rotate(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * cos + torch.cat([-second, first], dim=-1) * sin

        x = F.embedding(ids, w["wte.weight"])
        for i in range(self.layers):
            own = {name: w[f"blocks.{i}.{name}.weight"] for name in NAMES}
            y = F.rms_norm(x, x.shape[-1:], own["attn_norm"], self.eps)
            q, k, v = (
                F.linear(y, own[name]).view(batch, length, self.heads, self.width).transpose(1, 2)
                for name in ("q_proj", "k_proj", "v_proj")
            )
            y = F.scaled_dot_product_attention(rotate(q), rotate(k), v)
            x = x + F.linear(y.transpose(1, 2).reshape(x.shape), own["attn_out"])
            y = F.rms_norm(x, x.shape[-1:], own["ff_norm"], self.eps)
            x = x + F.linear(F.silu(F.linear(y, own["ff_proj"])) * F.linear(y, own["up_proj"]), own["ff_out"])
        return F.linear(F.rms_norm(x, x.shape[-1:], w["ln_f.weight"], self.eps), w["ff_out.weight"])


NAMES = (
    *("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out"),
    *("ff_norm", "ff_proj", "up_proj", "ff_out"),
)


def decode(model: Llada, prompts: Tensor, new_tokens: int, steps: int, mask: int) -> Tensor:
    """prompts i64[B, P] -> i64[B, P + new_tokens]."""
    ids = F.pad(prompts, (0, new_tokens), value=mask)
    each, more = divmod(new_tokens, steps)
    for step in range(steps):
        masked = ids == mask
        logits = model(ids)
        logits[..., mask] = -torch.inf
        proposed = logits.argmax(dim=-1)
        sure = torch.softmax(logits, dim=-1).gather(-1, proposed[..., None])[..., 0]
        sure = torch.where(masked, sure, -torch.inf)
        commit = torch.zeros_like(masked)
        for row in range(len(ids)):
            commit[row, sure[row].topk(each + (step < more)).indices] = True
        ids = torch.where(commit, proposed, ids)
    return ids


def main() -> None:
    channel, task = worker.Channel(), worker.task()
    torch.set_num_threads(task["threads"])
    model, mask = Llada(task["model"], task["config"]), task["config"]["mask_token_id"]
    size, steps = task["new_tokens"], task["steps"]
    with torch.inference_mode():
        prompt = torch.tensor(task["prompts"][:1])
        logits = model(F.pad(prompt, (0, size), value=mask))[0, prompt.shape[1]]
    channel.send({"versions": worker.versions("torch", "safetensors"), "logits": logits.tolist()})
    while (request := channel.receive()) is not None:
        prompts = torch.tensor(request["prompts"])
        start = time.perf_counter()
        with torch.inference_mode():
            ids = decode(model, prompts, size, steps, mask)[:, prompts.shape[1] :]
        seconds = time.perf_counter() - start
        reply = {"seconds": seconds, "tokens": ids.numel()}
        channel.send(reply | ({"ids": ids.tolist()} if request.get("ids") else {}))


if __name__ == "__main__":
    main()
