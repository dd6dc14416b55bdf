"""TRL: the trainers' own methods, with a bare object for the trainer and a table for the model."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.gmpo import GMPOTrainer
from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.experimental.sdft import loss_utils
from trl.rewards import get_soft_overlong_punishment

from golden_losses.inputs import Case
from golden_losses.with_torch import Accelerator, evaluate, model

__all__ = ["CASES", "evaluate"]

PartialState()  # some helpers of the trainers look for it
MAX_LENGTH = 10
IS_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def trainer(**more: Any) -> SimpleNamespace:
    """Attributes that the trainers read: GRPOConfig's defaults, and one process without accumulation."""
    args = dict(
        delta=None,
        use_bias_correction_kl=True,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        steps_per_generation=1,
        gradient_accumulation_steps=1,
        gradient_checkpointing_kwargs=None,
        per_device_train_batch_size=8,
        entropy_target=0.2,
        entropy_coef_delta=0.005,
        entropy_coef_min=0.0,
        entropy_coef_max=1.0,
        center_rewards_coefficient=None,
    )
    own = dict(
        accelerator=Accelerator(),
        model=model(),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        epsilon_low=0.2,
        epsilon_high=0.2,
        beta=0.0,
        loss_type="dapo",
        use_vllm=False,
        vllm_importance_sampling_correction=True,
        max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
        entropy_coef=0.0,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    settings = {key: more.pop(key) for key in list(more) if key in args}
    return SimpleNamespace(**own | more, args=SimpleNamespace(**args | settings))


def grpo(logp, mask, advantages, *, kind=GRPOTrainer, entropy=None, **options):
    """GRPOTrainer._compute_loss, given the log-probs that it would get of the model."""
    tensors = {
        name: options.pop(key)
        for key, name in (
            ("old_logp", "old_per_token_logps"),
            ("ref_logp", "ref_per_token_logps"),
            ("behaviour_logp", "sampling_per_token_logps"),
            ("importance_sampling_ratio", "importance_sampling_ratio"),
        )
        if key in options
    }
    entropy = torch.ones_like(logp) if entropy is None else entropy
    own = trainer(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logp, entropy, None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        **options,
    )
    empty = mask[:, :0]
    inputs = dict(prompt_ids=empty, prompt_mask=empty, completion_ids=mask, completion_mask=mask)
    inputs |= dict(advantages=advantages, num_items_in_batch=mask.sum()) | tensors
    return kind._compute_loss(own, None, inputs)


def with_token_advantages(token_advantages, **inputs):
    return grpo(advantages=token_advantages, **inputs)


def with_overflow(overflow_logp, **inputs):
    return grpo(old_logp=overflow_logp, **inputs)


def with_garbage(garbage_logp, **inputs):
    return grpo(garbage_logp, **inputs)


def generate(kind, rewards, mask=None, old_logp=None, behaviour_logp=None, ref_logp=None, **options):
    """The trainer's method between sampling and training: advantages of rewards [N, K], and IS weights."""
    rows = len(rewards)
    mask = torch.ones(rows, 2, dtype=torch.long) if mask is None else mask
    old_logp = torch.zeros(mask.shape) if old_logp is None else old_logp

    def logps(model, *args, **kwargs):
        return (ref_logp if model == "reference" else old_logp), None, None

    # Tool tokens are those that the mask leaves out: every completion is as wide as the mask.
    ids, tools, sampled = mask.tolist(), mask.tolist(), None
    sampled = None if behaviour_logp is None else behaviour_logp.tolist()
    generated = ([[0]] * rows, ids, tools, [""] * rows, sampled, {}, None, None)
    if kind is RLOOTrainer:
        generated = ([[0]] * rows, ids, [""] * rows)
    settings = dict(
        num_generations=4,
        scale_rewards="group",
        multi_objective_aggregation="sum_then_normalize",
        reward_weights=torch.ones(rewards.shape[1]),
        normalize_advantages=False,
        num_iterations=1,
    )
    own = trainer(
        **settings | options,
        environment_factories=None,
        environments=None,
        tools=None,
        _generate=lambda prompts: generated,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        _is_vlm=False,
        _get_per_token_logps_and_entropies=logps,
        ref_model="reference",
        _calculate_rewards=lambda *args: rewards,
        reward_funcs=range(rewards.shape[1]),
        reward_func_names=[str(k) for k in range(rewards.shape[1])],
        reward_clip_range=None,
        log_multimodal=False,
        _pending_extra_logs={},
        _pending_metrics={},
        _logs=defaultdict(list) | {"rewards": defaultdict(list), "extra": defaultdict(list)},
    )
    return kind._generate_and_score_completions(own, [{"prompt": ""}] * rows)


def advantages(rewards, **options):
    return generate(GRPOTrainer, rewards[:, None], **options)["advantages"]


def advantages_of_two(rewards, more_rewards, *, weights, **options):
    several = torch.stack([rewards, more_rewards], dim=1)
    return generate(GRPOTrainer, several, reward_weights=torch.tensor(weights), **options)["advantages"]


def rloo_advantages(rewards):
    return generate(RLOOTrainer, rewards[:, None])["advantages"]


def corrected(logp, old_logp, behaviour_logp, mask, advantages, **options):
    """The loss under the importance weights that the trainer made of the sampler's log-probs."""
    options = dict(use_vllm=True) | options
    made = generate(
        GRPOTrainer,
        advantages[:, None],
        mask=mask,
        old_logp=old_logp,
        behaviour_logp=behaviour_logp,
        **options,
    )
    weights = made["importance_sampling_ratio"]
    return grpo(logp, mask, advantages, old_logp=old_logp, importance_sampling_ratio=weights, **options)


def rloo(logp, old_logp, mask, counted_advantages, *, epsilon):
    own = trainer(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logp, torch.ones_like(logp), None),
        epsilon_low=epsilon,
        epsilon_high=epsilon,
    )
    inputs = dict(prompt_ids=mask, prompt_mask=mask, completion_ids=mask, completion_mask=mask)
    inputs |= dict(advantages=counted_advantages, old_logps=(old_logp * mask).sum(1))
    return RLOOTrainer._compute_loss(own, None, inputs)


