"""Pieces of `oracle_table`: ours, called with the inputs of a stored case by name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import advantages, losses
from jaxrl_llm.advantages.returns import gae
from jaxrl_llm.advantages.whitening import batch_statistics, whiten
from jaxrl_llm.losses import Array, aggregate, covariance, distillation, divergences, entropy, preference
from jaxrl_llm.losses.aggregation import masked
from jaxrl_llm.losses.corrections import importance_sampling_correction, off_policy_sequence_mask
from jaxrl_llm.losses.kl import kl_k3
from jaxrl_llm.losses.presets import PRESETS
from jaxrl_llm.losses.ratios import sequence_log_ratio
from jaxrl_llm.losses.value import clipped_value_loss
from jaxrl_llm.rewards.functions import overlong_penalty

Batch = dict[str, Array]
Ours = Callable[[Batch], Array]
TRL, VERL, TUNIX = "trl-1.16", "verl-0.9", "tunix-0.1.7"


def mean(loss: Array, mask: Array, mode: str = "token_mean", **options: Any) -> Array:
    """A loss f[N, T] reduced, or one by rows f[N] with a mask f[N]."""
    if loss.ndim == 1:
        loss, mask = loss[:, None], mask[:, None]
    total = aggregate(loss, mask, mode, **options)
    return total.sum / total.weight


def objective(preset: str, method: str, **changes: Any) -> Ours:
    """A preset's objective; nested options are changed one by one."""
    keywords = dict(PRESETS[preset][method]["objective"])
    for key, value in changes.items():
        keywords[key] = {**keywords.get(key, {}), **value} if isinstance(value, dict) else value

    def ours(b: Batch) -> Array:
        four = {"logp", "old_logp", "advantages", "mask"}
        total, _ = losses.policy_objective(**keywords)(
            b["logp"],
            b["old_logp"],
            b["advantages"][:, None] if b["advantages"].ndim == 1 else b["advantages"],
            b["mask"],
            **{key: x for key, x in b.items() if key not in four},
        )
        return total.sum / total.weight

    return ours


def given(ours: Ours, **names: str) -> Ours:
    """The function on a batch in which `new="old"`: an input goes by another name."""
    return lambda b: ours(b | {new: b[old] for new, old in names.items()})


def of_tokens(ours: Ours) -> Ours:
    return given(ours, advantages="token_advantages")


def far(ours: Ours) -> Ours:
    return given(ours, advantages="token_advantages", old_logp="far_logp")


def rows(a: Array, mask: Array) -> Array:
    """Advantages of rows as those of their tokens."""
    return a[:, None] * mask


def outcome(function: Callable, **options: Any) -> Ours:
    """An advantage of rewards in ragged groups, at every token."""
    return lambda b: rows(function(b["rewards"], b["group"], **options)[0], b["mask"])


def weighed(function: Callable, **options: Any) -> Ours:
    """The same, of a method that counts tokens."""
    return lambda b: rows(
        function(b["rewards"], b["group"], lengths=b["mask"].sum(1), **options)[0], b["mask"]
    )


def two_groups(b: Batch) -> Array:
    """Rows in groups of 4, as TRL and Tunix lay them out."""
    return jnp.arange(8) // 4


def scaled(scale: str, rewards: str = "rewards") -> Ours:
    """TRL's advantage."""
    options = PRESETS[TRL]["grpo"]["advantage"] | {"scale": scale}
    function = advantages.ADVANTAGES[options.pop("name")]
    return lambda b: function(b[rewards], two_groups(b), **options)[0]


def both_rewards(b: Batch) -> Array:
    return jnp.stack([b["rewards"], b["more_rewards"]], axis=1)


def pairs(b: Batch, normalise: bool = False) -> tuple[Array, ...]:
    """Summed or mean log-probs of chosen and rejected rows, then the reference's."""
    halves = []
    for key in ("logp", "ref_logp"):
        x = preference.sequence_logp(b[key], b["mask"], normalise=normalise)
        halves += [*jnp.split(x, 2)]
    return tuple(halves)


def all_pairs(loss: tuple[Array, Any]) -> Array:
    return jnp.mean(loss[0])


