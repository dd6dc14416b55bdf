"""Every loss of the library as a function of one batch: a new loss is covered by its line in a table here.

Surrogates and KL estimators come from their own tables with default options; other options are listed below.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import losses
from jaxrl_llm.losses import Metrics

Batch = dict[str, jax.Array]
Loss = Callable[[Batch], tuple[jax.Array, Metrics]]

NORM = 8.0


def _surrogate(function: Callable, batch: Batch) -> tuple[jax.Array, Metrics]:
    return function(batch["logp"], batch["old_logp"], batch["advantages"], batch["mask"])


def _kl(function: Callable, batch: Batch) -> tuple[jax.Array, Metrics]:
    return function(batch["logp"], batch["ref_logp"], batch["mask"], old_logp=batch["old_logp"])


def _corrected(mode: str, batch: Batch) -> tuple[jax.Array, Metrics]:
    """The policy gradient under each rollout correction."""
    loss, metrics = _surrogate(losses.reinforce, batch)
    weights, more = losses.importance_sampling_correction(
        batch["old_logp"], batch["behaviour_logp"], batch["mask"], mode=mode, cap=2.0, floor=0.5
    )
    return loss * weights, metrics | more


def _whole(batch: Batch) -> tuple[jax.Array, Metrics]:
    """GRPO as it is trained: surrogate, reference KL, entropy bonus and the raw statistics."""
    loss, metrics = _surrogate(losses.ppo_clip, batch)
    kl, kl_metrics = _kl(losses.kl_k3, batch)
    bonus, entropy_metrics = losses.entropy_bonus(batch["entropy"], batch["mask"])
    statistics = losses.ratio_statistics(batch["logp"], batch["behaviour_logp"], batch["mask"])
    return loss + 0.04 * kl + 0.01 * bonus, metrics | kl_metrics | entropy_metrics | statistics


ALL_LOSSES: dict[str, Loss] = {
    **{name: partial(_surrogate, function) for name, function in losses.SURROGATES.items()},
    "ppo_clip dual": partial(_surrogate, partial(losses.ppo_clip, epsilon_high=0.28, delta=1.5)),
    "gspo token": partial(_surrogate, partial(losses.gspo, epsilon=0.1, form="token")),
    "cispo upper": partial(_surrogate, partial(losses.cispo, epsilon=float("inf"), epsilon_high=0.28)),
    "dgpo steep": partial(_surrogate, partial(losses.dgpo, left_decay=2.5, right_decay=1.0)),
    **{name: partial(_kl, function) for name, function in losses.KL_ESTIMATORS.items()},
    **{mode: partial(_corrected, mode) for mode in losses.IMPORTANCE_SAMPLING_CORRECTIONS},
    "negative_log_likelihood": lambda b: losses.negative_log_likelihood(b["logp"], b["mask"]),
    "entropy_bonus": lambda b: losses.entropy_bonus(b["entropy"], b["mask"]),
    "whole": _whole,
}

FLOATS = ("logp", "old_logp", "ref_logp", "behaviour_logp", "entropy", "advantages")


def random_batch(seed: int, n: int = 4, t: int = 6, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Log-ratios from −1 to 1, so that every clip acts; lengths 0 to t, with holes as of tool tokens."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(t) < rng.integers(0, t + 1, (n, 1))) & (rng.random((n, t)) > 0.2)
    mask[0, :2] = True, False
    batch = {name: -rng.uniform(0.1, 1.1, (n, t)).astype(dtype) for name in FLOATS if name.endswith("logp")}
    batch["entropy"] = rng.uniform(0, 2, (n, t)).astype(dtype)
    batch["advantages"] = rng.normal(size=(n, t)).astype(dtype)
    return batch | {"mask": mask}


class Result(NamedTuple):
    """What a loss gives under the M aggregation modes."""

    per_token: jax.Array  # [N, T]
    sums: jax.Array  # [M]
    weights: jax.Array  # [M]
    metrics: Metrics
    gradients: dict[str, jax.Array]  # of the sums, with respect to every float input: [M, N, T] each


def run(name: str, batch: Batch) -> Result:
    """Evaluates one loss and differentiates it by all of its inputs."""

    def sums(floats: Batch) -> tuple[jax.Array, tuple]:
        per_token, metrics = ALL_LOSSES[name](floats | {"mask": batch["mask"]})
        pairs = [losses.aggregate(per_token, batch["mask"], mode, norm=NORM) for mode in losses.AGGREGATIONS]
        total = jnp.stack([pair.sum for pair in pairs])
        return total, (per_token, total, jnp.stack([pair.weight for pair in pairs]), metrics)

    floats = {key: jnp.asarray(batch[key]) for key in FLOATS}
    gradients, values = jax.jacrev(sums, has_aux=True)(floats)
    return Result(*values, gradients)


@cache
def jitted(name: str) -> Callable[[Batch], Result]:
    """`run`, compiled once per shape; with little optimization, as compiling is what these tests cost."""
    return jax.jit(partial(run, name), compiler_options={"xla_backend_optimization_level": 0})
