"""At its reduction setting a method is the method it generalises: in loss and gradient, to 1e-6.

Read a row as: this, at these settings, is that. Rows over log-probs use one random batch with log-ratios
between −1 and 1 so that every clip acts; `inside` is the same batch with ratios that no clip touches.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_table import CLASSES, FLOATS, Batch, random_batch, reductions, with_valid

from jaxrl_llm import advantages, losses
from jaxrl_llm.losses import Array

INFINITE = float("inf")
sg = jax.lax.stop_gradient


def surrogate(function: Callable, **options) -> Callable[[Batch], Array]:
    """A surrogate on the batch's log-probs and advantages, as a function of the batch."""
    return lambda b: function(b["logp"], b["old_logp"], b["advantages"], b["mask"], **options)[0]


def kl(function: Callable) -> Callable[[Batch], Array]:
    return lambda b: function(b["logp"], b["ref_logp"], b["mask"], old_logp=b["old_logp"])[0]


def with_inputs(function: Callable[[Batch], Array], **changes: Callable[[Batch], Array]) -> Callable:
    """The function on a batch some of whose inputs are replaced, each by a function of the batch."""
    return lambda b: function(b | {key: change(b) for key, change in changes.items()})


def on_policy(function: Callable[[Batch], Array]) -> Callable[[Batch], Array]:
    """Tokens of the policy itself: every ratio is 1."""
    return with_inputs(function, old_logp=lambda b: jax.lax.stop_gradient(b["logp"]))


def inside(function: Callable[[Batch], Array]) -> Callable[[Batch], Array]:
    """Log-ratios of at most 0.05."""
    return with_inputs(function, old_logp=lambda b: b["logp"] + 0.05 * (b["old_logp"] - b["logp"]))


def gradient_alone(function: Callable[[Batch], Array]) -> Callable[[Batch], Array]:
    """The function less its own value: for losses that agree in the gradient only."""
    return lambda b: (lambda loss: loss - jax.lax.stop_gradient(loss))(function(b))


def of_one_token(function: Callable[[Batch], Array]) -> Callable[[Batch], Array]:
    """Only the first token of every row counts."""
    return with_inputs(function, mask=lambda b: b["mask"] & (jnp.cumsum(b["mask"], axis=1) == 1))


def of_rows(function: Callable[[Batch], Array]) -> Callable[[Batch], Array]:
    """One advantage per row, that of its first column."""
    return with_inputs(
        function, advantages=lambda b: jnp.where(b["valid"], b["advantages"][:, 0], 0)[:, None]
    )


def lengths(b: Batch) -> Array:
    return jnp.sum(b["mask"], axis=1)


def own_mean(b: Batch) -> Array:
    """f[N] mean log-prob of every row, as an author equal to the learner reports it."""
    logp = jnp.where(b["mask"], jax.lax.stop_gradient(b["logp"]), 0)
    return jnp.sum(logp, axis=1) / jnp.maximum(lengths(b), 1)


def old_mean(b: Batch) -> Array:
    """f[N] as `own_mean`, of the old policy."""
    return own_mean(b | {"logp": b["old_logp"]})


def positive(function: Callable[[Batch], Array]) -> Callable[[Batch], Array]:
    """Advantages above 0, one per row."""
    return of_rows(with_inputs(function, advantages=lambda b: jnp.abs(b["advantages"])))


def shared(source_mean: Callable[[Batch], Array] = own_mean, **options) -> Callable[[Batch], Array]:
    """HACPO with every second row another agent's, of equal strength."""
    return lambda b: surrogate(
        losses.hacpo,
        is_own=jnp.arange(b["mask"].shape[0]) % 2 == 0,
        source_mean_logp=source_mean(b),
        source_weight=jnp.ones_like(source_mean(b)),
        **options,
    )(b)


def dual_track(end: int, coefficient: float) -> Callable[[Batch], Array]:
    """Both tracks have the same advantages."""
    return lambda b: surrogate(
        losses.dual_track,
        prefix_advantages=b["advantages"],
        prefix_end=jnp.full(b["mask"].shape[:1], end),
        coefficient=coefficient,
    )(b)