def every(n: int) -> Array:
    return jnp.ones(n, bool)


def dpo(**options: Any) -> Ours:
    return lambda b: all_pairs(preference.dpo(*pairs(b), every(4), **options))


def kto(**options: Any) -> Ours:
    def ours(b: Batch) -> Array:
        logp, ref_logp = (preference.sequence_logp(b[key], b["mask"]) for key in ("logp", "ref_logp"))
        h = b["mismatched_ratio"]
        point = preference.kto_reference_point(h, jnp.zeros_like(h), every(8))
        return all_pairs(preference.kto(logp, ref_logp, b["desirable"] > 0, point, every(8), **options))

    return ours


def halves(function: Callable, name: str, **options: Any) -> Ours:
    """A preference loss of numbers of rows."""
    return lambda b: all_pairs(function(*jnp.split(b[name], 2), every(4), **options))


def odds_ratio(b: Batch) -> Array:
    """ORPO less its likelihood term, which TRL takes elsewhere and over all tokens at once."""
    return halves(preference.orpo, "mean_logp", beta=0.1)(b) + jnp.mean(jnp.split(b["mean_logp"], 2)[0])


def distilled(function: Callable, **options: Any) -> Ours:
    return lambda b: mean(function(b["logits"], b["teacher_logits"], b["mask"], **options)[0], b["mask"])


def sampled(b: Batch, logits: str = "logits") -> Array:
    """Log-probs of the tokens."""
    return jnp.take_along_axis(jax.nn.log_softmax(b[logits]), b["tokens"][..., None], -1)[..., 0]


def on_policy_distillation(b: Batch) -> Array:
    logp = sampled(b)
    loss, _ = distillation.opd(logp, logp, sampled(b, "teacher_logits"), b["mask"])
    # TRL's loss is sg(log π − log π_T)·log π: the same gradient, another value
    offset = jax.lax.stop_gradient((logp - sampled(b, "teacher_logits")) * (logp - 1))
    return mean(loss + masked(offset, b["mask"]), b["mask"])


def adaptive_entropy(b: Batch) -> Array:
    state, found = entropy.adaptive_entropy_init(0.003), []
    state = state._replace(entropy=jnp.zeros(()))
    for factor in (1.0, 0.1, 0.1, 0.3, 1.0, 0.2, 0.01):
        state = entropy.adaptive_entropy_update(state, mean(factor * b["entropy"], b["mask"]))
        found.append(state.coefficient)
    return jnp.stack(found)


def corrected_by_sequence(logp: Array, ref_logp: Array, mask: Array, *, old_logp: Array) -> tuple:
    """TRL's KL under GSPO: k3 times the sequence's ratio, which is no estimate of a KL off-policy."""
    s, _ = sequence_log_ratio(logp, old_logp, mask)
    loss, metrics = kl_k3(logp, ref_logp, mask)
    return jnp.exp(s) * loss, metrics


def off_policy_mask(b: Batch) -> Array:
    def kept(logp: Array, behaviour_logp: Array, advantages: Array, mask: Array) -> tuple:
        return off_policy_sequence_mask(logp, behaviour_logp, advantages, mask, threshold=0.05)

    return objective(TRL, "grpo", correction=kept)(b)


def by_covariance(function: str, **options: Any) -> Ours:
    """A loss whose tokens are chosen in the whole batch."""

    def ours(b: Batch) -> Array:
        a = b["advantages"][:, None]
        if function == "kl_cov":
            chosen = covariance.kl_cov_tokens(b["logp"], a, b["mask"], **options)
            return objective(VERL, "kl_cov", surrogate_options={"coefficient": 1.0})(b | {"chosen": chosen})
        key = jax.random.key(0)
        chosen = covariance.clip_cov_tokens(b["logp"], b["old_logp"], a, b["mask"], key, **options)
        return objective(VERL, "clip_cov")(b | {"chosen": chosen})

    return ours