def gmpo(counted_advantages, **inputs):
    return grpo(advantages=counted_advantages, kind=GMPOTrainer, **inputs)


def adaptive_entropy(logp, mask, advantages, entropy, *, factors, start):
    """The coefficient after each of some steps whose entropies are `entropy` times a factor."""
    own = trainer(
        _entropy_bonus_enabled=True,
        use_adaptive_entropy=True,
        entropy_coef=start,
        _last_world_entropy=0.0,
        _entropy_window_stats=None,
    )
    inputs = dict(prompt_ids=mask[:, :0], prompt_mask=mask[:, :0], completion_ids=mask, completion_mask=mask)
    inputs |= dict(advantages=advantages, num_items_in_batch=mask.sum())
    coefficients = []
    for factor in factors:
        step = logp, factor * entropy, None
        own._get_per_token_logps_and_entropies = lambda *args, step=step, **kwargs: step
        GRPOTrainer._compute_loss(own, None, inputs)
        coefficients.append(own.entropy_coef)
    return torch.tensor(coefficients)


class Table:
    """In place of a model with a fused head: what it gives for the labels is known, 0 where there is none."""

    def __init__(self, logp, mask):
        zeros = torch.zeros_like(logp)
        self.outputs = SimpleNamespace(
            log_probs=logp * mask, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), logits=None
        )
        self.is_gradient_checkpointing = False

    def __call__(self, **inputs):
        return self.outputs


def with_prompt(mask):
    """The mask with the one prompt token before the completions that is left when labels are shifted."""
    return torch.nn.functional.pad(mask, (1, 0))


def dpo(logp, ref_logp, mask, *, loss_type, beta, label_smoothing=0.0):
    own = trainer(
        beta=beta,
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=label_smoothing,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        precompute_ref_logps=False,
        ref_model=Table(ref_logp, mask),
        _total_train_tokens=0,
        _tp_size=1,
    )
    full = with_prompt(mask)
    inputs = dict(input_ids=full, attention_mask=full, completion_mask=full)
    return DPOTrainer._compute_loss(own, Table(logp, mask), inputs, False)