def trrd(teacher: str, **options) -> Callable[[Batch], Array]:
    def loss(b: Batch) -> Array:
        ratio = partial(losses.trrd_log_ratio, teacher_logp=b[teacher], **options)
        return surrogate(losses.ppo_clip, ratio=ratio)(b)

    return loss


def pair(function: Callable, *further: Array, **options) -> Callable[[Batch], Array]:
    """A loss of pairs without a reference."""
    return lambda b: function(b["chosen_logps"], b["rejected_logps"], *further, b["valid"], **options)[0]


def referenced(function: Callable, **options) -> Callable[[Batch], Array]:
    """A loss of pairs with a reference."""
    names = "chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps", "valid"
    return lambda b: function(*(b[name] for name in names), **options)[0]


def mixed(**options) -> Callable[[Batch], Array]:
    return lambda b: referenced(lambda *x: losses.mpo(*x[:4], lengths(b), x[4], **options))(b)


def zeros(batch: Batch) -> Array:
    return jnp.zeros_like(batch["chosen_logps"])


def cross_entropy(batch: Batch) -> Array:
    """Of the token 1 or 2."""
    logp = jax.nn.log_softmax(batch["logits"])[..., 1:3]
    return -jnp.where(batch["mask"], jnp.where(batch["flag"], logp[..., 1], logp[..., 0]), 0)


unclipped = partial(losses.ppo_clip, epsilon=INFINITE)


def unclipped_over(b: Batch, sampler: str, mode: str) -> Array:
    """The policy gradient under a rollout correction from the named log-probs, neither of them clipped."""
    weights, _ = losses.importance_sampling_correction(
        b["old_logp"], b[sampler], b["mask"], mode=mode, cap=INFINITE
    )
    return surrogate(unclipped)(b) * weights


def distilled(function: Callable, **options) -> Callable[[Batch], Array]:
    """A loss of the sampled tokens' log-probs under student and teacher."""
    return lambda b: function(b["logp"], b["old_logp"], b["teacher_logp"], b["mask"], **options)[0]


def aopd(threshold: float) -> Callable[[Batch], Array]:
    arrays = ("logp", "old_logp", "teacher_logp", "top_k_kl", "mask")
    return lambda b: losses.aopd(*(b[key] for key in arrays), threshold=threshold)[0]


def scope(is_correct: bool, **options) -> Callable[[Batch], Array]:
    """Every row counts 1 and is on one path."""
    rows = jnp.ones(6)
    return distilled(losses.scope, weights=rows, correct=(rows > 0) == is_correct, **options)


def taught(function: Callable, **options) -> Callable[[Batch], Array]:
    return lambda b: surrogate(partial(function, teacher_logp=b["teacher_logp"], **options))(b)


def divergence(function: Callable, **options) -> Callable[[Batch], Array]:
    return lambda b: function(b["logits"], b["teacher_logits"], b["mask"], **options)[0]


def some_tokens(b: Batch) -> Array:
    return b["flag"] + 2


def wmss(**options) -> Callable[[Batch], Array]:
    return lambda b: losses.wmss(b["logits"], b["teacher_logits"], some_tokens(b), b["mask"], **options)[0]


def supervised(b: Batch) -> Array:
    logp = jax.nn.log_softmax(b["logits"])
    logp = jnp.take_along_axis(logp, some_tokens(b)[..., None], axis=-1)[..., 0]
    return losses.negative_log_likelihood(logp, b["mask"])[0]


SUCCESSES, PROMPTS = np.array([1.0, 0, 0, 1, 1, 0]), np.repeat([0, 1], 3)


def policy(advantage: Callable, group: np.ndarray = PROMPTS) -> Callable[[Batch], Array]:
    """The policy gradient of fixed rewards under an advantage of (rewards, group)."""
    return lambda b: losses.ppo_clip(
        b["logp"], b["old_logp"], jnp.asarray(advantage(jnp.asarray(SUCCESSES), group)[0])[:, None], b["mask"]
    )[0]


def over_tokens(advantage: Callable[[Array, Array], Array]) -> Callable[[Batch], Array]:
    """The same under an advantage of (token rewards, mask), the reward at the last token."""
    return lambda b: losses.ppo_clip(
        b["logp"],
        b["old_logp"],
        advantage(advantages.at_last_token(jnp.asarray(SUCCESSES), b["mask"]), b["mask"]),
        b["mask"],
    )[0]


