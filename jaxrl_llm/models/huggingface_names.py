"""Where each parameter lives in a Hugging Face checkpoint: the table that import and export derive from."""

import math
from typing import Any, NamedTuple

import jax

from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.huggingface_diffusion import LLADA_NAMES
from jaxrl_llm.models.params import ParamSpec, Tree
from jaxrl_llm.models.transformer import param_specs

TABLE: dict[str, tuple[str, int | None]] = {
    "embed": ("model.embed_tokens.weight", None),
    "head": ("lm_head.weight", None),
    "final_norm": ("model.norm.weight", 0),
    "layers/attn_norm": ("model.layers.{}.input_layernorm.weight", 0),
    "layers/q": ("model.layers.{}.self_attn.q_proj.weight", 1),
    "layers/k": ("model.layers.{}.self_attn.k_proj.weight", 1),
    "layers/v": ("model.layers.{}.self_attn.v_proj.weight", 1),
    "layers/o": ("model.layers.{}.self_attn.o_proj.weight", 2),
    "layers/q_bias": ("model.layers.{}.self_attn.q_proj.bias", 0),
    "layers/k_bias": ("model.layers.{}.self_attn.k_proj.bias", 0),
    "layers/v_bias": ("model.layers.{}.self_attn.v_proj.bias", 0),
    "layers/o_bias": ("model.layers.{}.self_attn.o_proj.bias", 0),
    "layers/q_norm": ("model.layers.{}.self_attn.q_norm.weight", 0),
    "layers/k_norm": ("model.layers.{}.self_attn.k_norm.weight", 0),
    "layers/mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", 0),
    "layers/gate": ("model.layers.{}.mlp.gate_proj.weight", 1),
    "layers/up": ("model.layers.{}.mlp.up_proj.weight", 1),
    "layers/down": ("model.layers.{}.mlp.down_proj.weight", 1),
    "layers/gate_bias": ("model.layers.{}.mlp.gate_proj.bias", 0),
    "layers/up_bias": ("model.layers.{}.mlp.up_proj.bias", 0),
    "layers/down_bias": ("model.layers.{}.mlp.down_proj.bias", 0),
}
"""Our parameter -> its Hugging Face name, and how many of its leading dimensions are inputs.

A matrix of theirs is [outputs, inputs], each flattened; ours has the inputs first, each dimension its own.
0: a vector there. None: the same there and here.
"""

FAMILY_TABLE: dict[str, dict[str, tuple[str, int | None]]] = {
    family: {
        "layers/post_attn_norm": ("model.layers.{}.post_attention_layernorm.weight", 0),
        "layers/mlp_norm": ("model.layers.{}.pre_feedforward_layernorm.weight", 0),
        "layers/post_mlp_norm": ("model.layers.{}.post_feedforward_layernorm.weight", 0),
    }
    for family in ("gemma2", "gemma3_text")
}
FAMILY_TABLE["llada"] = LLADA_NAMES
"""What differs from `TABLE`, by family."""


class Tensor(NamedTuple):
    """One Hugging Face tensor and the parameter, or the layer of one, that it fills."""

    path: str
    layer: int | None
    inputs: int | None
    own_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        if self.inputs is None:
            return self.own_shape
        outputs = math.prod(self.own_shape[self.inputs :])
        return (outputs, math.prod(self.own_shape[: self.inputs])) if self.inputs else (outputs,)


def name_of(path: str, cfg: ModelConfig) -> str:
    """The Hugging Face name of a parameter; '{}' in it stands for the layer."""
    return (TABLE | FAMILY_TABLE.get(cfg.family, {}))[path][0]


def tensors(cfg: ModelConfig) -> dict[str, Tensor]:
    """Every tensor of the family's checkpoint by Hugging Face name, in the order of the file."""
    table = TABLE | FAMILY_TABLE.get(cfg.family, {})
    out = {}
    for path, spec in by_path(param_specs(cfg)).items():
        name, inputs = table[path]
        if path.startswith("layers/"):
            for layer in range(cfg.num_layers):
                out[name.format(layer)] = Tensor(path, layer, inputs, spec.shape[1:])
        else:
            out[name] = Tensor(path, None, inputs, spec.shape)
    return out


def by_path(tree: Tree) -> dict[str, Any]:
    """Leaves of a tree of arrays or of `ParamSpec` by path: 'embed', 'layers/q', ..."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, ParamSpec))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
