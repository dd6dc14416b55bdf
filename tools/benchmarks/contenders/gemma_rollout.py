"""gemma's `Sampler`, whose loop is `SamplerLoop`, on a Gemma 3 of the same shape with random weights.

All layers look at the whole context, as in Qwen3. Its cache, its buffer of new tokens and its prompts are as
long as the case needs, so that nothing is padded. It has no refill, so that a queue is served in batches,
each up to its longest row; how many tokens those are is no part of what it compiles. Strings in, tokens and
text out, and no log-probs.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rollout_worker
import worker
from gemma import gm
from gemma.gm.nn import config as gemma_config
from gemma.gm.text import RandomSampling, Sampler, TopPSampling
from rollout_worker import Completions, Wanted


class Numbers:
    """`worker.Numbers` with gemma's names.

    Id 0 is padding in a prompt for gemma, and becomes 1. No id ends a completion.
    """

    VERSION = None
    FORBIDDEN_TOKENS = ()

    def __init__(self, vocab_size: int) -> None:
        self.numbers = worker.Numbers(vocab_size)
        self.special_tokens = type("Special", (), {"EOS": vocab_size, "END_OF_TURN": vocab_size})

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        return [max(1, token) for token in self.numbers.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.numbers.decode(np.asarray(ids).tolist())


class Gemma:
    """See `rollout_worker.Contender`."""

    queue_rows = 64

    def __init__(self, task: dict[str, Any]) -> None:
        config, dtype = task["config"], jnp.dtype(task["dtype"])
        self.tokenizer = Numbers(config["vocab_size"])
        self.model = gm.nn.Transformer(
            config=gemma_config.TransformerConfig(
                num_embed=config["vocab_size"],
                embed_dim=config["hidden_size"],
                hidden_dim=config["intermediate_size"],
                num_heads=config["num_attention_heads"],
                head_dim=config["head_dim"],
                num_kv_heads=config["num_key_value_heads"],
                final_logit_softcap=None,
                use_post_attn_norm=True,
                use_post_ffw_norm=True,
                use_qk_norm=True,
                attention_types=(gemma_config.AttentionType.GLOBAL,) * config["num_hidden_layers"],
            ),
            dtype=dtype,
            tokens="tokens",
        )
        self.params = jax.block_until_ready(
            self.model.init(jax.random.key(0), jnp.ones((1, 8), jnp.int32))["params"]
        )
        self.about = {"versions": worker.versions("gemma", "jax", "flax")}

    def plan(self, wanted: Wanted) -> Callable[[], Completions]:
        length = len(wanted.prompts[0])
        sampler = Sampler(
            model=self.model,
            params=self.params,
            tokenizer=self.tokenizer,
            cache_length=wanted.room,
            max_out_length=wanted.room - length,
            pad_length=length,
        )
        if wanted.top_p < 1:
            draws = TopPSampling(p=wanted.top_p, temperature=wanted.temperature)
        else:
            draws = RandomSampling(temperature=wanted.temperature)
        texts = [self.tokenizer.numbers.decode(prompt) for prompt in wanted.prompts]

        def generate(rows: slice, new_tokens: int) -> Completions:
            output = sampler.sample(
                texts[rows],
                max_new_tokens=new_tokens,
                sampling=draws,
                rng=wanted.seed,
                return_state=True,
            )
            return np.asarray(output.tokens)[:, :new_tokens].tolist()

        return lambda: rollout_worker.in_batches(wanted, generate)


if __name__ == "__main__":
    rollout_worker.serve(Gemma)