def turns_of(rewards: Array) -> tuple[Array, Array, Array]:
    """Dialogues of one turn, whose reward is the session's of the row before."""
    return rewards, jnp.roll(rewards, 1)[:, None], jnp.ones((len(rewards), 1), bool)


def one_turn(result: tuple[Array, dict]) -> tuple[Array, dict]:
    return result[0][:, 0], result[1]


def places(mask: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape)


def whitened(x: Array, mask: Array) -> Array:
    return advantages.whiten(x, advantages.batch_statistics(x, mask), mask)


def one_token(function: Callable[[Batch], Array]) -> Callable[[Batch], Array]:
    """Every row cut down to its first token."""
    return lambda b: function(b | {"mask": b["mask"] & (jnp.cumsum(b["mask"], axis=1) == 1)})


def modulated(function: Callable[[Batch], Array], **options) -> Callable[[Batch], Array]:
    """Advantages times DynaMO's token factors, the entropy changing by any amounts."""

    def loss(b: Batch) -> Array:
        change = b["logp"] - b["old_logp"]
        extremes = advantages.modulation_extremes(b["entropy"], change, b["mask"])
        weights, _ = advantages.modulation_weights(
            b["advantages"], b["entropy"], change, b["mask"], extremes, **options
        )
        return function(b | {"advantages": b["advantages"] * weights})

    return loss


def agents(is_own: bool) -> Callable[[Batch], Array]:
    """HACPO with every row the learner's own, or another's; what is said of the others is not looked at."""
    return lambda b: surrogate(
        losses.hacpo,
        is_own=jnp.full(b["mask"].shape[0], is_own),
        source_mean_logp=own_mean(b),
        source_weight=jnp.full(b["mask"].shape[0], 7.0),
    )(b)


def answer_track(group: Array, b: Batch) -> Array:
    """The first of the dual tracks' advantages, of fixed rewards."""
    ends = jnp.zeros(len(SUCCESSES), jnp.int32)
    rewards = jnp.asarray(SUCCESSES)
    return advantages.dual_track(rewards, 1 - rewards, group, b["mask"], ends)[0][0]


def praised(rewards: Array, mask: Array) -> Array:
    """PRAISE without a weight on what its scores say, every token a turn."""
    scores = jnp.linspace(0, 1, mask.shape[1] + 1) * jnp.ones((len(mask), 1))
    tokens, ends = places(mask), jnp.full(len(mask), mask.shape[1])
    outcome = jnp.sum(rewards, axis=1)
    return advantages.praise_rewards(scores, outcome, ends, tokens + 1, mask, alpha=0.0)[0]


def shaped(reward: Callable[[Array], Array]) -> Callable[[Batch], Array]:
    """GRPO on a shaped form of fixed rewards."""
    return policy(lambda r, g: advantages.grpo(reward(r), g))


