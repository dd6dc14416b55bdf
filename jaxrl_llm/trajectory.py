"""The one type that every station of the loop shares."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trajectories:
    """N token sequences and all that is known about how they came to be.

    Rows are left-aligned and right-padded: prompt, policy and tool tokens stand in the order in which
    the model saw them. Every mask comes from `lengths` and `action_mask`, never from token values.
    Fields that do not apply are None.

    Attributes:
      tokens: i32[N, T] token ids as sampled; never re-encoded from text.
      lengths: i32[N] number of real tokens.
      action_mask: bool[N, T] True where the policy itself wrote the token.
      behaviour_logp: f32[N, T] log-prob (nats) under the exact distribution sampled from; 0 elsewhere.
      raw_logp: f32[N, T] log-prob (nats) under the untempered, untruncated model; 0 elsewhere.
      log_kept: f32[N, T] log of the probability mass that truncation kept (0 = all of it).
      temperature: f32[N] sampling temperature of the row.
      finished: bool[N] ended by itself (EOS or a stop string) rather than by the length limit.
      group: i32[N] which prompt instance; rows of one group are compared with each other.
      rewards: named outcome rewards, f32[N] each; NaN = not applicable or failed.
      token_rewards: f32[N, T] process rewards.
      policy_version: i32[N, T] which update of the params wrote the token.
      turn: i32[N, T] turn number, for multi-turn work.
      role: i32[N] agent role, for multi-agent work.
      commit_step: i32[N, T] denoising step that committed the token, for diffusion models.
    """

    tokens: Array
    lengths: Array
    action_mask: Array
    behaviour_logp: Array
    raw_logp: Array
    log_kept: Array
    temperature: Array
    finished: Array
    group: Array
    rewards: dict[str, Array] = dataclasses.field(default_factory=dict)
    token_rewards: Array | None = None
    policy_version: Array | None = None
    turn: Array | None = None
    role: Array | None = None
    commit_step: Array | None = None

    @property
    def num_sequences(self) -> int:
        """N."""
        return self.tokens.shape[0]

    @property
    def completion_lengths(self) -> Array:
        """i32[N] number of tokens that the policy wrote."""
        return jnp.sum(self.action_mask, axis=1, dtype=jnp.int32)

    def take(self, rows: Array) -> "Trajectories":
        """The given rows, in the given order. `rows`: i32[M] -> M sequences."""
        return jax.tree.map(lambda x: x[rows], self)


def length_mask(lengths: Array, size: int) -> Array:
    """bool[N, size], True at positions below `lengths` (i32[N])."""
    return jnp.arange(size)[None, :] < lengths[:, None]


def widen(t: Trajectories, size: int) -> Trajectories:
    """The same rows with `size` columns: padding is added, or columns beyond every length are cut off."""
    now = t.tokens.shape[1]

    def one(x: Array) -> Array:
        if x.ndim < 2:
            return x
        return x[:, :size] if size <= now else jnp.pad(x, ((0, 0), (0, size - now)))

    return jax.tree.map(one, t)


def concatenate(pieces: Sequence[Trajectories]) -> Trajectories:
    """Rows of several batches as one, padded to the widest; groups are renumbered to stay apart."""
    size = max(t.tokens.shape[1] for t in pieces)
    offset, out = 0, []
    for t in pieces:
        out.append(dataclasses.replace(widen(t, size), group=t.group + offset))
        offset += t.num_sequences
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *out)
