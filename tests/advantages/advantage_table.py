"""Every advantage of the library as a function of one batch: `ALL_ADVANTAGES`, where a new one is a line.

A case reads what it needs of the batch by name. A new input is a name in `ROWS`, `REWARDS`, `TURNS` or
`TOKENS`; what a method takes from statistics of the whole batch is made by the case's `statistics` and read
as `batch["statistics"]`, for the cuts of the tests suppose it given.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import advantages
from jaxrl_llm.losses import Array, Metrics
from jaxrl_llm.losses.aggregation import masked_sum

Batch = dict[str, Any]

N, T, K, M = 8, 6, 3, 2

ROWS = {  # f[N], uniform between these bounds; they count where `valid`
    "rewards": (0.0, 1.0),
    "greedy_rewards": (0.0, 1.0),
    "prefix_rewards": (0.0, 1.0),
    "length": (1.0, 100.0),
}
REWARDS = {  # f[N, M], one column per reward function; they count where `valid`
    "several_rewards": (0.0, 1.0),
    "chunk_scores": (1.0, 5.0),
    "chunk_lengths": (1.0, 50.0),
}
TURNS = {  # f[N, K]; they count where `turn_mask`
    "turn_rewards": (0.0, 1.0),
    "turn_values": (0.0, 1.0),
    "turn_scores": (0.0, 1.0),
}
TOKENS = {  # f[N, T]; they count where `mask`
    "token_rewards": (0.0, 1.0),
    "values": (0.0, 1.0),
    "kl": (-0.5, 0.5),
    "logp": (-1.1, -0.1),
    "old_logp": (-1.1, -0.1),
    "entropy": (0.0, 2.0),
    "covariance": (0.0, 0.5),
}
FLOATS = {**ROWS, **REWARDS, **TURNS, **TOKENS}
COMPARED = (
    "rewards",
    "greedy_rewards",
    "several_rewards",
    "prefix_rewards",
    "turn_rewards",
    "turn_scores",
    "token_rewards",
)
"""Rewards proper, of which a NaN or infinite one leaves its row out."""

GROUP = np.array([3, -7, 3, 3, -7, 40, 3, -7], np.int32)
VALID = np.array([True, True, True, False, True, True, True, True])


class Case(NamedTuple):
    """One advantage.

    Attributes:
      advantage: of the batch: f[N, ...], 0 where a row does not count, and metrics.
      statistics: what it takes from the whole batch, as a function of the batch; None for nothing.
      is_relative: whether groups of equal rewards, and of one row, get exactly 0.
    """

    advantage: Callable[[Batch], tuple[Array, Metrics]]
    statistics: Callable[[Batch], Any] | None = None
    is_relative: bool = True


def _by_group(function: Callable, b: Batch, **options) -> tuple[Array, Metrics]:
    return function(b["rewards"], b["group"], b["valid"], **options)


def _accuracy(b: Batch) -> Array:
    """HA-DW's anchor: the batch's mean reward."""
    total = masked_sum(b["rewards"], b["valid"] & jnp.isfinite(b["rewards"]))
    return total.sum / jnp.maximum(total.weight, 1)


def _tracks(b: Batch) -> tuple[Array, Metrics]:
    """Both tracks of TRUST-SQL; the prefix is the tokens of turn 0, wherever the mask has holes."""
    in_prefix = b["mask"] & (b["turn"] == 0)
    end = jnp.max(jnp.where(in_prefix, jnp.arange(T) + 1, 0), axis=1)
    both, metrics = advantages.dual_track(
        b["rewards"], b["prefix_rewards"], b["group"], b["mask"], end, b["valid"]
    )
    return jnp.stack(both, axis=-1), metrics


def _token_inputs(expectation: str, b: Batch) -> tuple[Array, Array, Array, Metrics]:
    """GRPO's advantages, what they do to the entropy, and the tokens of rows that count."""
    a = _by_group(advantages.grpo, b)[0][:, None]
    mask = b["mask"] & _usable(b)[:, None]
    covariance = b["covariance"] if expectation == "exact" else None
    tokens = b["logp"], b["old_logp"], a, mask, b["entropy"], covariance
    change, metrics = advantages.entropy_change(*tokens, expectation=expectation)
    return a, change, mask, metrics


