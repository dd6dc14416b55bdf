"""What shape a model has: one frozen dataclass for every family."""

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding of one kind of layer.

    Attributes:
      theta: base of the geometric series of wavelengths.
      kind: 'default', 'linear', 'llama3' or 'yarn', as transformers names `rope_type`.
      factor: context extension factor of the scaling kinds.
      low_freq_factor, high_freq_factor, original_max_position: of 'llama3' (the last of 'yarn' too).
      beta_fast, beta_slow: of 'yarn'.
      attention_factor: multiplies cos and sin ('yarn'); None = 0.1·ln(factor) + 1.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama 3, Qwen2/2.5, Qwen3, Mistral or Gemma 2/3 family, or a masked-diffusion LM of
    the LLaDA or Dream family.

    Attributes:
      family: Hugging Face `model_type` ('llama', 'qwen2', 'qwen3', 'mistral', 'gemma2', 'gemma3_text',
        'llada', 'Dream').
      vocab_size (V), hidden_size (D), num_layers (L), num_heads (H), num_kv_heads (K), head_dim (h),
        intermediate_size (F): sizes.
      max_position: longest sequence the model is declared for, in tokens.
      norm_eps: epsilon of every RMSNorm.
      norm_plus_one: RMSNorm scales by (1 + w) and casts after it (Gemma) rather than by w.
      post_norms: a norm after attention and after the MLP besides those before (Gemma).
      qk_norm: RMSNorm on queries and keys per head (Qwen3, Gemma 3).
      qkv_bias, out_bias, mlp_bias: biases of the projections.
      activation: 'silu' (SwiGLU) or 'gelu_tanh' (GeGLU).
      tied_head: the head is the embedding.
      embed_scale: embeddings are multiplied by sqrt(D) (Gemma).
      query_scale: scores are multiplied by this; None = h ** -0.5.
      attention_softcap, logit_softcap: c·tanh(x/c) on scores and on logits; None = off.
      window: width w of local layers (a token sees itself and w-1 before it).
      layer_kinds: 'global' or 'local' per layer; empty = all global.
      rope: rotary embedding of global layers.
      rope_local: of local layers; None = the same.
      causal: a token sees itself and those before it; False = the whole sequence.
      mask_id: the token that stands where a masked-diffusion LM is to predict one; None = it has none.
      logits_shift: of a masked-diffusion LM, 0 where the output at j predicts token j (LLaDA), 1 where that
        at j - 1 does (Dream, which was made from a causal model).
    """

    family: str = "qwen3"
    vocab_size: int = 256
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 384
    max_position: int = 32_768
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    post_norms: bool = False
    qk_norm: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    tied_head: bool = True
    embed_scale: bool = False
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    window: int | None = None
    layer_kinds: tuple[str, ...] = ()
    rope: Rope = Rope()
    rope_local: Rope | None = None
    causal: bool = True
    mask_id: int | None = None
    logits_shift: int = 0

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}")
        if self.layer_kinds and len(self.layer_kinds) != self.num_layers:
            raise ValueError(f"layer_kinds has {len(self.layer_kinds)} entries for {self.num_layers} layers")
        if "local" in self.layer_kinds and self.window is None:
            raise ValueError("layer_kinds has local layers but window is None")
        if self.causal and (self.mask_id is not None or self.logits_shift):
            raise ValueError(
                f"mask_id={self.mask_id} and logits_shift={self.logits_shift} describe a masked-diffusion "
                "model: set causal=False"
            )
        if not self.causal and self.layer_kinds and set(self.layer_kinds) != {"global"}:
            raise ValueError("causal=False takes no local layers: windows look back only")
        if self.mask_id is not None and not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(f"mask_id={self.mask_id} is outside the vocabulary of {self.vocab_size}")
        if self.logits_shift not in (0, 1):
            raise ValueError(f"logits_shift={self.logits_shift} must be 0 or 1")


GEMMA = {"norm_plus_one": True, "post_norms": True, "activation": "gelu_tanh", "embed_scale": True}
FEATURES: dict[str, dict[str, Any]] = {
    "llama": {"qk_norm": False},
    "qwen2": {"qk_norm": False, "qkv_bias": True},
    "qwen3": {},
    "mistral": {"qk_norm": False},
    "gemma2": GEMMA | {"qk_norm": False},
    "gemma3_text": GEMMA,
    "llada": {"qk_norm": False, "causal": False},
    "Dream": {"qk_norm": False, "qkv_bias": True, "causal": False, "logits_shift": 1},
}
"""What makes a new model one of a family: the fields in which it is not `ModelConfig`'s default."""


def require_causal(cfg: ModelConfig, task: str) -> None:
    """Refuses a bidirectional model where tokens are to follow from those before them.

    Raises:
      ValueError: naming the task.
    """
    if not cfg.causal:
        raise ValueError(
            f"{task} needs a causal model; this one (family {cfg.family!r}, causal=False) predicts masked "
            "tokens from both sides: use the diffusion decoders and losses"
        )


def require_denoiser(cfg: ModelConfig, task: str) -> None:
    """Refuses a model that is no masked-diffusion LM.

    Raises:
      ValueError: naming the task.
    """
    if cfg.causal:
        raise ValueError(
            f"{task} needs a masked-diffusion model (as LLaDA or Dream); this one (family {cfg.family!r}) is "
            "causal"
        )
    if cfg.mask_id is None:
        raise ValueError(f"{task} needs a mask token; the config's mask_id is None: set it")