def kto(logp, ref_logp, mask, desirable, mismatched_ratio, *, beta, desirable_weight, undesirable_weight):
    """`mismatched_ratio`: h of the mismatched pairs, whose mean TRL clamps at 0."""
    own = trainer(
        beta=beta,
        loss_type="kto",
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        calculate_KL=True,
        precompute_ref_logps=True,
        _compute_kl_logps=lambda model, batch: mismatched_ratio,
        _total_train_tokens=0,
        _tp_size=1,
    )
    full = with_prompt(mask)
    inputs = dict(input_ids=full, attention_mask=full, completion_mask=full, label=desirable)
    inputs |= dict(ref_logps=(ref_logp * mask).sum(1), ref_KL_logps=torch.zeros_like(mismatched_ratio))
    return KTOTrainer._compute_loss(own, Table(logp, mask), inputs, False)


def bradley_terry(scores, margin=None):
    outputs = SimpleNamespace(logits=scores[:, None])
    own = trainer(_total_train_tokens=0, _tp_size=1)
    inputs = dict(attention_mask=torch.ones(len(scores), 1)) | ({} if margin is None else {"margin": margin})
    return RewardTrainer.compute_loss(own, lambda **kwargs: outputs, inputs)


def odds_ratio(mean_logp, *, beta):
    """ORPO's second term, which the trainer subtracts from the negative log-likelihood."""
    chosen, rejected = mean_logp.chunk(2)
    return -ORPOTrainer.odds_ratio_loss(trainer(beta=beta), chosen, rejected)[0].mean()


def cpo(chosen_and_rejected, **options):
    own = trainer(alpha=0.0, **options)
    return CPOTrainer.cpo_loss(own, *chosen_and_rejected.chunk(2))[0].mean()


def simpo(mean_logp, **options):
    return cpo(mean_logp, loss_type="simpo", **options)


def labels(mask):
    return torch.where(mask > 0, 0, -100)


def jsd(logits, teacher_logits, mask, **options):
    return GKDTrainer.generalized_jsd_loss(logits, teacher_logits, labels(mask), **options)


def top_k(logits, teacher_logits, mask, **options):
    return IWOPDTrainer.generalized_jsd_loss(logits, teacher_logits, labels(mask), **options)


def on_policy_distillation(logits, teacher_logits, tokens, mask):
    loss = loss_utils.compute_sampled_token_self_distillation_loss(
        logits, teacher_logits, tokens, distillation_alpha=1.0
    )
    return (loss * mask).sum() / mask.sum()


def overlong(lengths, **options):
    return torch.tensor(get_soft_overlong_punishment(**options)([[0] * int(n) for n in lengths]))


POLICY = ("logp", "old_logp", "mask", "advantages")
KL = (*POLICY, "ref_logp")
CORRECTED = (*POLICY, "behaviour_logp")
PREFERENCE = ("logp", "ref_logp", "mask")
DISTILLATION = ("logits", "teacher_logits", "mask")
JUST_REWARDS = ("rewards",)

