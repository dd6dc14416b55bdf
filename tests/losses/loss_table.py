"""Every loss of the library as a function of one batch: a new loss is covered by its line in `ALL_LOSSES`.

Surrogates and KL estimators come from their own tables with default options; other options are listed below.
A loss reads what it needs of the batch by name. A new input is a name in `TOKENS`, `ROWS`, `MANY` or `VOCAB`;
what methods take from statistics of the whole batch is one too, for the cuts here suppose them given.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import losses
from jaxrl_llm.losses import Array, Metrics, WeightedSum
from jaxrl_llm.losses.aggregation import float_of, masked_sum

Batch = dict[str, Array]
Loss = Callable[[Batch], tuple[Array, Metrics]]

NORM = 8.0
CLASSES = 5

TOKENS = {  # f[N, T], uniform between these bounds
    **dict.fromkeys(("logp", "old_logp", "ref_logp", "behaviour_logp", "teacher_logp"), (-1.1, -0.1)),
    "entropy": (0.0, 2.0),
    "advantages": (-2.0, 2.0),
    **dict.fromkeys(("values", "old_values", "returns"), (-1.0, 1.0)),
    "prefix_advantages": (-2.0, 2.0),
    "top_k_kl": (0.0, 1.0),
}
ROWS = {  # f[N]
    **dict.fromkeys(("chosen_logps", "rejected_logps"), (-1.1, -0.1)),
    **dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), (-1.1, -0.1)),
    "positive": (-1.0, 1.0),
    "source_mean": (-1.1, -0.1),  # a mean log-prob
    "row_weight": (0.1, 2.0),
}
MANY = {  # f[N, CLASSES]: several numbers of a row, as a vector or the members of a group
    **dict.fromkeys(("negatives", "anchor", "near", "far", "rewards", "label_rewards"), (-1.0, 1.0)),
}
VOCAB = {  # f[N, T, CLASSES]
    **dict.fromkeys(("logits", "teacher_logits"), (-2.0, 2.0)),
    **dict.fromkeys(("top_logp", "teacher_top_logp"), (-4.0, -2.0)),
}
FLOATS = {**TOKENS, **ROWS, **MANY, **VOCAB}
BY_ROW = {**ROWS, **MANY}
LOG_PROBS = ("old_logp", "ref_logp", "behaviour_logp", "teacher_logp")
"""Of other policies than the one in training."""


class Case(NamedTuple):
    """One loss. `trains`: the inputs that get a gradient. The result is f[N, T], or f[N] of a loss by rows,
    which reads `valid`, bool[N]: rows with a token."""

    loss: Loss
    trains: tuple[str, ...] = ("logp",)


def _surrogate(function: Callable, batch: Batch) -> tuple[Array, Metrics]:
    return function(batch["logp"], batch["old_logp"], batch["advantages"], batch["mask"])


def _kl(function: Callable, batch: Batch) -> tuple[Array, Metrics]:
    return function(batch["logp"], batch["ref_logp"], batch["mask"], old_logp=batch["old_logp"])


def _corrected(mode: str, batch: Batch) -> tuple[Array, Metrics]:
    """The policy gradient under each rollout correction."""
    loss, metrics = _surrogate(losses.reinforce, batch)
    weights, more = losses.importance_sampling_correction(
        batch["old_logp"], batch["behaviour_logp"], batch["mask"], mode=mode, cap=2.0, floor=0.5
    )
    return loss * weights, metrics | more


def some_rows(batch: Batch) -> Array:
    """bool[N] true for about half of the rows, whatever is masked."""
    return jnp.sum(batch["flag"] & batch["mask"], axis=1) % 2 == 1


def middle(batch: Batch) -> Array:
    """i32[N] the column after some token of each row, or 0."""
    return jnp.sum(batch["flag"] & batch["mask"], axis=1)


def _hacpo(batch: Batch, **options: float) -> tuple[Array, Metrics]:
    arrays = batch["logp"], batch["old_logp"], batch["advantages"], batch["mask"]
    mean, weight = batch["source_mean"], batch["row_weight"]
    return losses.hacpo(
        *arrays, is_own=some_rows(batch), source_mean_logp=mean, source_weight=weight, **options
    )


def _prp(batch: Batch) -> tuple[Array, Metrics]:
    peers = partial(losses.prp, is_own=some_rows(batch), peer_logp=batch["behaviour_logp"])
    return _surrogate(peers, batch)


def _dual_track(batch: Batch, **options: Callable) -> tuple[Array, Metrics]:
    advantages, end = batch["prefix_advantages"], middle(batch)
    return _surrogate(
        partial(losses.dual_track, prefix_advantages=advantages, prefix_end=end, **options), batch
    )


def _trrd(batch: Batch, **options: float | str) -> tuple[Array, Metrics]:
    ratio = partial(losses.trrd_log_ratio, teacher_logp=batch["teacher_logp"], **options)
    return _surrogate(partial(losses.ppo_clip, ratio=ratio), batch)


def _without_the_left_behind(batch: Batch) -> tuple[Array, Metrics]:
    """GRPO without what counts against sequences that the policy has left behind."""
    loss, metrics = _surrogate(losses.ppo_clip, batch)
    weights, more = losses.off_policy_sequence_mask(
        batch["logp"], batch["behaviour_logp"], batch["advantages"], batch["mask"], threshold=0.1
    )
    return loss * weights, metrics | more


def _whole(batch: Batch) -> tuple[Array, Metrics]:
    """GRPO as it is trained: surrogate, reference KL, entropy bonus and the raw statistics."""
    loss, metrics = _surrogate(losses.ppo_clip, batch)
    kl, kl_metrics = _kl(losses.kl_k3, batch)
    bonus, entropy_metrics = losses.entropy_bonus(batch["entropy"], batch["mask"])
    statistics = losses.ratio_statistics(batch["logp"], batch["behaviour_logp"], batch["mask"])
    return loss + 0.04 * kl + 0.01 * bonus, metrics | kl_metrics | entropy_metrics | statistics


PAIR = ("chosen_logps", "rejected_logps")


def _pair(function: Callable, batch: Batch) -> tuple[Array, Metrics]:
    return function(batch["chosen_logps"], batch["rejected_logps"], batch["valid"])


def _bradley_terry(batch: Batch) -> tuple[Array, Metrics]:
    return _pair(partial(losses.bradley_terry, margin=batch["positive"]), batch)


def _referenced(function: Callable, batch: Batch, *further: Array) -> tuple[Array, Metrics]:
    reference = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
    return function(batch["chosen_logps"], batch["rejected_logps"], *reference, *further, batch["valid"])


def _kto(batch: Batch) -> tuple[Array, Metrics]:
    is_desirable = (batch["flag"] & batch["mask"]).any(1)
    return losses.kto(batch["chosen_logps"], batch["ref_chosen_logps"], is_desirable, 0.1, batch["valid"])


def _mpo(batch: Batch) -> tuple[Array, Metrics]:
    return _referenced(partial(losses.mpo, reward_shift=0.1), batch, batch["mask"].sum(1))


def _distribution(x: Array) -> Array:
    return jax.nn.softmax(float_of(x))


def _uniarm(batch: Batch) -> tuple[Array, Metrics]:
    preferences, weights = jnp.where(batch["near"] > 0, 1, -1), _distribution(batch["far"])
    pair = batch["chosen_logps"], batch["rejected_logps"]
    return losses.uniarm(*pair, preferences, weights, batch["valid"], beta=1.0)


def _r2m(batch: Batch) -> tuple[Array, Metrics]:
    """Every row of the batch is a group of up to CLASSES rewards."""
    shape = batch["rewards"].shape
    valid = batch["valid"][:, None] & (batch["near"] > -0.5)
    arrays = batch["rewards"], batch["label_rewards"], jnp.indices(shape)[0], valid
    loss, metrics = losses.r2m(*(x.reshape(-1) for x in arrays))
    return loss.reshape(shape).sum(1), metrics


def _error_suppression(batch: Batch) -> tuple[Array, Metrics]:
    guess = batch["flag"].astype(int)
    right = jnp.zeros_like(guess)
    return losses.error_suppression(batch["logits"], right, guess, batch["mask"], correct_weight=0.5)


def _masked_cross_entropy(batch: Batch) -> tuple[Array, Metrics]:
    rate = 0.25 + batch["entropy"] / 4
    return losses.masked_cross_entropy(batch["logp"], batch["flag"], rate, batch["mask"])


def _spg(batch: Batch) -> tuple[Array, Metrics]:
    return losses.spg(batch["logp"], batch["old_logp"], batch["advantages"], batch["mask"])


def _clipped_value_loss(batch: Batch) -> tuple[Array, Metrics]:
    return losses.clipped_value_loss(batch["values"], batch["old_values"], batch["returns"], batch["mask"])


def _info_nce(batch: Batch) -> tuple[Array, Metrics]:
    is_negative = batch["near"] > -0.5
    return losses.info_nce(batch["positive"], batch["negatives"], batch["valid"], negatives_mask=is_negative)


def _logits(function: Callable, batch: Batch, **options: Array | int) -> tuple[Array, Metrics]:
    return function(batch["logits"], batch["teacher_logits"], batch["mask"], **options)


def _top_logp(function: Callable, batch: Batch) -> tuple[Array, Metrics]:
    return function(batch["top_logp"], batch["teacher_top_logp"], batch["mask"])


def _tokens(function: Callable, batch: Batch) -> tuple[Array, Metrics]:
    """Token ids are garbage where masked."""
    tokens = jnp.where(batch["mask"], batch["flag"] + 2, -9)
    return function(batch["logits"], batch["teacher_logits"], tokens, batch["mask"])


def _opd(batch: Batch, function: Callable, *further: Array) -> tuple[Array, Metrics]:
    return function(batch["logp"], batch["old_logp"], batch["teacher_logp"], *further, batch["mask"])


def _scope(batch: Batch, **options: str) -> tuple[Array, Metrics]:
    weights = partial(losses.scope, weights=batch["row_weight"], correct=some_rows(batch), **options)
    return _opd(batch, weights)


def _taught(function: Callable, batch: Batch) -> tuple[Array, Metrics]:
    return _surrogate(partial(function, teacher_logp=batch["teacher_logp"]), batch)


ALL_LOSSES: dict[str, Case] = {
    # surrogates
    **{name: Case(partial(_surrogate, function)) for name, function in losses.SURROGATES.items()},
    "ppo_clip dual": Case(partial(_surrogate, partial(losses.ppo_clip, epsilon_high=0.28, delta=1.5))),
    "gspo token": Case(partial(_surrogate, partial(losses.gspo, epsilon=0.1, form="token"))),
    "cispo upper": Case(partial(_surrogate, partial(losses.cispo, epsilon=float("inf"), epsilon_high=0.28))),
    "dgpo steep": Case(partial(_surrogate, partial(losses.dgpo, left_decay=2.5, right_decay=1.0))),
    "ce_gppo dual": Case(partial(_surrogate, partial(losses.ce_gppo, beta1=0.5, beta2=0.8, delta=1.5))),
    "aspo capped": Case(partial(_surrogate, partial(losses.aspo, cap=1.5))),
    "dppo kl": Case(partial(_surrogate, partial(losses.dppo, form="kl", cap=1.5))),
    "clip_cov": Case(lambda b: _surrogate(lambda *x: losses.clip_cov(*x, b["flag"]), b)),
    "kl_cov": Case(lambda b: _surrogate(lambda *x: losses.kl_cov(*x, b["flag"]), b)),
    "hacpo": Case(partial(_hacpo, epsilon=0.2)),
    "hacpo late": Case(partial(_hacpo, epsilon=0.2, step=10, alpha=3.0)),
    "prp": Case(_prp),
    "sgt": Case(lambda b: losses.sgt(b["logp"], b["mask"], rescue_weight=b["row_weight"] * some_rows(b))),
    "dual_track": Case(_dual_track),
    "dual_track gspo": Case(partial(_dual_track, surrogate=partial(losses.gspo, epsilon=0.2))),
    "trrd": Case(_trrd),
    "trrd straight": Case(partial(_trrd, clamp=0.2, clamp_gradient="straight_through")),
    "gspo clamped above": Case(
        partial(
            _surrogate, partial(losses.ppo_clip, ratio=partial(losses.sequence_log_ratio, clamp_high=0.1))
        )
    ),
    # KL, entropy, corrections
    **{name: Case(partial(_kl, function)) for name, function in losses.KL_ESTIMATORS.items()},
    "k3 with its value clamped": Case(partial(_kl, partial(losses.kl_k3, value_clamp=0.1))),
    **{mode: Case(partial(_corrected, mode)) for mode in losses.IMPORTANCE_SAMPLING_CORRECTIONS},
    "off_policy_sequence_mask": Case(_without_the_left_behind),
    "entropy_bonus": Case(lambda b: losses.entropy_bonus(b["entropy"], b["mask"]), ("entropy",)),
    # supervised and distillation
    "negative_log_likelihood": Case(lambda b: losses.negative_log_likelihood(b["logp"], b["mask"])),
    "masked_cross_entropy": Case(_masked_cross_entropy),
    "spg": Case(_spg, ("logp", "old_logp")),
    "forward_kl": Case(lambda b: _logits(losses.forward_kl, b, temperature=b["row_weight"]), ("logits",)),
    "reverse_kl": Case(partial(_logits, losses.reverse_kl), ("logits",)),
    "generalized_jsd": Case(partial(_logits, partial(losses.generalized_jsd, beta=0.3)), ("logits",)),
    "top_k_kl": Case(partial(_logits, losses.top_k_kl, k=2), ("logits",)),
    "top_k_kl reverse": Case(partial(_logits, losses.top_k_kl, k=3, direction="reverse"), ("logits",)),
    "gathered_top_k_kl": Case(partial(_top_logp, losses.gathered_top_k_kl), ("top_logp",)),
    "aopd_top_k_kl": Case(partial(_top_logp, losses.aopd_top_k_kl), ("top_logp",)),
    "opd": Case(lambda b: _opd(b, losses.opd)),
    "aopd": Case(lambda b: _opd(b, losses.aopd, b["top_k_kl"]), ("logp", "top_k_kl")),
    "aopd_from_logits": Case(partial(_tokens, partial(losses.aopd_from_logits, k=2)), ("logits",)),
    "kdrl": Case(partial(_taught, losses.kdrl)),
    "rlad": Case(partial(_taught, losses.rlad)),
    "scope": Case(_scope),
    "scope as released": Case(partial(_scope, likelihood="logp", correction="ppo_clip")),
    "wmss": Case(partial(_tokens, losses.wmss), ("logits", "teacher_logits")),
    "wmss frozen": Case(partial(_tokens, partial(losses.wmss, freeze_weak=True)), ("logits",)),
    # preference, value, retrieval
    "bradley_terry": Case(_bradley_terry, PAIR),
    **{name: Case(partial(_referenced, getattr(losses, name)), PAIR) for name in ("dpo", "ipo")},
    "dpo smoothed": Case(partial(_referenced, partial(losses.dpo, label_smoothing=0.1)), PAIR),
    "kto": Case(_kto, ("chosen_logps",)),
    "mpo": Case(_mpo, PAIR),
    **{name: Case(partial(_pair, getattr(losses, name)), PAIR) for name in ("simpo", "orpo", "arm")},
    "uniarm": Case(_uniarm, PAIR),
    "r2m": Case(_r2m, ("rewards",)),
    "error_suppression": Case(_error_suppression, ("logits",)),
    "clipped_value_loss": Case(_clipped_value_loss, ("values",)),
    "info_nce": Case(_info_nce, ("positive", "negatives")),
    "triplet_margin": Case(
        lambda b: losses.triplet_margin(b["anchor"], b["near"], b["far"], b["valid"]),
        ("anchor", "near", "far"),
    ),
    "facet_kl of sentences": Case(
        lambda b: losses.facet_kl(_distribution(b["teacher_logits"]), b["logits"], b["mask"]), ("logits",)
    ),
    "facet_kl of questions": Case(
        lambda b: losses.facet_kl(_distribution(b["near"]), b["anchor"], b["valid"]), ("anchor",)
    ),
    # whole objectives
    "whole": Case(_whole, ("logp", "entropy")),
}


def random_batch(seed: int, n: int = 4, t: int = 6, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Log-ratios from −1 to 1, so that every clip acts; lengths 0 to t, with holes as of tool tokens."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(t) < rng.integers(0, t + 1, (n, 1))) & (rng.random((n, t)) > 0.2)
    mask[0, :2] = True, False
    shapes = {**dict.fromkeys(TOKENS, (n, t)), **dict.fromkeys(ROWS, (n,))}
    shapes |= {**dict.fromkeys(MANY, (n, CLASSES)), **dict.fromkeys(VOCAB, (n, t, CLASSES))}
    batch = {key: rng.uniform(*FLOATS[key], shape).astype(dtype) for key, shape in shapes.items()}
    return batch | {"flag": rng.random((n, t)) > 0.5, "mask": mask}


def counts(key: str, batch: Batch) -> np.ndarray:
    """Where an input counts: bool, in the input's shape up to its last axis."""
    mask = np.asarray(batch["mask"])
    if key in BY_ROW:
        mask = mask.any(1)
    return np.broadcast_to(mask[..., None] if key in MANY or key in VOCAB else mask, np.shape(batch[key]))


