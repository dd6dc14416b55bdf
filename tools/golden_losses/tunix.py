"""Tunix: its loss functions, given tables in place of what they ask of a model."""

from types import SimpleNamespace
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.distillation.strategies.logit import LogitStrategy
from tunix.rl import algo_core, common
from tunix.rl.grpo.dapo_learner import DAPOConfig, reward_shaping
from tunix.rl.grpo.drgrpo_learner import DrGRPOConfig
from tunix.rl.grpo.grpo_learner import GRPOConfig
from tunix.rl.ppo.ppo_learner import PPOConfig
from tunix.sft.dpo import dpo_trainer

from golden_losses.inputs import Case

CONFIGS = {"grpo": GRPOConfig, "dr_grpo": DrGRPOConfig, "dapo": DAPOConfig}


def evaluate(case: Case, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The case's value, and the gradients of its sum by what it trains; in float32, as in the library."""
    arrays = {key: jnp.asarray(x) for key, x in inputs.items()}
    value = case.run(**arrays, **case.options)
    trained = {key: arrays[key] for key in case.trains}
    gradients = (
        jax.grad(lambda x: jnp.sum(case.run(**arrays | x, **case.options)))(trained) if trained else {}
    )
    return np.asarray(value), {key: np.asarray(x) for key, x in gradients.items()}


def example(**arrays):
    """A training example whose other fields are not looked at."""
    fields = ("prompt_ids", "completion_ids", "old_per_token_logps", "ref_per_token_logps")
    return SimpleNamespace(**dict.fromkeys(fields) | arrays)


def with_logps(logp, logits, loss, *args):
    """The loss, with log-probs and logits that come from no model."""
    with patch.object(common, "compute_per_token_logps", lambda *args, **kwargs: (logp, logits)):
        return loss(nnx.Module(), *args, pad_id=0, eos_id=0)[0]


def grpo(
    logp,
    old_logp,
    mask,
    advantages,
    ref_logp=None,
    weights=None,
    *,
    config="grpo",
    temperature=1.0,
    **options,
):
    settings = CONFIGS[config](**options)
    settings.temperature = temperature
    batch = example(
        completion_mask=mask,
        advantages=advantages,
        old_per_token_logps=old_logp,
        ref_per_token_logps=ref_logp,
        sampler_is_weights=weights,
    )
    return with_logps(logp, jnp.zeros((*logp.shape, 2)), algo_core.grpo_loss_fn, batch, settings)


def grpo_dual(*, epsilon_high, epsilon_c, **inputs):
    """Options that the loss looks for and the configuration does not declare."""
    more = dict(epsilon_high=epsilon_high, epsilon_c=epsilon_c)
    with patch.dict(CONFIGS, grpo=lambda **options: SimpleNamespace(**vars(GRPOConfig(**options)), **more)):
        return grpo(**inputs)


def grpo_far(far_logp, token_advantages, **inputs):
    return grpo(old_logp=far_logp, advantages=token_advantages, **inputs)


def grpo_corrected(old_logp, behaviour_logp, *, cap, **inputs):
    """Weights come from outside; these are truncated ratios of tokens."""
    return grpo(old_logp=old_logp, weights=jnp.minimum(jnp.exp(old_logp - behaviour_logp), cap), **inputs)


def ppo(logp, old_logp, mask, token_advantages, logits, **options):
    batch = example(completion_mask=mask, advantages=token_advantages, old_per_token_logps=old_logp)
    return with_logps(logp, logits, algo_core.ppo_policy_loss_fn, batch, PPOConfig(**options))


def value_loss(values, old_values, returns, mask, *, clip_range_value):
    # the score at a position is that after its token: the value before the first comes first
    scores = jnp.pad(values, ((0, 0), (0, 1)))
    batch = example(completion_ids=mask, completion_mask=mask, old_values=old_values, returns=returns)
    with patch.object(common, "compute_score", lambda *args, **kwargs: scores):
        return algo_core.ppo_value_loss_fn(None, batch, clip_range_value, 0, 0)[0]


def gae(token_rewards, values, mask, *, gamma, lam):
    return jnp.stack(algo_core.compute_gae_advantages(token_rewards, values, mask, gamma, lam)) * mask


def aggregated(logp, mask, *, mode, **options):
    return common.aggregate_loss(logp, mask, mode, **options)


def kl_loss(logp, ref_logp, mask, *, method):
    return common.aggregate_loss(common.compute_kl_divergence(logp, ref_logp, method), mask, "token-mean")


def advantages(rewards, *, estimator):
    return getattr(algo_core, estimator)(rewards, 4)


def preference(logp, mask=None, ref_logp=None, nonempty_mask=None, **options):
    mask = nonempty_mask if mask is None else mask
    half = len(logp) // 2
    fields = ("input_ids", "positions", "attention_mask", "logits_to_keep", "images")
    batch = SimpleNamespace(
        **dict.fromkeys(fields), completion_mask=mask, ref_chosen_logps=None, ref_rejected_logps=None
    )
    if ref_logp is not None:
        summed = (ref_logp * mask).sum(1)
        batch.ref_chosen_logps, batch.ref_rejected_logps = summed[:half], summed[half:]
    # without its jit, which would keep the table of the first call
    sums = patch.object(dpo_trainer, "compute_logps", dpo_trainer.compute_logps.__wrapped__)
    with sums, patch.object(common, "get_per_token_logps", lambda *args, **kwargs: logp):
        return dpo_trainer.dpo_loss_fn(None, batch, **options)[0]


def distillation(logits, teacher_logits, *, temperature, top_k):
    strategy = LogitStrategy(None, None, None, temperature=temperature, alpha=1.0, distill_top_k=top_k)
    labels = jnp.zeros_like(logits)  # of the other loss, which alpha = 1 leaves out
    return strategy.compute_loss(logits, teacher_logits, labels)[0]


def overlong(lengths, **buffer):
    """The penalty counts the characters of the text, and goes on beyond the longest response."""
    texts = ["." * int(n) for n in lengths]
    return jnp.array(reward_shaping(None, texts, None, overlong_buffer=buffer))


POLICY = ("logp", "old_logp", "mask", "advantages")
KL = (*POLICY, "ref_logp")
CORRECTED = (*POLICY, "behaviour_logp")

CASES = {
    "grpo": Case(grpo, KL, {}),  # k1 is its default, whose expected gradient is 0: no pull to the reference
    "dr_grpo": Case(grpo, KL, {"config": "dr_grpo"}),
    "dapo": Case(grpo, POLICY, {"config": "dapo"}),
    "gspo": Case(grpo, POLICY, {"loss_algo": "gspo-token", "beta": 0.0}),
    "grpo, k3": Case(grpo, KL, {"kl_loss_mode": "low_var_kl"}),
    "grpo, k2": Case(grpo, KL, {"kl_loss_mode": "mse_kl"}),
    "grpo, k3 clamped": Case(grpo, KL, {"kl_loss_mode": "low_var_kl", "kl_clamp_value": 10.0}),
    "grpo, dual": Case(grpo_dual, POLICY, {"beta": 0.0, "epsilon_high": 0.28, "epsilon_c": 1.5}),
    "grpo, far ratios": Case(
        grpo_far,
        ("logp", "far_logp", "mask", "token_advantages"),
        {"beta": 0.0, "loss_agg_mode": "token-mean"},
    ),
    "grpo, corrected": Case(grpo_corrected, CORRECTED, {"beta": 0.0, "cap": 1.4}),
    "ppo": Case(
        ppo,
        ("logp", "old_logp", "mask", "token_advantages", "logits"),
        {"epsilon_low": 0.1, "epsilon_high": 0.28, "epsilon_c": 1.5, "entropy_coef": 0.01},
        ("logp", "logits"),
    ),
    "value loss": Case(
        value_loss, ("values", "old_values", "returns", "mask"), {"clip_range_value": 0.2}, ("values",)
    ),
    "gae": Case(gae, ("token_rewards", "values", "mask"), {"gamma": 0.97, "lam": 0.9}, ()),
    **{
        f"aggregation {mode}": Case(aggregated, ("logp", "mask"), {"mode": mode})
        for mode in (
            "token-mean",
            "sequence-mean-token-mean",
            "sequence-mean-token-scale",
            "seq-mean-token-sum",
            "sequence-mean-token-sum-norm",
        )
    },
    **{
        f"kl {method}": Case(kl_loss, ("logp", "ref_logp", "mask"), {"method": method})
        for method in ("kl", "mse_kl", "low_var_kl")
    },
    **{
        f"{name} advantages": Case(advantages, ("rewards",), {"estimator": estimator}, ())
        for name, estimator in {
            "grpo": "compute_advantages",
            "rloo": "compute_rloo_advantages",
            "dr_grpo": "compute_drgrpo_advantages",
        }.items()
    },
    "dpo": Case(preference, ("logp", "ref_logp", "mask"), {"beta": 0.1}),
    "dpo, smoothed": Case(preference, ("logp", "ref_logp", "mask"), {"beta": 0.1, "label_smoothing": 0.1}),
    "forward kl": Case(
        distillation, ("logits", "teacher_logits"), {"temperature": 2.0, "top_k": 0}, ("logits",)
    ),
    # an odds ratio of summed log-probs, where the paper and TRL have means
    "orpo": Case(preference, ("logp", "nonempty_mask"), {"algorithm": "orpo", "lambda_orpo": 0.1}),
    "overlong penalty": Case(
        overlong,
        ("lengths",),
        {"overlong_buffer_length": 20, "overlong_buffer_penalty": 1.0, "max_response_length": 100},
        (),
    ),
}
