"""The shape of the policy: a folder's, or that of a new model as the config's model section describes it."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from jaxrl_llm.data import tokenizers
from jaxrl_llm.models import huggingface_config
from jaxrl_llm.models.config import FEATURES, ModelConfig


def model_config(c: ConfigDict, tokenizer: tokenizers.Tokenizer) -> ModelConfig:
    """The policy's shape: that of the folder, or of the config with the vocabulary that is needed.

    Raises:
      ValueError: the tokenizer's ids do not fit the vocabulary, a mask token that it uses, keys that the
        folder contradicts, or a new model that no folder of its family can hold.
    """
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    given = {key: value for key, value in c.model.items() if key in names and value is not None}
    if c.model.path:
        cfg = huggingface_config.config_from_folder(c.model.path)
        for key in ("causal", "mask_id", "logits_shift"):
            if given.get(key, getattr(cfg, key)) != getattr(cfg, key):
                raise ValueError(
                    f"model.{key}={given[key]!r}, and {c.model.path} has {getattr(cfg, key)!r}: leave it out"
                )
    else:
        cfg = _new_model(given, tokenizer)
        if c.checkpoint.export:
            try:
                huggingface_config.check_describes(huggingface_config.config_to_dict(cfg), cfg)
            except ValueError as error:
                raise ValueError(
                    f"model: {error}. Change that, or set checkpoint.export=False: no folder can hold it"
                ) from error
    tokenizers.check_vocabulary(tokenizer, cfg.vocab_size)
    if cfg.mask_id is not None:
        tokenizers.check_mask(tokenizer, cfg.mask_id)
    return cfg


def _new_model(given: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> ModelConfig:
    """A family's features, and what the config's model section says besides. Errors as `model_config`."""
    features = FEATURES[given["family"]]
    if given.get("causal") and not features.get("causal", True):
        raise ValueError(
            f"model.causal=True, and family {given['family']!r} is masked diffusion: leave it out"
        )
    fields = features | given
    needed = tokenizer.vocab_size
    if not fields.get("causal", True):
        mask_id = fields.setdefault("mask_id", needed)
        needed = max(needed, mask_id + 1)
    fields["vocab_size"] = given["vocab_size"] or -(-needed // 64) * 64  # whole lanes; a mesh axis divides it
    return ModelConfig(**fields)


def check_objective(c: ConfigDict, cfg: ModelConfig) -> None:
    """Refuses supervised training that is not for this kind of model.

    Raises:
      ValueError: naming the objective, the model and the way out.
    """
    objective, filled = c.supervised.objective, c.supervised.completion_length
    if filled and (cfg.causal or objective == "diffusion_pretraining"):
        raise ValueError(
            f"supervised.completion_length={filled} is for the fine-tuning of masked-diffusion LMs, and this "
            f"is {'a causal model' if cfg.causal else 'pre-training'}: leave it 0"
        )
    if not objective or (objective == "next_token") == cfg.causal:
        return
    kind, way_out = (
        ("causal", "give a LLaDA or Dream folder, or model.family='llada' for a new model")
        if cfg.causal
        else ("a masked-diffusion LM", "set it to diffusion_finetuning or diffusion_pretraining")
    )
    raise ValueError(
        f"supervised.objective={objective!r}, but {c.model.path or 'the new model'} (family {cfg.family!r}) "
        f"is {kind}: {way_out}"
    )
