"""Liger's fused losses as they are called: hidden states and an output matrix in, a loss in chunks out."""

import torch
from liger_kernel.chunked_loss import (
    LigerFusedLinearDPOLoss,
    LigerFusedLinearGRPOLoss,
    LigerFusedLinearJSDLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)

from golden_losses.inputs import Case
from golden_losses.with_torch import evaluate

__all__ = ["CASES", "evaluate"]

IGNORED = -100


def grpo(
    hidden, weight, tokens, mask, advantages, old_logp, ref_logp=None, weights=None, *, beta=0.0, **options
):
    loss = LigerFusedLinearGRPOLoss(beta=beta, use_ref_model=beta != 0, compiled=False, **options)
    return loss(
        hidden,
        weight,
        tokens,
        mask,
        advantages,
        ref_per_token_logps=ref_logp,
        old_per_token_logps=old_logp,
        vllm_is_ratio=weights,
    )[0]


def corrected(old_logp, behaviour_logp, *, cap, **inputs):
    """Weights come from outside; these are truncated ratios of tokens, as TRL passes them."""
    return grpo(old_logp=old_logp, weights=(old_logp - behaviour_logp).exp().clamp(max=cap), **inputs)


def labels(tokens, mask):
    return torch.where(mask > 0, tokens, IGNORED)


def dpo(hidden, ref_hidden, weight, tokens, mask, **options):
    loss = LigerFusedLinearDPOLoss(compiled=False, **options)
    target = labels(tokens, mask)
    return loss(weight, hidden, target, ref_input=ref_hidden, ref_weight=weight)[0]


def kto(hidden, ref_hidden, weight, tokens, mask, desirable, mismatched_ratio, **options):
    loss = LigerFusedLinearKTOLoss(compiled=False, use_ref_model=True, **options)
    kl = mismatched_ratio.mean().clamp(min=0)
    target = labels(tokens, mask)
    return loss(
        hidden, weight, target, None, desirable.bool(), ref_input=ref_hidden, ref_weight=weight, kl=kl
    )[0]


def orpo(hidden, weight, tokens, nonempty_mask, **options):
    target = labels(tokens, nonempty_mask)
    return LigerFusedLinearORPOLoss(compiled=False, **options)(weight, hidden, target)[0]


def simpo(hidden, weight, tokens, nonempty_mask, **options):
    target = labels(tokens, nonempty_mask)
    return LigerFusedLinearSimPOLoss(compiled=False, **options)(weight, hidden, target)[0]


def jsd(hidden, ref_hidden, weight, tokens, mask, **options):
    """Of a teacher with the student's output matrix."""
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False, **options)
    target = labels(tokens, mask).flatten()
    return loss(hidden.flatten(0, 1), weight, ref_hidden.flatten(0, 1), weight, target)


POLICY = ("hidden", "weight", "tokens", "mask", "advantages", "old_logp")
KL = (*POLICY, "ref_logp")
WITH_REFERENCE = ("hidden", "weight", "tokens", "mask", "ref_hidden")
MEANS = ("hidden", "weight", "tokens", "nonempty_mask")  # the mean over an empty row's tokens is NaN here
HIDDEN = ("hidden",)

CASES = {
    **{name: Case(grpo, POLICY, {"loss_type": name}, HIDDEN) for name in ("grpo", "bnpo", "dapo", "sapo")},
    "dr_grpo": Case(grpo, POLICY, {"loss_type": "dr_grpo", "max_completion_length": 10}, HIDDEN),
    "cispo": Case(grpo, POLICY, {"loss_type": "cispo", "epsilon_high": 1.5}, HIDDEN),
    "gspo": Case(grpo, POLICY, {"loss_type": "grpo", "importance_sampling_level": "sequence"}, HIDDEN),
    "luspo": Case(grpo, POLICY, {"loss_type": "luspo", "importance_sampling_level": "sequence"}, HIDDEN),
    "grpo, two sides and dual": Case(
        grpo, POLICY, {"loss_type": "grpo", "epsilon_low": 0.1, "epsilon_high": 0.28, "delta": 1.5}, HIDDEN
    ),
    "dapo, kl": Case(grpo, KL, {"beta": 0.04}, HIDDEN),
    "dapo, kl corrected": Case(grpo, KL, {"beta": 0.04, "use_bias_correction_kl": True}, HIDDEN),
    "grpo, corrected": Case(
        corrected, (*POLICY, "behaviour_logp"), {"loss_type": "grpo", "cap": 1.4}, HIDDEN
    ),
    "dpo": Case(dpo, WITH_REFERENCE, {"beta": 0.1}, HIDDEN),
    "kto": Case(kto, (*WITH_REFERENCE, "desirable", "mismatched_ratio"), {"beta": 0.3}, HIDDEN),
    "orpo": Case(orpo, MEANS, {"beta": 0.1}, HIDDEN),
    "simpo": Case(simpo, MEANS, {"beta": 2.0, "gamma": 0.5, "alpha": 0.0}, HIDDEN),
    **{f"jsd, beta {beta}": Case(jsd, WITH_REFERENCE, {"beta": beta}, HIDDEN) for beta in (0.0, 0.3, 1.0)},
    # counts masked tokens, and divides by the width of the mask
    "luspo, ratios of tokens": Case(grpo, POLICY, {"loss_type": "luspo"}, HIDDEN),
}