def _dynamo(expectation: str, b: Batch) -> tuple[Array, Metrics]:
    a, change, mask, metrics = _token_inputs(expectation, b)
    weights, more = advantages.modulation_weights(a, b["entropy"], change, mask, b["statistics"])
    return a * weights * mask, metrics | more


def _extremes(expectation: str, b: Batch) -> advantages.Extremes:
    _, change, mask, _ = _token_inputs(expectation, b)
    return advantages.modulation_extremes(b["entropy"], change, mask)


def _last_turn(b: Batch) -> Array:
    return jnp.sum(b["turn_mask"], axis=1) - 1


def _roles(function: Callable, b: Batch) -> tuple[Array, Metrics]:
    """Rewards of all roles, of turns from 0."""
    rewards, metrics = function(b["turn_scores"], _last_turn(b), b["valid"])
    return jnp.stack(list(rewards.values()), axis=-1), metrics


def _scma(reference: str, b: Batch) -> tuple[Array, Metrics]:
    """GRPO on accuracy less the length penalty."""
    chunks = b["chunk_scores"], b["chunk_lengths"], b["length"]
    penalty = advantages.importance_length_penalty(*chunks, b["group"], _usable(b), reference=reference)
    reward = advantages.length_penalised_reward(b["rewards"], penalty)
    return advantages.grpo(reward, b["group"], b["valid"])


def _pgpo(b: Batch) -> tuple[Array, Metrics]:
    """GRPO on the prompts that the length filter keeps."""
    kept, metrics = advantages.length_filter(b["length"], b["group"], _usable(b), bounds=b["statistics"])
    result, more = advantages.grpo(b["rewards"], b["group"], kept)
    return result, metrics | more | {"nonfinite_rewards": masked_sum(~_usable(b), b["valid"])}


def _usable(b: Batch) -> Array:
    return advantages.usable_rows(b["rewards"], b["valid"])


def _deviation_statistics(b: Batch, weight: Array | None = None) -> advantages.BatchStatistics:
    """Of the rewards less their group's mean, for REINFORCE++ with a baseline."""
    deviation, _ = _by_group(advantages.dr_grpo, b)
    return advantages.batch_statistics(deviation, _usable(b), weight=weight)


def _gdpo(b: Batch) -> tuple[Array, Metrics]:
    rewards, group, valid = b["several_rewards"], b["group"], b["valid"]
    return advantages.gdpo(rewards, group, valid, weights=(0.5, 2.0), statistics=b["statistics"])


def _score_statistics(b: Batch, weight: Array | None = None) -> advantages.BatchStatistics:
    """Of GDPO's sums over the rewards."""
    rewards, group, valid = b["several_rewards"], b["group"], b["valid"]
    scores, _ = advantages.gdpo_scores(rewards, group, valid, weights=(0.5, 2.0))
    return advantages.batch_statistics(scores, advantages.usable_scores(rewards, valid), weight=weight)


def _return_statistics(b: Batch) -> advantages.BatchStatistics:
    """Of REINFORCE++'s penalised returns."""
    tokens = b["token_rewards"], b["kl"], b["mask"]
    return advantages.batch_statistics(*advantages.reinforce_plus_plus_returns(*tokens, beta=0.1, gamma=0.9))


def _gae(b: Batch) -> tuple[Array, Metrics]:
    pair = advantages.gae(b["token_rewards"], b["values"], b["mask"], gamma=0.9, lam=0.8)
    return jnp.stack(pair, axis=-1), {}


def _turn_level_gae(b: Batch) -> tuple[Array, Metrics]:
    turns = b["turn_rewards"], b["turn_values"], b["turn_mask"]
    pair = advantages.turn_level_gae(*turns, b["turn"], b["mask"], gamma=0.9, lam=0.8)
    return jnp.concatenate(pair, axis=1), {}


def _hian(b: Batch, **options) -> tuple[Array, Metrics]:
    rewards = b["rewards"], b["turn_rewards"], b["turn_mask"]
    per_turn, metrics = advantages.hian(*rewards, b["group"], b["valid"], **options)
    return advantages.turns_to_tokens(per_turn, b["turn"], b["mask"]), metrics


def _usable_turns(b: Batch) -> Array:
    return advantages.usable_tokens(b["turn_rewards"], b["turn_mask"]) & _usable(b)[:, None]