class Reads(dict):
    """A batch that remembers what was read of it."""

    def __init__(self, batch: Batch):
        super().__init__(batch)
        self.names: set[str] = set()

    def __getitem__(self, key: str) -> Array:
        self.names.add(key)
        return super().__getitem__(key)


@cache
def inputs(name: str) -> tuple[str, ...]:
    """The float inputs that a loss reads."""
    reads = Reads(with_valid(random_batch(0)))
    jax.eval_shape(lambda: ALL_LOSSES[name].loss(reads))
    return tuple(sorted(reads.names & FLOATS.keys()))


def with_valid(batch: Batch) -> Batch:
    return batch | {"valid": batch["mask"].any(1)}


class Result(NamedTuple):
    """What a loss gives under the M aggregation modes, which are one and the same for a loss by rows."""

    loss: Array  # [N, T] or [N]
    sums: Array  # [M]
    weights: Array  # [M]
    metrics: Metrics
    gradients: dict[str, Array]  # of the sums, with respect to every float input: [M, *input.shape] each


def evaluate(name: str, batch: Batch) -> tuple[Array, Metrics]:
    return ALL_LOSSES[name].loss(with_valid(batch))


def reductions(loss: Array, batch: Batch) -> list[WeightedSum]:
    mask = batch["mask"]
    if loss.ndim == 1:
        return [masked_sum(loss, mask.any(1))]
    return [losses.aggregate(loss, mask, mode, norm=NORM) for mode in losses.AGGREGATIONS]


def run(name: str, batch: Batch) -> Result:
    """Evaluates one loss and differentiates it by all of its inputs."""

    def sums(floats: Batch) -> tuple[Array, tuple]:
        loss, metrics = evaluate(name, batch | floats)
        pairs = reductions(loss, batch)
        total = jnp.stack([pair.sum for pair in pairs])
        return total, (loss, total, jnp.stack([pair.weight for pair in pairs]), metrics)

    floats = {key: jnp.asarray(batch[key]) for key in inputs(name)}
    gradients, values = jax.jacrev(sums, has_aux=True)(floats)
    return Result(*values, gradients)


@cache
def jitted(name: str) -> Callable[[Batch], Result]:
    """`run`, compiled once per shape; the result is on the host."""
    compiled = jax.jit(partial(run, name))
    return lambda batch: jax.device_get(compiled(batch))