def rejected(b: Batch) -> Array:
    """verl's rejection takes rows out of the mask, and so out of the mean."""
    # its bounds 0.5 and 2 are those of the inverse ratio
    weights, _ = importance_sampling_correction(
        b["old_logp"], b["behaviour_logp"], b["mask"], mode="sequence_mask", floor=0.5, cap=2.0
    )
    return objective(VERL, "grpo")(b | {"mask": b["mask"] & (weights > 0)})


def kl(name: str, **options: Any) -> Ours:
    function = losses.KL_ESTIMATORS[name]
    return lambda b: mean(function(b["logp"], b["ref_logp"], b["mask"], **options)[0], b["mask"])


def straight_through(name: str, **options: Any) -> Ours:
    """verl's "+": the value of an estimator with the gradient of k2."""
    k2, value = kl("k2"), kl(name, **options)
    return lambda b: k2(b) + jax.lax.stop_gradient(value(b) - k2(b))


def aggregated(mode: str, **options: Any) -> Ours:
    return lambda b: mean(b["logp"], b["mask"], mode, **options)


def value_loss(b: Batch) -> Array:
    loss, _ = clipped_value_loss(b["values"], b["old_values"], b["returns"], b["mask"], epsilon=0.2)
    return mean(loss, b["mask"])


def entropy_of(logits: Array) -> Array:
    logp = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def generalised_advantages(b: Batch) -> Array:
    a, returns = gae(b["token_rewards"], b["values"], b["mask"], gamma=0.97, lam=0.9)
    return jnp.stack([whiten(a, batch_statistics(a, b["mask"]), b["mask"], epsilon=0.0), returns])


def fused(ours: Ours) -> Ours:
    """On the log-probs of tokens that hidden states and an output matrix give."""

    def of_hidden(b: Batch) -> Array:
        b = b | {"logits": b["hidden"] @ b["weight"].T}
        b = b | {"logp": sampled(b)}
        if "ref_hidden" in b:
            b = b | {"teacher_logits": b["ref_hidden"] @ b["weight"].T}
            b = b | {"ref_logp": sampled(b, "teacher_logits")}
        return ours(b)

    return of_hidden


def of_means(function: Callable, **options: Any) -> Ours:
    def ours(b: Batch) -> Array:
        means = preference.sequence_logp(b["logp"], b["nonempty_mask"], normalise=True)
        return all_pairs(function(*jnp.split(means, 2), every(4), **options))

    return ours


def orpo_over_tokens(b: Batch) -> Array:
    """Liger's likelihood term is a mean over all chosen tokens, ours over each answer's."""
    chosen = b["logp"][:4]
    mask = b["nonempty_mask"][:4]
    answers = mean(preference.sequence_logp(chosen, mask, normalise=True), every(4))
    return of_means(preference.orpo, beta=0.1)(b) + answers - mean(chosen, mask)


def rloo_clip(b: Batch) -> Array:
    """TRL's RLOO clips the ratio of whole sequences, the product of their tokens'."""

    def product(logp: Array, old_logp: Array, mask: Array) -> tuple:
        return jnp.sum(masked(logp, mask) - masked(old_logp, mask), axis=1, keepdims=True), {}

    loss, _ = losses.ppo_clip(
        b["logp"], b["old_logp"], b["counted_advantages"][:, None], b["mask"], ratio=product
    )
    return mean(loss, b["mask"], "seq_mean_token_mean", count_empty=True)


def top_k_of_student(b: Batch) -> Array:
    """TRL lists the student's top tokens in the reverse direction, `top_k_kl` the teacher's."""
    log_p, log_q = (jax.nn.log_softmax(b[key]) for key in ("logits", "teacher_logits"))
    top, ids = jax.lax.top_k(log_p, 2)
    listed = jnp.take_along_axis(log_q, ids, axis=-1)
    loss, _ = divergences.gathered_top_k_kl(top, listed, b["mask"], direction="reverse")
    return mean(loss, b["mask"])


def overlong(b: Batch) -> Array:
    """DAPO's penalty of answers of these lengths, 100 tokens allowed and 20 of them punished."""
    rows = [range(n) for n in np.asarray(b["lengths"])]
    return jnp.array(overlong_penalty(rows, max_completion_length=100, buffer=20))
