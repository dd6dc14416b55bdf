"""verl: the functions of trainer/ppo, which need none of the modules that are replaced here to be imported.

pip install --no-deps verl==0.9.1 && pip install torch numpy omegaconf codetiming tensordict transformers
"""

import sys
from unittest.mock import MagicMock

import torch

sys.modules |= {name: MagicMock(__path__=[], __spec__=None) for name in ("ray", "orjson")}

from verl.trainer.ppo import core_algos  # noqa: E402
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask  # noqa: E402
from verl.workers.config.actor import ActorConfig, PolicyLossConfig  # noqa: E402

from golden_losses.inputs import Case  # noqa: E402
from golden_losses.with_torch import evaluate  # noqa: E402

__all__ = ["CASES", "evaluate"]

GAMMA, LAMBDA = 0.97, 0.9


def config(*, policy_loss=None, **options):
    """An actor's configuration: the library's defaults but for the options."""
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(**policy_loss or {}),
        **options,
    )


def policy(logp, old_logp, mask, advantages, *, loss, weights=None, **options):
    """A registered policy loss; advantages of sequences are spread over their tokens, as the trainer does."""
    if advantages.ndim == 1:
        advantages = advantages[:, None] * mask
    settings = config(**options)
    function = core_algos.get_policy_loss_fn(loss)
    mode = settings.loss_agg_mode
    return function(old_logp, logp, advantages, mask, mode, settings, rollout_is_weights=weights)[0]


def with_token_advantages(token_advantages, **inputs):
    return policy(advantages=token_advantages, **inputs)


def with_far_ratios(far_logp, token_advantages, **inputs):
    return policy(old_logp=far_logp, advantages=token_advantages, **inputs)


def with_garbage(garbage_logp, token_advantages, **inputs):
    return policy(garbage_logp, advantages=token_advantages, **inputs)


def corrected(logp, old_logp, behaviour_logp, mask, advantages, *, correction, **options):
    """The loss under the weights and the mask that the trainer makes of the sampler's log-probs."""
    weights, kept, _ = compute_rollout_correction_and_rejection_mask(
        old_logp, behaviour_logp, mask, **correction
    )
    weights = None if weights is None else weights.batch["rollout_is_weights"]
    return policy(logp, old_logp, kept, advantages, weights=weights, **options)


def kl_loss(logp, ref_logp, mask, *, kind):
    return core_algos.agg_loss(core_algos.kl_penalty(logp, ref_logp, kind), mask, "token-mean")


def aggregated(logp, mask, *, mode, **options):
    return core_algos.agg_loss(logp, mask, mode, **options)


def entropy_loss(logits, mask):
    return core_algos.compute_entropy_loss(logits, mask)


def value_loss(values, old_values, returns, mask, *, cliprange_value):
    return core_algos.compute_value_loss(values, returns, old_values, mask, cliprange_value)[0]


def at_last_token(rewards, mask):
    """Rewards of sequences as the trainer lays them out: [N] to [N, T], at the last token of the policy."""
    last = (torch.arange(mask.shape[1]) * mask).argmax(1)
    return torch.zeros(mask.shape).scatter(1, last[:, None], rewards[:, None])


def advantages(rewards, mask, group, *, name, **options):
    estimate = core_algos.get_adv_estimator_fn(name)
    return estimate(at_last_token(rewards, mask), mask, index=group.numpy(), **options)[0]


def with_lonely_row(lonely_group, **inputs):
    return advantages(group=lonely_group, **inputs)


def remax(rewards, greedy_rewards, mask):
    return (
        core_algos.compute_remax_outcome_advantage(at_last_token(rewards, mask), greedy_rewards, mask)[0]
        * mask
    )  # which it leaves out at tool tokens


def reinforce_plus_plus(token_rewards, mask, *, gamma):
    settings = MagicMock(gamma=gamma)
    return core_algos.compute_reinforce_plus_plus_outcome_advantage(token_rewards, mask, settings)[0] * mask


def gae(token_rewards, values, mask, *, gamma, lam):
    found, returns = core_algos.compute_gae_advantage_return(token_rewards, values, mask, gamma, lam)
    return torch.stack([found, returns]) * mask


def gdpo(rewards, more_rewards, mask, group, *, weights):
    rows, length = mask.shape
    return core_algos.compute_gdpo_outcome_advantage(
        torch.zeros(mask.shape),
        mask,
        group.numpy(),
        config={"gdpo_reward_keys": ["a", "b"], "gdpo_reward_weights": weights},
        non_tensor_batch={"a": rewards.numpy(), "b": more_rewards.numpy()},
        batch={"prompts": torch.zeros(rows, 1), "attention_mask": torch.ones(rows, 1 + length, dtype=int)},
    )[0]


def penalised_rewards(token_rewards, old_logp, ref_logp, mask, *, kl_ratio):
    return core_algos.compute_rewards(token_rewards, old_logp, ref_logp, kl_ratio) * mask


POLICY = ("logp", "old_logp", "mask", "advantages")
TOKENS = ("logp", "old_logp", "mask", "token_advantages")
FAR = ("logp", "far_logp", "mask", "token_advantages")
CORRECTED = (*POLICY, "behaviour_logp")
OUTCOME = ("rewards", "mask", "group")
NO_CLIP = {"clip_ratio_low": 0.9999, "clip_ratio_high": 1e9, "clip_ratio_c": 1e9}