def _turn_statistics(b: Batch) -> advantages.BatchStatistics:
    """Of HIAN's returns over turns."""
    turns = _usable_turns(b)
    to_come = advantages.discounted_returns(b["turn_rewards"], turns, gamma=0.5)
    return advantages.batch_statistics(to_come, turns)


def _fused_statistics(b: Batch) -> advantages.BatchStatistics:
    """Of HIAN's sum of both horizons."""
    rewards = b["rewards"], b["turn_rewards"], b["turn_mask"]
    fused, _ = advantages.hian(*rewards, b["group"], b["valid"])
    return advantages.batch_statistics(fused, _usable_turns(b))


ALL_ADVANTAGES: dict[str, Case] = {
    # comparisons within a group
    "grpo": Case(partial(_by_group, advantages.grpo)),
    "dr_grpo": Case(partial(_by_group, advantages.dr_grpo)),
    "rloo": Case(partial(_by_group, advantages.rloo)),
    "hacpo": Case(partial(_by_group, advantages.hacpo)),
    "ha_dw": Case(lambda b: _by_group(advantages.ha_dw, b, anchor=b["statistics"]), _accuracy),
    "opo": Case(lambda b: _by_group(advantages.opo, b, lengths=b["length"])),
    "bnpo": Case(
        lambda b: _by_group(advantages.bnpo, b, parameters=advantages.beta_parameters(b["statistics"])),
        partial(_by_group, advantages.success_rate_statistics),
    ),
    # whitened over the batch
    "group, batch's std": Case(
        lambda b: _by_group(advantages.group_advantage, b, scale="batch", statistics=b["statistics"]),
        lambda b: advantages.batch_statistics(b["rewards"], _usable(b)),
    ),
    "reinforce_plus_plus_baseline": Case(
        lambda b: _by_group(advantages.reinforce_plus_plus_baseline, b, statistics=b["statistics"]),
        _deviation_statistics,
    ),
    "reinforce_plus_plus_baseline, tokens": Case(
        lambda b: _by_group(advantages.reinforce_plus_plus_baseline, b, statistics=b["statistics"]),
        lambda b: _deviation_statistics(b, b["length"]),
    ),
    "reinforce_plus_plus": Case(
        lambda b: advantages.reinforce_plus_plus(
            b["token_rewards"], b["kl"], b["mask"], beta=0.1, gamma=0.9, statistics=b["statistics"]
        ),
        _return_statistics,
        is_relative=False,
    ),
    # several rewards
    "gdpo": Case(_gdpo, _score_statistics),
    "gdpo, tokens": Case(_gdpo, lambda b: _score_statistics(b, b["length"])),
    # best of k
    "grpo_pass_at_k": Case(partial(_by_group, advantages.grpo_pass_at_k)),
    "pass_at_k_training": Case(partial(_by_group, advantages.pass_at_k_training, k=2)),
    # returns and values
    "discounted_returns": Case(
        lambda b: (advantages.discounted_returns(b["token_rewards"], b["mask"], gamma=0.9), {}),
        is_relative=False,
    ),
    "gae": Case(_gae, is_relative=False),
    "remax": Case(
        lambda b: advantages.remax(b["rewards"], b["greedy_rewards"], b["valid"]), is_relative=False
    ),
    # turns, tracks, teams
    "turn_level_gae": Case(_turn_level_gae, is_relative=False),
    "hian": Case(_hian),
    "hian, position": Case(partial(_hian, scope="position")),
    "hian, discounted": Case(partial(_hian, gamma=0.5), is_relative=False),
    "hian, batch": Case(
        lambda b: _hian(b, scope="batch", gamma=0.5, turn_statistics=b["statistics"]),
        _turn_statistics,
        is_relative=False,
    ),
    "hian, whitened": Case(lambda b: _hian(b, whitened=True, statistics=b["statistics"]), _fused_statistics),
    "clipped_grpo": Case(partial(_by_group, advantages.clipped_grpo, clip=0.9)),
    "dual_track": Case(_tracks),
    "xgrpo": Case(lambda b: _by_group(advantages.xgrpo, b, is_peer=b["is_peer"])),
    "dynamo": Case(partial(_dynamo, "exact"), partial(_extremes, "exact")),
    "dynamo, sequence mean": Case(partial(_dynamo, "sequence_mean"), partial(_extremes, "sequence_mean")),
    "praise_rewards": Case(
        lambda b: advantages.praise_rewards(
            b["turn_scores"], b["rewards"], _last_turn(b), b["turn"], b["mask"]
        ),
        is_relative=False,
    ),
    "search_role_rewards": Case(partial(_roles, advantages.search_role_rewards), is_relative=False),
    "coding_role_rewards": Case(partial(_roles, advantages.coding_role_rewards), is_relative=False),
    "shared_role_rewards": Case(
        lambda b: advantages.shared_role_rewards(b["rewards"], b["turn_mask"]), is_relative=False
    ),
    # shaped by length
    "scma": Case(partial(_scma, "group_mean"), is_relative=False),
    "scma, relative": Case(partial(_scma, "relative"), is_relative=False),
    "pgpo": Case(
        _pgpo, lambda b: advantages.length_quantiles(b["length"], b["group"], _usable(b), low=0.5, high=0.6)
    ),
}


