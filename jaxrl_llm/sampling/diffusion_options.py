"""What a decoder of masked diffusion models is told: its structure, compiled in, and its numbers, traced."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

FAMILIES = ("llada", "dream")
ORDERS = ("low_confidence", "maskgit_plus", "topk_margin", "entropy", "random", "origin")
COMMITS = ("quota", "threshold", "factor", "entropy_bound")
GUIDANCE = ("none", "prompt", "low_confidence", "high_information")
CACHES = ("none", "prefix", "dual")
DETECTORS = ("early", "resolve", "settle", "pmi", "lexical")


@dataclasses.dataclass(frozen=True)
class Method:
    """Which decoder; another one is another program.

    Attributes:
      max_new_tokens: G, positions of the response.
      block_size: blocks are decoded from left to right; None = one block of G.
      family: 'llada' spreads a block's masks evenly over its steps and reads confidence before temperature
        and truncation; 'dream' follows its time grid and reads confidence after them.
      order: what makes a position sure. 'low_confidence' and 'maskgit_plus' are two names for the
        probability of the proposed token; 'topk_margin' is the lead of the most likely token over the next,
        'entropy' the negative entropy, 'random' a uniform draw. 'origin' (dream only) has no order: each
        masked position is committed by chance, with the grid's probability.
      commit: how many of the surest positions: 'quota' as the family schedules it; 'threshold' all that are
        sure enough (Fast-dLLM); 'factor' the longest prefix with (r + 1)(1 - c_r) <= factor (Fast-dLLM);
        'entropy_bound' the longest prefix whose earlier entropies sum to at most a bound (2505.24857). All
        but 'quota' commit at least one.
      guidance: which positions the negative input masks: 'none' = plain decoding, 'prompt' = classifier-free
        guidance (LLaDA), 'low_confidence' committed tokens = A-CFG (2505.20199), 'high_information'
        committed tokens = FoCore (2605.01373).
      detector: what makes a committed token informative; see `information`.
      detector_scope: 'committed' looks for them in the whole response, 'block' in the current block.
      negative_prompt: 'mask' hides the prompt too whenever committed tokens are hidden; or 'keep'.
      confidence_from: the 'guided' or the 'plain' distribution.
      accelerate: FoCore_A: commit in parallel once informative tokens have converged.
      tracked: K, size of the distributions that are compared between steps.
      max_informative: most informative tokens at a time, which bounds the positions that the vocabulary
        matrix is applied to while they are watched; None = no bound, and the whole response is watched.
      allow_mask_proposal: lets the model propose the mask itself, as the public decoders do: then a quota is
        spent and the mask stays.
      cache: what a round reads of keys and values that were computed where the block began, by a pass over
        the whole row (Fast-dLLM, 2505.22618): 'prefix' those before the block, 'dual' those outside it. The
        pass then runs over the rest of the row alone. With family='dream' a block's first round commits its
        first token alone, which has nothing in the window to be predicted from (but where one round is all
        the schedule has for a block). With guidance='prompt' the negative input has a cache of its own, and
        its pass is made in every round unless the weight is 0 throughout. Other guidance hides other
        committed tokens in every round, which a cache would go on showing: it takes none.

    Raises:
      ValueError: an unknown name, sizes that do not divide, or choices that exclude each other.
    """

    max_new_tokens: int
    block_size: int | None = None
    family: str = "llada"
    order: str = "low_confidence"
    commit: str = "quota"
    guidance: str = "none"
    detector: str = "resolve"
    detector_scope: str = "committed"
    negative_prompt: str = "keep"
    confidence_from: str = "guided"
    accelerate: bool = False
    tracked: int = 8
    max_informative: int | None = None
    allow_mask_proposal: bool = False
    cache: str = "none"

    def __post_init__(self) -> None:
        for name, known in (
            ("family", FAMILIES),
            ("order", ORDERS),
            ("commit", COMMITS),
            ("guidance", GUIDANCE),
            ("detector", DETECTORS),
            ("detector_scope", ("committed", "block")),
            ("negative_prompt", ("keep", "mask")),
            ("confidence_from", ("guided", "plain")),
            ("cache", CACHES),
        ):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"unknown {name}={value!r}; one of {', '.join(known)}")
        for name in ("max_new_tokens", "block_size", "tracked", "max_informative"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.max_new_tokens % self.block:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} is not divisible by block_size={self.block_size}"
            )
        if self.order == "origin" and (self.family != "dream" or self.commit != "quota"):
            raise ValueError(
                "order='origin' is Dream's own schedule: it needs family='dream', commit='quota'"
            )
        if self.commit == "entropy_bound" and self.order != "entropy":
            raise ValueError(f"commit='entropy_bound' needs order='entropy', got {self.order!r}")
        if self.commit in ("threshold", "factor") and self.order not in ORDERS[:3]:
            raise ValueError(
                f"commit={self.commit!r} compares confidences in [0, 1]; order={self.order!r} has none: "
                f"use one of {', '.join(ORDERS[:3])}"
            )
        if self.allow_mask_proposal and (self.commit != "quota" or self.accelerate):
            raise ValueError("allow_mask_proposal needs commit='quota' without accelerate: it may never end")
        if self.accelerate and self.guidance != "high_information":
            raise ValueError(
                f"accelerate watches informative tokens: it needs guidance='high_information' (with "
                f"guidance_weight=0 to accelerate alone), got {self.guidance!r}"
            )

        if self.cache != "none" and (self.guidance not in GUIDANCE[:2] or self.allow_mask_proposal):
            raise ValueError(
                f"cache={self.cache!r} needs guidance='none' or 'prompt' without allow_mask_proposal, got "
                f"guidance={self.guidance!r}, allow_mask_proposal={self.allow_mask_proposal}"
            )

    @property
    def block(self) -> int:
        """Positions of a block."""
        return self.max_new_tokens if self.block_size is None else self.block_size

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.max_new_tokens // self.block

    @property
    def compares_steps(self) -> bool:
        """Whether distributions are kept from step to step."""
        return self.accelerate or (
            self.guidance == "high_information" and self.detector in ("resolve", "settle")
        )

    @property
    def sees_all(self) -> bool:
        """Whether predictions at committed positions are read, wherever in the response."""
        return (
            self.guidance == "low_confidence"
            or (self.guidance == "high_information" and self.detector == "settle")
            or (self.accelerate and self.max_informative is None)
            or self.allow_mask_proposal  # masks may be left in earlier blocks
        )


class Settings(NamedTuple):
    """The numbers, per row and all traced: a new value never recompiles, and rows may differ.

    Attributes, [B] each:
      steps: S, steps per block; ends a block unless masks run out before. Without effect but for 'quota'.
      shares: f32[B, G] Dream's grid: the share of the remaining masks to commit at each step of a block.
      temperature, top_p, top_k: as in `logits.Sampling`.
      order_temperature: positions are drawn from softmax(confidence / it) instead of taken from the top;
        0 = off (Dream's alg_temp).
      threshold, factor, entropy_bound: of the commit rules; nats for the last.
      guidance_weight, guidance_end: w in l + w(l - l⁻), moving linearly from the first to the second value
        as positions are committed.
      informative_share: ρ, the share of committed tokens that the negative input hides.
      radius: of the neighbourhood that 'early' looks at.
      plausible: α; tokens less likely than α times the most likely that may be proposed (by the plain
        distribution) are not proposed; 0 = off.
      change_limit, patience: informative tokens have converged once their distributions changed by less
        than this on average (nats) for so many steps in a row.
      stable_steps, stable_probability, window: κ, τ, d: after convergence every candidate commits whose most
        likely token has been the same for κ steps, with probability τ, within d of a committed token or of
        the block's first mask.
      skip_negative: no guidance for rows that have converged.
      eos_id, eot_id: -1 = none.
      forbid_eos: EOS is never proposed (LLaDA's logits_eos_inf).
      distrust_eos: EOS and EoT are left out of the confidence (LLaDA's confidence_eos_eot_inf).
      stop_at_eos: a row is done as soon as everything up to its first EOS is committed.
    """

    steps: Array
    shares: Array
    temperature: Array
    top_p: Array
    top_k: Array
    order_temperature: Array
    threshold: Array
    factor: Array
    entropy_bound: Array
    guidance_weight: Array
    guidance_end: Array
    informative_share: Array
    radius: Array
    plausible: Array
    change_limit: Array
    patience: Array
    stable_steps: Array
    stable_probability: Array
    window: Array
    skip_negative: Array
    eos_id: Array
    eot_id: Array
    forbid_eos: Array
    distrust_eos: Array
    stop_at_eos: Array


RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, math.inf),
    "top_p": (0, 1),
    "top_k": (0, math.inf),
    "order_temperature": (0, math.inf),
    "threshold": (0, math.inf),
    "factor": (0, math.inf),
    "entropy_bound": (0, math.inf),
    "guidance_weight": (0, math.inf),
    "guidance_end": (0, math.inf),
    "informative_share": (0, 1),
    "radius": (1, math.inf),
    "plausible": (0, 1),
    "change_limit": (0, math.inf),
    "patience": (0, math.inf),
    "stable_steps": (0, math.inf),
    "stable_probability": (0, math.inf),
    "window": (0, math.inf),
}
"""Ends included."""

INTEGERS = ("steps", "top_k", "radius", "patience", "stable_steps", "window", "eos_id", "eot_id")
SWITCHES = ("skip_negative", "forbid_eos", "distrust_eos", "stop_at_eos")


def settings(
    method: Method,
    batch: int,
    *,
    steps: Any = None,
    grid_end: float = 1e-3,
    temperature: Any = 0.0,
    top_p: Any = 1.0,
    top_k: Any = 0,
    order_temperature: Any = 0.0,
    threshold: Any = 0.9,
    factor: Any = 1.0,
    entropy_bound: Any = 0.1,
    guidance_weight: Any = 0.5,
    guidance_end: Any = None,
    informative_share: Any = 0.3,
    radius: Any = 4,
    plausible: Any = 0.0,
    change_limit: Any = 0.1,
    patience: Any = 1,
    stable_steps: Any = 2,
    stable_probability: Any = 0.9,
    window: Any = 16,
    skip_negative: Any = True,
    eos_id: Any = None,
    eot_id: Any = None,
    forbid_eos: Any = False,
    distrust_eos: Any = False,
    stop_at_eos: Any = False,
) -> Settings:
    """`Settings` of `batch` rows: every value is one for all rows or an array [B].

    The defaults for guidance and acceleration are those of our reconstruction of FoCore, whose text was not
    at hand; see `information`.

    Args:
      steps: denoising steps for the whole response, a multiple of the number of blocks; None = G, one token
        a step. Only commit='quota' reads it.
      grid_end: ε, where Dream's time grid ends.
      guidance_end: None = `guidance_weight` throughout.

    Raises:
      ValueError: a value out of its range, steps that blocks do not divide or that are more than there are
        masked positions, or a use of EOS without `eos_id`.
    """
    values = {name: x for name, x in locals().items() if name in Settings._fields}
    values["steps"] = method.max_new_tokens if steps is None else steps
    values["guidance_end"] = guidance_weight if guidance_end is None else guidance_end
    values |= {name: -1 if values[name] is None else values[name] for name in ("eos_id", "eot_id")}
    rows: dict[str, np.ndarray] = {}
    for name, value in values.items():
        dtype = np.int32 if name in INTEGERS else bool if name in SWITCHES else np.float32
        x = np.asarray(value)
        if name in INTEGERS:
            x = np.minimum(x, 2**30)  # an infinite window is a window too
        if x.ndim > 1 or (x.ndim == 1 and len(x) != batch):
            raise ValueError(f"{name} has shape {x.shape}; give one value or one for each of {batch} rows")
        low, high = RANGES.get(name, (-math.inf, math.inf))
        if not np.all((low <= x) & (x <= high)) or (name == "top_p" and np.any(x == 0)):
            raise ValueError(f"{name}={value} is outside its range [{low}, {high}] (top_p above 0)")
        rows[name] = np.broadcast_to(x.astype(dtype), batch)
    total = rows["steps"]
    if np.any(total % method.blocks) or np.any(total < 1):
        raise ValueError(f"steps={steps} must be a positive multiple of the {method.blocks} blocks")
    if np.any(total > method.max_new_tokens):
        raise ValueError(
            f"steps={steps} are more than the {method.max_new_tokens} masked positions: some would commit "
            f"nothing; at most {method.max_new_tokens}"
        )
    if np.any((rows["forbid_eos"] | rows["distrust_eos"] | rows["stop_at_eos"]) & (rows["eos_id"] < 0)):
        raise ValueError("forbid_eos, distrust_eos and stop_at_eos need eos_id")
    rows["steps"] = total // method.blocks
    rows["shares"] = np.stack([grid_shares(int(s), grid_end, method.max_new_tokens) for s in rows["steps"]])
    return Settings(**{name: jnp.asarray(rows[name]) for name in Settings._fields})


def grid_shares(steps: int, end: float, size: int) -> np.ndarray:
    """Dream's shares p_i = 1 - t_{i+1} / t_i, 1 at the last step, on an even grid t from 1 to `end`.

    In float32, where the number of tokens int(n·p_i) is decided; the grid's upper half is computed from its
    end, as torch.linspace does.

    Returns:
      f32[size], 1 beyond `steps`.

    Raises:
      ValueError: an end outside (0, 1).
    """
    if not 0 < end < 1:
        raise ValueError(f"grid_end={end} must be between 0 and 1")
    one, last = np.float32(1), np.float32(end)
    index = np.arange(steps + 1, dtype=np.float32)
    step = (last - one) / np.float32(steps)
    t = np.where(index < (steps + 1) // 2, one + step * index, last - step * (np.float32(steps) - index))
    shares = np.ones(size, np.float32)
    shares[: steps - 1] = (one - t[1:] / t[:-1])[: steps - 1]
    return shares