CASES = {
    **{name: Case(grpo, POLICY, {"loss_type": name}) for name in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo")},
    "gspo": Case(grpo, POLICY, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    "cispo": Case(grpo, POLICY, {"loss_type": "cispo", "epsilon_high": 1.5}),  # the bound itself, not 1 + it
    "luspo": Case(grpo, POLICY, {"loss_type": "luspo", "importance_sampling_level": "sequence"}),
    "gmpo": Case(
        gmpo, ("logp", "old_logp", "mask", "counted_advantages"), {"epsilon_low": 0.4, "epsilon_high": 0.4}
    ),
    "rloo": Case(rloo, ("logp", "old_logp", "mask", "counted_advantages"), {"epsilon": 0.2}),
    "grpo, two sides and dual": Case(
        grpo, POLICY, {"loss_type": "grpo", "epsilon_low": 0.1, "epsilon_high": 0.28, "delta": 1.5}
    ),
    "dapo, advantages of tokens": Case(
        with_token_advantages, ("logp", "old_logp", "mask", "token_advantages"), {"epsilon_high": 0.28}
    ),
    "luspo, ratios of tokens": Case(grpo, POLICY, {"loss_type": "luspo"}),
    "sapo, temperatures": Case(
        grpo, POLICY, {"loss_type": "sapo", "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 1.9}
    ),
    "grpo, kl": Case(grpo, KL, {"loss_type": "grpo", "beta": 0.04}),
    "grpo, kl uncorrected": Case(
        grpo, KL, {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False}
    ),
    "gspo, kl": Case(grpo, KL, {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.04}),
    "dapo, entropy bonus": Case(
        grpo,
        (*POLICY, "entropy"),
        {"_entropy_bonus_enabled": True, "entropy_coef": 0.01},
        ("logp", "entropy"),
    ),
    "adaptive entropy": Case(
        adaptive_entropy,
        ("logp", "mask", "advantages", "entropy"),
        {"factors": [1.0, 0.1, 0.1, 0.3, 1.0, 0.2, 0.01], "start": 0.003},
        (),
    ),
    "off-policy sequence mask": Case(
        grpo, CORRECTED, {"loss_type": "grpo", "off_policy_mask_threshold": 0.05}
    ),
    **{
        f"correction {mode}": Case(
            corrected,
            CORRECTED,
            {
                "loss_type": "grpo",
                "vllm_importance_sampling_mode": mode,
                "vllm_importance_sampling_clip_min": None if mode == "sequence_mask" else 0.8,
                "vllm_importance_sampling_clip_max": 3.0 if mode == "sequence_mask" else 1.4,
            },
        )
        for mode in IS_MODES
    },
    **{
        f"advantages, scale {scale}": Case(advantages, JUST_REWARDS, {"scale_rewards": scale}, ())
        for scale in ("group", "batch", "none")
    },
    "advantages, normalised one by one": Case(
        advantages_of_two,
        ("rewards", "more_rewards"),
        {"multi_objective_aggregation": "normalize_then_sum", "weights": [1.0, 0.5]},
        (),
    ),
    "advantages, one without a verdict": Case(
        lambda partial_rewards: advantages(partial_rewards), ("partial_rewards",), {}, ()
    ),
    "rloo advantages": Case(rloo_advantages, JUST_REWARDS, {}, ()),
    "dpo": Case(dpo, PREFERENCE, {"loss_type": "sigmoid", "beta": 0.1}),
    "ipo": Case(dpo, PREFERENCE, {"loss_type": "ipo", "beta": 0.1}),
    "kto": Case(
        kto,
        (*PREFERENCE, "desirable", "mismatched_ratio"),
        {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 0.7},
    ),
    "bradley-terry": Case(bradley_terry, ("scores",), {}, ("scores",)),
    "bradley-terry, margin": Case(bradley_terry, ("scores", "margin"), {}, ("scores",)),
    "odds ratio": Case(odds_ratio, ("mean_logp",), {"beta": 0.1}, ("mean_logp",)),
    "simpo": Case(
        simpo, ("mean_logp",), {"beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.0}, ("mean_logp",)
    ),
    **{
        f"jsd, beta {beta}": Case(jsd, DISTILLATION, {"beta": beta, "temperature": t}, ("logits",))
        for beta, t in ((0.0, 1.0), (0.3, 1.0), (0.5, 2.0), (1.0, 1.0))
    },
    "top-2 forward kl with tail": Case(top_k, DISTILLATION, {"beta": 0, "top_k": 2}, ("logits",)),
    "top-2 reverse kl with tail": Case(top_k, DISTILLATION, {"beta": 1, "top_k": 2}, ("logits",)),
    "on-policy distillation": Case(
        on_policy_distillation, ("logits", "teacher_logits", "tokens", "mask"), {}, ("logits",)
    ),
    "overlong penalty": Case(
        overlong, ("lengths",), {"max_completion_len": 100, "soft_punish_cache": 20}, ()
    ),
    # not finite
    "log-ratio of 1000": Case(
        with_overflow, ("logp", "overflow_logp", "mask", "advantages"), {"loss_type": "grpo"}
    ),
    "garbage where masked": Case(
        with_garbage,
        ("garbage_logp", "old_logp", "mask", "advantages"),
        {"loss_type": "grpo"},
        ("garbage_logp",),
    ),
}