def random_batch(seed: int, dtype: type = np.float32) -> Batch:
    """Ragged groups in mixed order, one of them a single row, and one row that is not valid.

    The row's tokens and turns are masked; the others have holes, as of tool tokens, and one has no token.
    """
    rng = np.random.default_rng(seed)
    mask = (np.arange(T) < rng.integers(2, T + 1, (N, 1))) & (rng.random((N, T)) > 0.2) & VALID[:, None]
    mask[2] = False
    turn_mask = (np.arange(K) < rng.integers(1, K + 1, (N, 1))) & VALID[:, None]
    shapes = dict.fromkeys(ROWS, (N,)) | dict.fromkeys(REWARDS, (N, M))
    shapes |= dict.fromkeys(TURNS, (N, K)) | dict.fromkeys(TOKENS, (N, T))
    batch = {key: rng.uniform(*FLOATS[key], shape).astype(dtype) for key, shape in shapes.items()}
    turn = np.sort(rng.integers(0, K, (N, T))).astype(np.int32)
    is_peer = rng.random(N) > 0.6
    masks = {"valid": VALID, "mask": mask, "turn_mask": turn_mask}
    return batch | masks | {"group": GROUP, "turn": turn, "is_peer": is_peer}


def counts(key: str, batch: Batch) -> np.ndarray:
    """Where a float input counts: bool, in the input's shape."""
    where = batch["mask" if key in TOKENS else "turn_mask" if key in TURNS else "valid"]
    shape = np.shape(batch[key])
    return np.broadcast_to(np.reshape(where, np.shape(where) + (1,) * (len(shape) - np.ndim(where))), shape)


class Reads(dict):
    """A batch that notes what is read of it."""

    def __init__(self, batch: Batch, names: set[str]):
        super().__init__(batch)
        self.names = names

    def __getitem__(self, key: str) -> Any:
        self.names.add(key)
        return super().__getitem__(key)


@cache
def inputs(name: str) -> tuple[str, ...]:
    """The float inputs that an advantage reads, itself or for its statistics."""
    names: set[str] = set()
    jax.eval_shape(lambda: evaluate(name, with_statistics(name, random_batch(0), names), names))
    return tuple(sorted(names & FLOATS.keys()))


def with_statistics(name: str, batch: Batch, names: set[str] | None = None) -> Batch:
    """The batch with what the advantage takes from the whole of it."""
    function = ALL_ADVANTAGES[name].statistics
    return batch | {
        "statistics": function(Reads(batch, names if names is not None else set())) if function else ()
    }


def evaluate(name: str, batch: Batch, names: set[str] | None = None) -> tuple[Array, Metrics]:
    """The advantage on a batch, or on a piece of one with the statistics of the whole."""
    return ALL_ADVANTAGES[name].advantage(Reads(batch, names if names is not None else set()))


@cache
def jitted(name: str) -> Callable[[Batch], tuple[Array, Metrics]]:
    return jax.jit(partial(evaluate, name))


@cache
def jitted_statistics(name: str) -> Callable[[Batch], Any]:
    return jax.jit(lambda batch: with_statistics(name, batch)["statistics"])


def run(name: str, batch: Batch) -> tuple[np.ndarray, Metrics]:
    """The advantage on a whole batch."""
    result, metrics = jitted(name)(batch | {"statistics": jitted_statistics(name)(batch)})
    return np.asarray(result), metrics
