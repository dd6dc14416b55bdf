"""Contexts as the model has read them: what two have in common at their beginning is read once."""

import collections
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.data.prompts import bucket_length
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.params import Tree
from jaxrl_llm.parallel.sharding import ShardingRules
from jaxrl_llm.sampling import prefixes
from jaxrl_llm.sampling.prefixes import Prefix

TOGETHER = 256
"""Columns that are read in one call, in as many rows as that makes."""


class Remembered:
    """Contexts that have been read, the least recently used forgotten first, up to a number of columns.

    A whole context is found by its tokens. One that a request left for what will continue it is also found
    as the beginning of a longer one.
    """

    def __init__(self, columns: int):
        self.columns = columns
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.used = 0
        self.entries: collections.OrderedDict[bytes, Prefix] = collections.OrderedDict()
        self.to_continue: dict[int, set[bytes]] = {}  # by length

    def put(self, tokens: np.ndarray, prefix: Prefix, *, to_continue: bool = False) -> None:
        """Remembers i32[n] `tokens`, read into the only row of `prefix`."""
        name = tokens.tobytes()
        if to_continue:
            self.to_continue.setdefault(len(tokens), set()).add(name)
        if name not in self.entries:
            self.entries[name] = prefix
            self.used += prefix.columns
        while self.used > self.columns:
            oldest, forgotten = self.entries.popitem(last=False)
            self.used -= forgotten.columns
            size = len(oldest) // tokens.itemsize
            names = self.to_continue.get(size, set())
            names.discard(oldest)
            if not names:
                self.to_continue.pop(size, None)

    def find(self, tokens: np.ndarray) -> tuple[int, Prefix | None]:
        """The most of `tokens` that has been read: how many, and the prefix; (0, None) if nothing."""
        beginnings = sorted((size for size in self.to_continue if size < len(tokens)), reverse=True)
        for size in [len(tokens), *beginnings]:
            name = tokens[:size].tobytes()
            if name in self.entries and (size == len(tokens) or name in self.to_continue[size]):
                self.entries.move_to_end(name)
                return size, self.entries[name]
        return 0, None


class Contexts:
    """Reads contexts, and remembers them as long as the params are the same.

    Args:
      prepared: params from `sampling.autoregressive.prepare`.
      buckets: lengths that contexts are padded to; longer ones are read in pieces of the longest.
      widths: numbers of columns that a longer prefix is kept in, ascending.
      remember: columns that are remembered.
      kv_dtype: of prefixes, as `prefixes.prefill`.
      sharding: as `prefixes.prefill`.
    """

    def __init__(
        self,
        prepared: Tree,
        cfg: ModelConfig,
        buckets: Sequence[int],
        widths: Sequence[int],
        remember: int,
        *,
        kv_dtype: Any = None,
        sharding: ShardingRules | None = None,
    ):
        self.prepared, self.cfg, self.kv_dtype, self.sharding = prepared, cfg, kv_dtype, sharding
        self.buckets, self.widths = tuple(sorted(buckets)), tuple(widths)
        self.remembered = Remembered(remember)

    def update(self, prepared: Tree) -> None:
        """Takes new params, and forgets what the old ones made of contexts."""
        self.prepared = prepared
        self.remembered.clear()

    def read(self, contexts: list[np.ndarray]) -> list[Prefix]:
        """Prefixes of contexts i32[n], a row each; what is remembered or alike is not read again."""
        out: dict[bytes, Prefix] = {}
        fresh: dict[int, dict[bytes, np.ndarray]] = {}
        for tokens in contexts:
            name = tokens.tobytes()
            size, prefix = self.remembered.find(tokens)
            if size == 0 and len(tokens) <= self.buckets[-1]:
                fresh.setdefault(bucket_length(len(tokens), self.buckets), {})[name] = tokens
            elif name not in out:
                out[name] = self._extend(prefix, tokens, size)
        for bucket, group in fresh.items():
            rows = list(group.values())
            several = max(1, TOGETHER // bucket)  # always as many: shapes are few, and a row's bits its own
            for begin in range(0, len(rows), several):
                part = rows[begin : begin + several]
                read = self._prefill(None, part + [part[-1]] * (several - len(part)), bucket)
                for tokens, prefix in zip(part, prefixes.rows(read)):
                    out[tokens.tobytes()] = prefix
        for tokens in contexts:
            self.remembered.put(tokens, out[tokens.tobytes()])
        return [out[tokens.tobytes()] for tokens in contexts]

    def keep(self, tokens: np.ndarray, prefix: Prefix) -> None:
        """Remembers i32[n] `tokens` for contexts that continue them."""
        prefix = prefixes.trim(prefix, columns=bucket_length(len(tokens), self.widths))
        self.remembered.put(tokens, prefix, to_continue=True)

    def _extend(self, prefix: Prefix | None, tokens: np.ndarray, size: int) -> Prefix:
        """Reads what comes after the first `size` tokens, in pieces of the longest bucket."""
        while prefix is None or size < len(tokens):
            part = tokens[size : size + self.buckets[-1]]
            prefix = self._prefill(prefix, [part], bucket_length(len(part), self.buckets))
            size += len(part)
            prefix = prefixes.trim(prefix, columns=bucket_length(size, self.widths))
        return prefix

    def _prefill(self, past: Prefix | None, rows: list[np.ndarray], bucket: int) -> Prefix:
        tokens = np.zeros((len(rows), bucket), np.int32)
        for row, ids in zip(tokens, rows):
            row[bucket - len(ids) :] = ids
        counts = np.array([len(ids) for ids in rows], np.int32)
        return prefixes.prefill(
            self.prepared,
            past,
            jnp.asarray(tokens),
            jnp.asarray(counts),
            self.cfg,
            kv_dtype=self.kv_dtype,
            sharding=self.sharding,
        )