REDUCTIONS: dict[str, tuple[Callable[[Batch], Array], Callable[[Batch], Array]]] = {
    # surrogates
    "ppo_clip on-policy is reinforce, in the gradient": (
        gradient_alone(on_policy(surrogate(losses.ppo_clip))),
        gradient_alone(surrogate(losses.reinforce)),
    ),
    "dgpo(n=0, m=∞) is ppo without a clip": (
        surrogate(losses.dgpo, left_decay=0.0, right_decay=INFINITE),
        surrogate(unclipped),
    ),
    "dgpo inside its bounds is ppo": (inside(surrogate(losses.dgpo)), inside(surrogate(losses.ppo_clip))),
    "dgpo(n=∞) is ppo's hard clip below, in the gradient": (
        gradient_alone(surrogate(losses.dgpo, left_decay=1e4, right_decay=INFINITE)),
        gradient_alone(surrogate(losses.ppo_clip, epsilon=0.2, epsilon_high=INFINITE)),
    ),
    "dgpo on-policy is ppo": (on_policy(surrogate(losses.dgpo)), on_policy(surrogate(losses.ppo_clip))),
    "dgpo(m=1) is gppo above": (
        surrogate(losses.dgpo, epsilon=INFINITE, epsilon_high=0.2, right_decay=1.0),
        surrogate(losses.gppo, epsilon=INFINITE, epsilon_high=0.2),
    ),
    "ce_gppo(β1=β2=1) is gppo": (surrogate(losses.ce_gppo, beta1=1.0, beta2=1.0), surrogate(losses.gppo)),
    "ce_gppo(β1=β2=0) is ppo with the dual clip, in the gradient": (
        gradient_alone(surrogate(losses.ce_gppo, beta1=0.0, beta2=0.0, delta=1.5)),
        gradient_alone(surrogate(losses.ppo_clip, delta=1.5)),
    ),
    "aspo(cap=∞) on negative advantages is ppo": (
        with_inputs(surrogate(losses.aspo, cap=INFINITE), advantages=lambda b: -abs(b["advantages"])),
        with_inputs(surrogate(losses.ppo_clip), advantages=lambda b: -abs(b["advantages"])),
    ),
    "sapo(τ→0) is ppo without a clip, in the gradient": (
        gradient_alone(surrogate(losses.sapo, temperature_pos=1e-4, temperature_neg=1e-4)),
        gradient_alone(surrogate(unclipped)),
    ),
    "dppo without bounds is cispo without them": (
        surrogate(losses.dppo, epsilon=INFINITE, cap=INFINITE),
        surrogate(losses.cispo, epsilon=INFINITE),
    ),
    "clip_cov of no token is ppo": (
        lambda b: surrogate(lambda *x: losses.clip_cov(*x, b["mask"] & False))(b),
        surrogate(losses.ppo_clip),
    ),
    "kl_cov of no token is ppo without a clip": (
        lambda b: surrogate(lambda *x: losses.kl_cov(*x, b["mask"] & False))(b),
        surrogate(unclipped),
    ),
    "cispo without bounds has ppo's gradient without a clip": (
        gradient_alone(surrogate(losses.cispo, epsilon=INFINITE)),
        gradient_alone(surrogate(unclipped)),
    ),
    "pgpo's clip with equal bounds is grpo's": (
        surrogate(losses.ppo_clip, epsilon=0.2, epsilon_high=0.2),
        surrogate(losses.ppo_clip),
    ),
    "gmpo without a clip is gspo without one": (
        surrogate(losses.gmpo, epsilon=INFINITE),
        surrogate(losses.gspo, epsilon=INFINITE, epsilon_high=INFINITE),
    ),
    "gmpo of one token is ppo with bounds e^±ε": (
        of_one_token(surrogate(losses.gmpo, epsilon=0.4)),
        of_one_token(surrogate(losses.ppo_clip, epsilon=1 - math.exp(-0.4), epsilon_high=math.exp(0.4) - 1)),
    ),
    "luspo summed over tokens is length · gspo": (
        lambda b: jnp.sum(surrogate(losses.luspo, epsilon=0.2, epsilon_high=0.3)(b), axis=1),
        lambda b: (
            lengths(b)
            * jnp.sum(surrogate(losses.gspo, epsilon=0.2, epsilon_high=0.3)(b), axis=1)
            / jnp.maximum(lengths(b), 1)
        ),
    ),
    "gspo of one token is ppo": (
        one_token(surrogate(losses.gspo, epsilon=0.2, epsilon_high=0.2)),
        one_token(surrogate(losses.ppo_clip)),
    ),
    "hacpo of one agent is gspo": (of_rows(agents(is_own=True)), of_rows(surrogate(losses.gspo))),
    "hacpo of two equal agents on-policy is gspo on the pool": (
        on_policy(of_rows(shared())),
        on_policy(of_rows(surrogate(losses.gspo))),
    ),
    "hacpo(α=0) of an equal agent is gspo with its bounds, where A > 0": (
        positive(shared(old_mean, delta=1.0, alpha=0.0, epsilon=INFINITE, epsilon_high=0.0)),
        positive(surrogate(losses.gspo, epsilon=INFINITE, epsilon_high=0.0)),
    ),
    "prp without another denominator is ppo on the pool": (
        lambda b: surrogate(losses.prp, is_own=b["valid"], peer_logp=None)(b),
        surrogate(losses.ppo_clip),
    ),
    "prp of peers equal to the old policy is ppo on the pool": (
        lambda b: surrogate(losses.prp, is_own=~b["valid"], peer_logp=b["old_logp"])(b),
        surrogate(losses.ppo_clip),
    ),
    "sgt of weight 1 is supervised training": (
        lambda b: losses.sgt(b["logp"], b["mask"], rescue_weight=b["valid"].astype(float))[0],
        lambda b: losses.negative_log_likelihood(b["logp"], b["mask"])[0],
    ),
    "dual_track(λ=0) is ppo on the answer": (dual_track(4, 0.0), surrogate(losses.ppo_clip)),
    "dual_track without a prefix is ppo on the answer": (dual_track(0, 1.0), surrogate(losses.ppo_clip)),
    "dual_track with all in the prefix is (1+λ)·ppo": (
        dual_track(7, 0.5),
        lambda b: 1.5 * surrogate(losses.ppo_clip)(b),
    ),
    "trrd(α=1) is the token ratio": (trrd("teacher_logp", alpha=1.0), surrogate(losses.ppo_clip)),
    "trrd of the old policy as its teacher is the token ratio": (
        trrd("old_logp", alpha=0.3),
        surrogate(losses.ppo_clip),
    ),
    # KL, entropy, corrections
    "k3_corrected on-policy has the value of k3": (
        lambda b: jax.lax.stop_gradient(on_policy(kl(losses.kl_k3_corrected))(b)),
        lambda b: jax.lax.stop_gradient(kl(losses.kl_k3)(b)),
    ),
    "k3_corrected on-policy is k3_straight_through": (
        on_policy(kl(losses.kl_k3_corrected)),
        kl(losses.kl_k3_straight_through),
    ),
    "k3_score_corrected is k3_straight_through": (
        kl(losses.kl_k3_score_corrected),
        kl(losses.kl_k3_straight_through),
    ),
    "k3_straight_through has the gradient of k2": (
        gradient_alone(kl(losses.kl_k3_straight_through)),
        gradient_alone(kl(losses.kl_k2)),
    ),
    "a rollout correction between equal policies is none": (
        lambda b: unclipped_over(b, "old_logp", mode="sequence_mask"),
        surrogate(unclipped),
    ),
    "the token correction, uncut, moves the ratio to the sampler's policy": (
        lambda b: unclipped_over(b, "behaviour_logp", mode="token_truncate"),
        with_inputs(surrogate(unclipped), old_logp=lambda b: b["behaviour_logp"]),
    ),
    "off_policy_sequence_mask(∞) is none": (
        lambda b: (
            surrogate(losses.ppo_clip)(b)
            * losses.off_policy_sequence_mask(
                b["logp"], b["behaviour_logp"], b["advantages"], b["mask"], threshold=INFINITE
            )[0]
        ),
        surrogate(losses.ppo_clip),
    ),
    # supervised and distillation
    "reinforce with A = 1 is supervised training": (
        with_inputs(surrogate(losses.reinforce), advantages=lambda b: jnp.ones_like(b["advantages"])),
        lambda b: losses.negative_log_likelihood(b["logp"], b["mask"])[0],
    ),
    "opd is ppo without a clip, with A = log π_T − log π": (
        distilled(losses.opd),
        with_inputs(surrogate(unclipped), advantages=lambda b: b["teacher_logp"] - b["logp"]),
    ),
    "opd on-policy has the gradient of k2 to the teacher": (
        gradient_alone(on_policy(distilled(losses.opd))),
        gradient_alone(with_inputs(kl(losses.kl_k2), ref_logp=lambda b: b["teacher_logp"])),
    ),
    "aopd(τ < −1) is opd": (aopd(-1.01), distilled(losses.opd)),
    "aopd(τ ≥ 1) is the forward KL alone": (aopd(1.0), lambda b: jnp.where(b["mask"], b["top_k_kl"], 0)),
    "aopd_from_logits(k=V, scale=1, τ ≥ 1) is forward_kl": (
        lambda b: losses.aopd_from_logits(
            b["logits"], b["teacher_logits"], some_tokens(b), b["mask"], k=5, scale=1.0, threshold=1.0
        )[0],
        divergence(losses.forward_kl),
    ),
    "generalized_jsd(0) is forward_kl": (
        divergence(losses.generalized_jsd, beta=0.0),
        divergence(losses.forward_kl),
    ),
    "generalized_jsd(1) is reverse_kl": (
        divergence(losses.generalized_jsd, beta=1.0),
        divergence(losses.reverse_kl),
    ),
    "top_k_kl(k=V) is forward_kl": (divergence(losses.top_k_kl, k=5), divergence(losses.forward_kl)),
    "top_k_kl(k=V, reverse) is reverse_kl": (
        divergence(losses.top_k_kl, k=5, direction="reverse"),
        divergence(losses.reverse_kl),
    ),
    "kdrl(β=0) is grpo": (taught(losses.kdrl, beta=0.0), surrogate(losses.ppo_clip)),
    "kdrl to the reference is grpo with k2": (
        with_inputs(taught(losses.kdrl, beta=0.04), teacher_logp=lambda b: b["ref_logp"]),
        lambda b: surrogate(losses.ppo_clip)(b) + 0.04 * kl(losses.kl_k2)(b),
    ),
    "rlad(α=1) is grpo": (
        taught(losses.rlad, alpha=1.0),
        surrogate(losses.ppo_clip, epsilon=0.2, epsilon_high=0.28),
    ),
    "rlad with the old policy as teacher is grpo": (
        with_inputs(taught(losses.rlad, alpha=0.3), teacher_logp=lambda b: b["old_logp"]),
        surrogate(losses.ppo_clip, epsilon=0.2, epsilon_high=0.28),
    ),
    "scope on wrong answers alone is opd": (scope(False), distilled(losses.opd)),
    "scope on right answers alone is supervised training": (
        scope(True, likelihood="logp"),
        lambda b: losses.negative_log_likelihood(b["logp"], b["mask"])[0],
    ),
    "scope on right answers alone is so in the gradient, on-policy": (
        gradient_alone(on_policy(scope(True))),
        gradient_alone(lambda b: losses.negative_log_likelihood(b["logp"], b["mask"])[0]),
    ),
    "wmss(λ=1) is supervised training": (wmss(mixing=1.0), supervised),
    "wmss of two equal models is supervised training": (
        with_inputs(wmss(mixing=0.3), teacher_logits=lambda b: b["logits"]),
        supervised,
    ),
    # preference, value, retrieval
    "dpo without a reference is bradley_terry of β·log π": (
        with_inputs(referenced(losses.dpo, beta=0.3), ref_chosen_logps=zeros, ref_rejected_logps=zeros),
        lambda b: losses.bradley_terry(0.3 * b["chosen_logps"], 0.3 * b["rejected_logps"], b["valid"])[0],
    ),
    "simpo(γ=0) is arm": (pair(losses.simpo, beta=0.3, gamma=0.0), pair(losses.arm, beta=0.3)),
    "orpo(λ=0) is supervised training on the chosen answer": (
        pair(losses.orpo, beta=0.0),
        lambda b: -jnp.where(b["valid"], b["chosen_logps"], 0),
    ),
    "mpo(1, 0, 0) is dpo": (mixed(weights=(1.0, 0.0, 0.0)), referenced(losses.dpo)),
    "mpo(0, 1, 0) is bradley_terry of each answer and δ": (
        mixed(weights=(0.0, 1.0, 0.0), reward_shift=0.2, beta=1.0),
        lambda b: (
            losses.bradley_terry(b["chosen_logps"], sg(b["ref_chosen_logps"]), b["valid"], margin=0.2)[0]
            + losses.bradley_terry(sg(b["ref_rejected_logps"]), b["rejected_logps"], b["valid"], margin=-0.2)[
                0
            ]
        ),
    ),
    "mpo(0, 0, 1) is supervised training on the chosen answer": (
        mixed(weights=(0.0, 0.0, 1.0)),
        lambda b: -jnp.where(b["valid"], b["chosen_logps"], 0) / jnp.maximum(lengths(b), 1),
    ),
    "uniarm with all mass on one objective is (1+λ)·arm": (
        pair(losses.uniarm, jnp.array([[1.0, -1.0, 1.0]] * 6), jnp.array([1.0, 0.0, 0.0]), global_weight=0.5),
        lambda b: 1.5 * pair(losses.arm)(b),
    ),
    "uniarm(λ=0) of opposite objectives is arm, weighted both ways (PARM)": (
        pair(losses.uniarm, jnp.array([[1.0, -1.0]] * 6), jnp.array([0.75, 0.25]), global_weight=0.0),
        lambda b: (
            0.75 * losses.arm(b["chosen_logps"], b["rejected_logps"], b["valid"])[0]
            + 0.25 * losses.arm(b["rejected_logps"], b["chosen_logps"], b["valid"])[0]
        ),
    ),
    "r2m(α=0) of two rows is bradley_terry": (
        lambda b: losses.r2m(
            jnp.concatenate([b["chosen_logps"], b["rejected_logps"]]),
            jnp.repeat(jnp.array([1.0, 0.0]), 6),
            jnp.tile(jnp.arange(6), 2),
            jnp.tile(b["valid"], 2),
            alpha=0.0,
        )[0][:6],
        pair(losses.bradley_terry),
    ),
    "error_suppression after a predecessor that is right is the cross-entropy": (
        lambda b: losses.error_suppression(b["logits"], b["flag"] + 1, b["flag"] + 1, b["mask"])[0],
        cross_entropy,
    ),
    "error_suppression(β=0) is the cross-entropy": (
        lambda b: losses.error_suppression(b["logits"], b["flag"] + 1, b["flag"] + 2, b["mask"], beta=0.0)[0],
        cross_entropy,
    ),
    "clipped_value_loss(ε=∞) is half the squared error": (
        lambda b: losses.clipped_value_loss(
            b["values"], b["old_values"], b["returns"], b["mask"], epsilon=INFINITE
        )[0],
        lambda b: jnp.where(b["mask"], (b["values"] - sg(b["returns"])) ** 2 / 2, 0),
    ),
    "info_nce with one negative is bradley_terry of s/τ": (
        lambda b: losses.info_nce(b["positive"], b["negatives"][:, :1], b["valid"], temperature=0.5)[0],
        lambda b: losses.bradley_terry(2 * b["positive"], 2 * b["negatives"][:, 0], b["valid"])[0],
    ),
    "facet_kl of a certain label is the cross-entropy": (
        lambda b: losses.facet_kl(jax.nn.one_hot(b["flag"] + 1, CLASSES), b["logits"], b["mask"])[0],
        cross_entropy,
    ),
    # advantages
    "rloo is dr_grpo over the other rows' share": (
        policy(advantages.rloo),
        policy(lambda *rows: (advantages.dr_grpo(*rows)[0] * 3 / 2, {})),  # three rows in a group
    ),
    "opo with rows of one length is dr_grpo": (
        policy(partial(advantages.opo, lengths=np.full(6, 9.0))),
        policy(advantages.dr_grpo),
    ),
    "hacpo with weights of 1 is grpo": (
        policy(partial(advantages.hacpo, sample_weight=np.ones(6))),
        policy(advantages.grpo),
    ),
    "ha_dw(λ=1, anchored at the prompts' own accuracy) is grpo": (
        policy(partial(advantages.ha_dw, weight_scale=1.0, anchor=SUCCESSES.reshape(2, 3).mean(1).repeat(3))),
        policy(advantages.grpo),
    ),
    "pass_at_k_training(k=1) is grpo with the population's std": (
        policy(partial(advantages.pass_at_k_training, k=1)),
        policy(partial(advantages.grpo, ddof=0, epsilon=0.0)),
    ),
    "bnpo with a uniform density is dr_grpo": (
        policy(partial(advantages.bnpo, parameters=(0.0, 0.0))),
        policy(advantages.dr_grpo),
    ),
    "bnpo(a=b=3/2) is grpo with the population's std, times π/8": (
        policy(partial(advantages.bnpo, parameters=(1.5, 1.5))),
        policy(lambda *rows: (advantages.grpo(*rows, ddof=0, epsilon=0.0)[0] * np.pi / 8, {})),
    ),
    "reinforce_plus_plus_baseline of one group is grpo": (
        policy(advantages.reinforce_plus_plus_baseline, group=np.zeros(6, int)),
        policy(advantages.grpo, group=np.zeros(6, int)),
    ),
    "gdpo of one reward in one group is grpo": (
        policy(lambda r, g: advantages.gdpo(r[:, None], g, epsilon=0.0), group=np.zeros(6, int)),
        policy(partial(advantages.grpo, epsilon=0.0), group=np.zeros(6, int)),
    ),
    "hian(w_T=0) is grpo on the session's reward": (
        policy(lambda r, g: one_turn(advantages.hian(*turns_of(r), g, turn_weight=0.0))),
        policy(advantages.grpo),
    ),
    "hian(w_S=0) of one turn is grpo on the turn's reward": (
        policy(lambda r, g: one_turn(advantages.hian(*turns_of(r), g, session_weight=0.0))),
        policy(lambda r, g: advantages.grpo(jnp.roll(r, 1), g)),
    ),
    "xgrpo without peers is grpo": (policy(advantages.xgrpo), policy(advantages.grpo)),
    "dual_track's advantages without a prefix are grpo, with the population's std": (
        lambda b: losses.ppo_clip(b["logp"], b["old_logp"], answer_track(PROMPTS, b), b["mask"])[0],
        policy(partial(advantages.grpo, ddof=0)),
    ),
    "modulation with μ = λ = 1 is none": (
        modulated(surrogate(losses.ppo_clip), max_boost=1.0, min_stability=1.0),
        surrogate(losses.ppo_clip),
    ),
    "waypoint_reward(λ=0) is the outcome": (
        shaped(lambda r: advantages.waypoint_reward(r > 0, jnp.linspace(0, 1, len(r)), weight=0.0)),
        policy(advantages.grpo),
    ),
    "length_penalised_reward(α=0) is the outcome": (
        shaped(lambda r: advantages.length_penalised_reward(r, jnp.arange(len(r)) / 2, weight=0.0)),
        policy(advantages.grpo),
    ),
    "process_gated_reward(T=1) is the outcome": (
        shaped(lambda r: advantages.process_gated_reward(jnp.ones(len(r)), r, 0 * r, format_weight=0.1)),
        policy(advantages.grpo),
    ),
    "praise_rewards(α=0) are the outcome": (
        over_tokens(lambda r, mask: advantages.discounted_returns(praised(r, mask), mask)),
        over_tokens(lambda r, mask: advantages.discounted_returns(r, mask)),
    ),
    "gae(γ=λ=1) without values is reinforce with the outcome": (
        over_tokens(lambda r, mask: advantages.gae(r, 0 * r, mask, gamma=1.0, lam=1.0)[0]),
        policy(lambda r, g: (r, {})),
    ),
    "remax with a greedy reward of 0 is reinforce with the outcome": (
        policy(lambda r, g: advantages.remax(r, 0 * r)),
        policy(lambda r, g: (r, {})),
    ),
    "turn_level_gae with a turn per token is gae": (
        over_tokens(lambda r, m: advantages.turn_level_gae(r, 0.1 * places(m), m, places(m), m)[0]),
        over_tokens(lambda r, m: advantages.gae(r, 0.1 * places(m), m)[0]),
    ),
    "reinforce_plus_plus(β=0) is gae(λ=1) without values, whitened": (
        over_tokens(lambda r, mask: advantages.reinforce_plus_plus(r, r, mask, beta=0.0, gamma=0.9)[0]),
        over_tokens(lambda r, mask: whitened(advantages.gae(r, 0 * r, mask, gamma=0.9, lam=1.0)[0], mask)),
    ),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction(name):
    batch = with_valid(random_batch(11, n=6, t=7, dtype=np.float64))

    def value_and_gradient(function: Callable[[Batch], Array]) -> tuple:
        def total(floats: Batch) -> tuple[Array, Array]:
            loss = function(batch | floats)
            return sum(pair.sum for pair in reductions(loss, batch)), loss

        floats = {key: jnp.asarray(batch[key]) for key in FLOATS}
        return jax.jit(jax.grad(total, has_aux=True))(floats)

    with jax.enable_x64(True):
        method, reference = map(value_and_gradient, REDUCTIONS[name])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), method, reference)
    gradients, loss = method
    assert np.any(np.asarray(loss) != 0) or any(np.any(np.asarray(g) != 0) for g in gradients.values())