CASES = {
    **{
        name: Case(policy, POLICY, {"loss": name})
        for name in ("vanilla", "gspo", "sapo", "gpg", "geo_mean", "cispo", "dppo_tv", "dppo_kl")
    },
    "vanilla, two sides and dual": Case(
        with_token_advantages,
        TOKENS,
        {"loss": "vanilla", "clip_ratio_low": 0.1, "clip_ratio_high": 0.28, "clip_ratio_c": 1.5},
    ),
    "vanilla, far ratios": Case(with_far_ratios, FAR, {"loss": "vanilla", **NO_CLIP}),
    "sapo, far ratios": Case(with_far_ratios, FAR, {"loss": "sapo"}),
    "gspo, far ratios": Case(with_far_ratios, FAR, {"loss": "gspo"}),
    "cispo, far ratios": Case(with_far_ratios, FAR, {"loss": "cispo"}),
    "gspo, mean of sequences": Case(
        with_token_advantages,
        TOKENS,
        {
            "loss": "gspo",
            "loss_agg_mode": "seq-mean-token-mean",
            "clip_ratio_low": 0.1,
            "clip_ratio_high": 0.15,
        },
    ),
    "dppo_tv, two sides": Case(
        with_token_advantages, TOKENS, {"loss": "dppo_tv", "clip_ratio_low": 0.1, "clip_ratio_high": 0.15}
    ),
    "dppo_kl, two sides": Case(
        with_token_advantages, TOKENS, {"loss": "dppo_kl", "clip_ratio_low": 0.01, "clip_ratio_high": 0.1}
    ),
    "clip_cov": Case(
        policy,
        POLICY,
        # a ratio of 1 takes all tokens between the bounds, so that no random choice is left
        {"loss": "clip_cov", "policy_loss": {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 0.5}},
    ),
    "kl_cov": Case(
        policy, POLICY, {"loss": "kl_cov", "policy_loss": {"kl_cov_ratio": 0.15, "ppo_kl_coef": 1.0}}
    ),
    **{
        f"correction {name}": Case(corrected, CORRECTED, {"loss": "vanilla", "correction": correction})
        for name, correction in {
            "tis": {"rollout_is": "token", "rollout_is_threshold": 1.4},
            "icepop": {"rollout_is": "token", "rollout_is_threshold": "0.8_1.4"},
            "sequence tis": {"rollout_is": "sequence", "rollout_is_threshold": 1.4},
            "sequence rejection": {"rollout_rs": "seq_sum_k1", "rollout_rs_threshold": "0.5_2.0"},
        }.items()
    },
    **{
        f"kl {kind}": Case(kl_loss, ("logp", "ref_logp", "mask"), {"kind": kind})
        for kind in ("k1", "k2", "k3", "k1+", "k3+")
    },
    **{
        f"aggregation {mode}": Case(aggregated, ("logp", "mask"), {"mode": mode})
        for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
    },
    "entropy": Case(entropy_loss, ("logits", "mask"), {}, ("logits",)),
    "value loss": Case(
        value_loss, ("values", "old_values", "returns", "mask"), {"cliprange_value": 0.2}, ("values",)
    ),
    "grpo advantages": Case(advantages, OUTCOME, {"name": "grpo"}, ()),
    "dr_grpo advantages": Case(advantages, OUTCOME, {"name": "grpo", "norm_adv_by_std_in_grpo": False}, ()),
    "grpo_vectorized advantages": Case(advantages, OUTCOME, {"name": "grpo_vectorized"}, ()),
    "rloo advantages": Case(advantages, OUTCOME, {"name": "rloo"}, ()),
    "rloo_vectorized advantages": Case(advantages, OUTCOME, {"name": "rloo_vectorized"}, ()),
    "opo advantages": Case(advantages, OUTCOME, {"name": "opo"}, ()),
    "pass@k advantages": Case(
        advantages, OUTCOME, {"name": "grpo_passk", "config": {"norm_adv_by_std_in_grpo": True}}, ()
    ),
    "reinforce++ baseline advantages": Case(
        advantages, OUTCOME, {"name": "reinforce_plus_plus_baseline"}, ()
    ),
    "reinforce++ advantages": Case(reinforce_plus_plus, ("token_rewards", "mask"), {"gamma": GAMMA}, ()),
    "remax advantages": Case(remax, ("rewards", "greedy_rewards", "mask"), {}, ()),
    "gdpo advantages": Case(gdpo, (*OUTCOME, "more_rewards"), {"weights": [1.0, 0.5]}, ()),
    "gae": Case(gae, ("token_rewards", "values", "mask"), {"gamma": GAMMA, "lam": LAMBDA}, ()),
    "kl in the reward": Case(
        penalised_rewards, ("token_rewards", "old_logp", "ref_logp", "mask"), {"kl_ratio": 0.05}, ()
    ),
    # a gradient that is not finite; a group of one whose advantage is its reward
    "garbage where masked": Case(
        with_garbage,
        ("garbage_logp", "old_logp", "mask", "token_advantages"),
        {"loss": "vanilla"},
        ("garbage_logp",),
    ),
    "grpo advantages, group of one": Case(
        with_lonely_row, ("rewards", "mask", "lonely_group"), {"name": "grpo"}, ()
    ),
}
