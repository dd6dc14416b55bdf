"""Sampling from a masked diffusion model: LLaDA, Dream, or one of the same layout.

    python -m jaxrl_llm.sample --config=configs/diffusion.py:path/to/model
    python -m jaxrl_llm.sample --config=configs/diffusion.py:path/to/model,focore --chat \
        --prompt="Write a haiku." --heat_map=commits.png
    python -m jaxrl_llm.sample --config=configs/diffusion.py:path/to/model,threshold \
        --config.settings.threshold=0.95 --input=prompts.jsonl --output=completions.jsonl

`path/to/model` is a Hugging Face folder. On a terminal the response is seen as it fills. A name after the
comma is one of `DECODERS`; every other choice is a key below, with its meaning in
`jaxrl_llm/sampling/diffusion_options.py`.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

DECODERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "threshold": {"commit": "threshold"},
    "cfg": {"guidance": "prompt"},
    "a-cfg": {"guidance": "low_confidence"},
    "focore": {"guidance": "high_information"},
    "focore_a": {"guidance": "high_information", "accelerate": True},
}
"""By name, what of `method` differs from plain decoding, one token a step."""


def get_config(arg: str = "") -> ConfigDict:
    path, _, decoder = arg.partition(",")
    if decoder and decoder not in DECODERS:
        raise ValueError(f"unknown decoder {decoder!r}; one of {', '.join(DECODERS)}")
    c = ConfigDict()
    c.seed = 0
    c.model = ConfigDict({"path": path, "compute_dtype": "bfloat16"})
    c.tokenizer = ConfigDict({"kind": "folder", "path": "", "alphabet": ""})  # empty path = model.path
    c.data = ConfigDict({"max_prompt_length": 512})  # tokens

    c.method = ConfigDict()
    c.method.max_new_tokens = 128  # the response, whole from the start
    c.method.block_size = placeholder(int)  # None = one block
    c.method.family = ""  # schedule and confidence: llada or dream; empty = the checkpoint's
    c.method.order = "low_confidence"  # maskgit_plus, topk_margin, entropy, random, origin
    c.method.commit = "quota"  # threshold, factor, entropy_bound
    c.method.guidance = "none"  # prompt (CFG), low_confidence (A-CFG), high_information (FoCore)
    c.method.detector = "resolve"  # early, settle, pmi, lexical: of informative tokens
    c.method.detector_scope = "committed"  # or block
    c.method.negative_prompt = "keep"  # or mask
    c.method.confidence_from = "guided"  # or plain
    c.method.accelerate = False  # FoCore_A
    c.method.tracked = 8
    c.method.max_informative = placeholder(int)
    c.method.allow_mask_proposal = False
    c.method.cache = "none"  # prefix, dual: of keys and values
    c.method.update(DECODERS[decoder or "plain"])

    c.settings = ConfigDict()
    c.settings.steps = placeholder(int)  # of the whole response; None = one token a step
    c.settings.grid_end = 1e-3
    c.settings.temperature = 0.0
    c.settings.top_p = 1.0
    c.settings.top_k = 0
    c.settings.order_temperature = 0.0
    c.settings.threshold = 0.9
    c.settings.factor = 1.0
    c.settings.entropy_bound = 0.1
    c.settings.guidance_weight = 0.5
    c.settings.guidance_end = placeholder(float)  # None = guidance_weight throughout
    c.settings.informative_share = 0.3
    c.settings.radius = 4
    c.settings.plausible = 0.0
    c.settings.change_limit = 0.1
    c.settings.patience = 1
    c.settings.stable_steps = 2
    c.settings.stable_probability = 0.9
    c.settings.window = 16
    c.settings.skip_negative = True
    c.settings.forbid_eos = False
    c.settings.distrust_eos = False
    c.settings.stop_at_eos = True

    c.lexical = ""  # regular expression: tokens that contain a match are informative, with detector=lexical
    return c
