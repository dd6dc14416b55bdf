"""The engine: requests in, completions out, through slots on the device that are refilled as they empty.

A round is: read the prompts that wait for a slot and place them, draw up to a block of tokens in every slot,
look at what came out. Whatever two requests have in common at their beginning, as the rows of a group or the
turns of a conversation, is read once while it is remembered.

    engine = Engine(prepare(params, cfg), cfg, slots=16, max_length=1024, key=key, stop_ids=tokenizer.eos_ids)
    completions = engine.generate([Request(ids, max_new_tokens=256) for ids in prompts])

What a request gets depends on its context, its uid, the key and the params: not, to the last bit, on what
else is served, in which slot or when. (One exception: after a context that another request has kept, figures
differ in the last bits from those of a context that was read at once.)
"""

import asyncio
import collections
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.data.prompts import bucket_length, ladder
from jaxrl_llm.models.config import ModelConfig, require_causal
from jaxrl_llm.models.params import Tree
from jaxrl_llm.parallel.sharding import ShardingRules
from jaxrl_llm.rollouts.contexts import Contexts
from jaxrl_llm.rollouts.requests import Completion, Request, Ticket, trajectories
from jaxrl_llm.sampling import slots as device
from jaxrl_llm.sampling.logits import Sampling, check_sampling
from jaxrl_llm.sampling.prefixes import Prefix
from jaxrl_llm.sampling.rules import Rules
from jaxrl_llm.sampling.slots import Slots

__all__ = ["Completion", "Engine", "Request", "Ticket", "trajectories"]


class Engine:
    """Continuous batching over one model.

    Args:
      prepared: params from `sampling.autoregressive.prepare`.
      slots: rows that are decoded together.
      max_length: tokens of a context with what is written after it, at most.
      key: of all draws.
      stop_ids: tokens that end a completion and belong to it.
      block: steps between two looks at the device, and columns of a block of the cache; None = 32, or 128
        for contexts of more than 1024 tokens.
      widths: numbers of columns that the slots may have, all of them as many as the longest needs: multiples
        of `block`, a program each. None = block · (1, 2, 3, 4, 6, 8, 12, ...).
      rules: of decoding, applied in order.
      remember: columns of cache for contexts that further requests may begin with.
      buckets: lengths that prompts are padded to; longer ones are read in pieces of the longest.
      kv_dtype: of keys and values; None = that of the params. float32 beside params in bfloat16 takes twice
        the memory, and is faster on CPUs, where the compiler would turn the whole cache into float32 and back
        at every step. int8 takes a quarter of the memory of float32; what is drawn is then a little off the
        trainer's distribution, and `behaviour_logp` says what it was drawn from.
      version: of the params.
      sharding: how slots (as batch rows) and heads lie on the mesh in context; None = on one device.

    Attributes:
      counts: how many requests ended for which reason, and how many were refused.

    Raises:
      ValueError: a size below 1, a stop token outside the vocabulary, a cache of integers other than int8, or
        a bidirectional model.
    """

    def __init__(
        self,
        prepared: Tree,
        cfg: ModelConfig,
        *,
        slots: int,
        max_length: int,
        key: jax.Array,
        stop_ids: Sequence[int] = (),
        block: int | None = None,
        widths: Sequence[int] | None = None,
        rules: Rules = (),
        remember: int = 8192,
        buckets: Sequence[int] = (32, 64, 128, 256, 512),
        kv_dtype: Any = None,
        version: int = 0,
        sharding: ShardingRules | None = None,
    ):
        require_causal(cfg, "autoregressive sampling")
        if block is None:
            block = 32 if max_length <= 1024 else 128
        for name, size in (("slots", slots), ("max_length", max_length), ("block", block)):
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if not buckets or min(buckets) < 1:
            raise ValueError(f"buckets={tuple(buckets)} must be lengths of at least 1, one or more")
        for token in stop_ids:
            if not 0 <= token < cfg.vocab_size:
                raise ValueError(f"stop token {token} is outside the vocabulary of {cfg.vocab_size}")
        self.prepared, self.cfg, self.key, self.version = prepared, cfg, key, version
        self.max_length, self.block, self.rules = max_length, block, rules
        self.stop_ids = jnp.asarray([*stop_ids, -1], jnp.int32)
        if widths is None:
            widths = ladder(max_length, multiple_of=block, middles=True)
        if any(width < 1 or width % block for width in widths) or max(widths, default=0) < max_length:
            raise ValueError(
                f"widths={tuple(widths)} must be multiples of block={block}, and one at least "
                f"max_length={max_length}"
            )
        self.widths = tuple(sorted(widths))
        dtype = prepared["final_norm"].dtype
        kv_dtype = dtype if kv_dtype is None else jnp.dtype(kv_dtype)
        if kv_dtype != jnp.int8 and not jnp.issubdtype(kv_dtype, jnp.floating):
            raise ValueError(
                f"kv_dtype={kv_dtype} must be a type of floats, int8, or None for the params' own"
            )
        options: dict[str, Any] = {"kv_dtype": kv_dtype, "sharding": sharding}
        self.free_slots = partial(device.empty, cfg, slots, self.widths[0], block, dtype, rules, **options)
        self.slots: Slots = self.free_slots()
        self.contexts = Contexts(prepared, cfg, buckets, self.widths, remember, **options)
        self.waiting: collections.deque[Ticket] = collections.deque()
        self.running: dict[int, Ticket] = {}
        self.numbers = itertools.count()
        self.counts: collections.Counter[str] = collections.Counter()
        self.spent = False  # whether the last chunk has used up the room
        self.neutral = jax.tree.map(lambda x: x[0], tuple(rule.init(1) for rule in rules))
        self.busy = threading.Lock()  # rounds and updates, which may come from several threads, take turns
        self.mover: asyncio.Task[None] | None = None

    # --- what users call

    def check(self, request: Request) -> None:
        """Refuses, and counts, what the engine cannot serve.

        Raises:
          ValueError: what it is, named.
        """
        try:
            self._check(request)
        except ValueError:
            self.counts["refused"] += 1
            raise

    def submit(self, request: Request, listener: Callable[[Completion], None] | None = None) -> Ticket:
        """Queues a request; `step` moves it on, and tells a `Ticket.listener` what is new.

        Raises:
          ValueError: as `check`.
        """
        self.check(request)
        deadline = None if request.deadline is None else time.monotonic() + request.deadline
        ticket = Ticket(request, next(self.numbers), deadline, listener)
        self.waiting.append(ticket)
        return ticket

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Serves requests to the end, in the order given. Others that are queued move on with them.

        Raises:
          ValueError: as `submit`; then none of the requests is served.
        """
        tickets: list[Ticket] = []
        try:
            tickets.extend(map(self.submit, requests))
        except ValueError:
            for ticket in tickets:
                ticket.cancel()
            raise
        while not all(ticket.future.done() for ticket in tickets):
            self.step()
        return [ticket.future.result() for ticket in tickets]

    def update(self, prepared: Tree, version: int) -> None:
        """Takes new params. Requests in flight go on with them: their contexts are read anew."""
        with self.busy:
            self.prepared, self.version = prepared, version
            self.contexts.update(prepared)
            prefixes = self.contexts.read([ticket.context() for ticket in self.running.values()])
            self._make_room()
            for (slot, ticket), prefix in zip(self.running.items(), prefixes):
                rules = jax.tree.map(lambda x, slot=slot: x[slot], self.slots.rules)
                self._place(slot, ticket, prefix, rules)

    def warm_up(self) -> None:
        """Compiles what requests of any length need, so that none has to wait for the compiler.

        Raises:
          RuntimeError: requests are being served.
        """
        with self.busy:
            if self.running:
                raise RuntimeError(f"{len(self.running)} requests are running: warm up an engine before")
            *_, longest = buckets = self.contexts.buckets
            whole = range(0, self.max_length, longest)  # what is read in pieces before the last bucket
            sizes = {before + bucket for before in whole for bucket in buckets}
            contexts = [np.zeros(size, np.int32) for size in sorted(sizes) if size <= self.widths[-1]]
            prefixes = self.contexts.read(contexts)
            self.contexts.remembered.clear()
            nothing = Ticket(Request([0], 1), 0, None)
            for width in self.widths:
                self._widen(width)
                for prefix in prefixes:
                    self._place(0, nothing, prefix, self.neutral)
                self.slots = device.release(self.slots, jnp.asarray(np.ones(len(self.slots.lengths), bool)))
                self.slots, _ = device.decode(
                    self.prepared, self.slots, self.key, self.stop_ids, self.cfg, rules=self.rules
                )
                self.slots = device.with_blocks(self.slots, -1, 1)
            self._narrow(self.widths[0])

    def step(self) -> list[Ticket]:
        """One round. Returns the tickets that it completed.

        An error of the device ends all requests, whose tickets then raise it, and leaves the engine empty.
        """
        with self.busy:
            try:
                done = self._sweep()
                self._admit()
                if self.running:
                    done += self._decode()
                return done
            except Exception as error:
                for ticket in [*self.waiting, *self.running.values()]:
                    if not ticket.future.done():
                        ticket.future.set_exception(error)
                self.waiting.clear()
                self.running.clear()
                self.slots, self.spent = self.free_slots(), False  # the old ones may have been given away
                raise

    async def complete(self, request: Request) -> Completion:
        """Serves one request beside those of other coroutines, in rounds that run in a thread.

        Raises:
          ValueError: as `submit`.
        """
        ticket = self.submit(request)
        self._keep_moving()
        try:
            return await asyncio.wrap_future(ticket.future)
        except asyncio.CancelledError:
            ticket.cancel()
            raise

    async def stream(self, request: Request) -> AsyncIterator[Completion]:
        """As `complete`, in pieces: what is new after each round, and why it ended with the last of them.

        Whoever stops listening cancels the request.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Completion | None] = asyncio.Queue()

        def put(piece: Completion | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody listens
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        ticket = self.submit(request, put)
        ticket.future.add_done_callback(lambda _: put(None))
        self._keep_moving()
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            ticket.future.result()  # raises what has stopped the engine
        finally:
            ticket.cancel()

    def _keep_moving(self) -> None:
        loop = asyncio.get_running_loop()
        if self.mover is None or self.mover.done() or self.mover.get_loop() is not loop:
            self.mover = loop.create_task(self._move())

    async def _move(self) -> None:
        """Takes rounds while there is something to do. Of an error whoever waits hears by its ticket."""
        with contextlib.suppress(Exception):
            while self.waiting or self.running:
                await asyncio.to_thread(self.step)

    def _check(self, request: Request) -> None:
        ids = np.asarray(request.tokens)
        if not ids.size:
            raise ValueError("an empty context: a request needs a token to continue")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"a context of shape {ids.shape} and type {ids.dtype}: it must be a row of ids")
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={request.max_new_tokens} must be at least 1")
        if len(ids) + request.max_new_tokens > self.max_length:
            raise ValueError(
                f"{len(ids)} tokens of context and max_new_tokens={request.max_new_tokens} do not fit into "
                f"max_length={self.max_length}: shorten one, or build the engine with more"
            )
        if ids.min() < 0 or ids.max() >= self.cfg.vocab_size:
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise ValueError(f"token id {bad} is outside the vocabulary of {self.cfg.vocab_size}")
        if request.uid is not None and not 0 <= request.uid < 2**31:
            raise ValueError(f"uid={request.uid} is outside its range [0, 2**31)")
        check_sampling(request.temperature, request.top_p, request.top_k, request.min_p)
        if request.rules and len(request.rules) != len(self.rules):
            raise ValueError(f"{len(request.rules)} states for the engine's {len(self.rules)} rules")
        for given, neutral in zip(request.rules, self.neutral):
            if _shapes(given) != _shapes(neutral):
                raise ValueError(
                    f"a rule's state {_shapes(given)} is not like {_shapes(neutral)} of the engine's"
                )

    # --- one round

    def _sweep(self) -> list[Ticket]:
        """Ends what was cancelled or is late."""
        now = time.monotonic()
        done: list[Ticket] = []

        def over(ticket: Ticket) -> bool:
            late = ticket.deadline is not None and now >= ticket.deadline
            if ticket.cancelled or late:
                self._finish(ticket, "cancelled" if ticket.cancelled else "deadline")
                done.append(ticket)
            return ticket.future.done()

        for _ in range(len(self.waiting)):  # in place: others may be submitting
            ticket = self.waiting.popleft()
            if not over(ticket):
                self.waiting.append(ticket)
        self._free([slot for slot, ticket in self.running.items() if over(ticket)])
        return done

    def _free(self, slots: list[int]) -> None:
        if slots:
            rows = np.zeros(len(self.slots.lengths), bool)
            rows[slots] = True
            self.slots = device.release(self.slots, jnp.asarray(rows))
            for slot in slots:
                del self.running[slot]

    def _admit(self) -> None:
        """Reads and places what waits, as far as there are free slots."""
        free = [slot for slot in range(len(self.slots.lengths)) if slot not in self.running]
        batch = {slot: self.waiting.popleft() for slot in free[: len(self.waiting)]}
        self.running |= batch
        prefixes = self.contexts.read([ticket.tokens for ticket in batch.values()])
        self._make_room()
        for (slot, ticket), prefix in zip(batch.items(), prefixes):
            self._place(slot, ticket, prefix, ticket.request.rules or self.neutral)

    def _decode(self) -> list[Ticket]:
        """Draws a block of tokens, and ends the requests that have come to their end in it."""
        self.slots, chunk = device.decode(
            self.prepared, self.slots, self.key, self.stop_ids, self.cfg, rules=self.rules
        )
        self.spent = True
        chunk = jax.device_get(chunk)
        done: list[Ticket] = []
        ended: list[int] = []
        for slot, ticket in self.running.items():
            count = int(chunk.counts[slot])
            version = np.full(count, self.version, np.int32)
            ticket.pieces.append((*(x[slot, :count] for x in chunk[:4]), version))
            reason, kept, error = _end(ticket, bool(chunk.stopped[slot]), bool(chunk.failed[slot]))
            if reason is None:
                if ticket.listener is not None:
                    ticket.report()
                continue
            if ticket.request.keep and kept is None and reason != "failed":
                prefix = device.take(self.slots, jnp.int32(slot), jnp.int32(count))
                self.contexts.keep(ticket.context(), prefix)
            self._finish(ticket, reason, kept, error)
            done.append(ticket)
            ended.append(slot)
        self._free(ended)
        return done

    def _finish(self, ticket: Ticket, reason: str, kept: int | None = None, error: str | None = None) -> None:
        self.counts[reason] += 1
        ticket.finish(reason, kept, error)

    def _place(self, slot: int, ticket: Ticket, prefix: Prefix, rules: Any) -> None:
        r = ticket.request
        uid = ticket.number % 2**31 if r.uid is None else r.uid
        sampling = Sampling(
            jnp.float32(r.temperature), jnp.float32(r.top_p), jnp.int32(r.top_k), jnp.float32(r.min_p)
        )
        left = jnp.int32(r.max_new_tokens - ticket.written)
        self.slots = device.place(self.slots, prefix, jnp.int32(slot), left, jnp.int32(uid), sampling, rules)

    def _make_room(self) -> None:
        """Frees the last columns for the next chunk, in the least width that holds what is running."""
        longest = max((len(t.tokens) + t.written for t in self.running.values()), default=0)
        width = bucket_length(longest, self.widths)
        self._widen(width)
        if self.spent:
            self.slots = device.with_blocks(self.slots, -1, 1)
            self.spent = False
        self._narrow(width)

    def _widen(self, width: int) -> None:
        """Rung by rung, as `_narrow`: each pair of neighbours is a program."""
        while (now := self.slots.columns) < width:
            wider = self.widths[self.widths.index(now) + 1]
            self.slots = device.with_blocks(self.slots, (wider - now) // self.block, 0)

    def _narrow(self, width: int) -> None:
        while (now := self.slots.columns) > width:
            narrower = self.widths[self.widths.index(now) - 1]
            self.slots = device.with_blocks(self.slots, (narrower - now) // self.block, 0)


def _end(ticket: Ticket, stopped: bool, failed: bool) -> tuple[str | None, int | None, str | None]:
    """Why a ticket is at its end, if it is; how many of its tokens count (None = all); what went wrong."""
    if ticket.request.find_stop is not None:
        try:
            kept = ticket.request.find_stop(ticket.new_tokens())
        except Exception as error:  # it is the user's, and must not end the round for others
            return "failed", None, f"find_stop raised {error!r}"
        if kept is not None:
            return "stop", None if kept >= ticket.written else kept, None
    if failed:
        return (
            "failed",
            None,
            "nothing to draw from: logits that are NaN or infinite, or rules that forbid every token",
        )
    if stopped:
        return "stop", None, None
    return ("length" if ticket.written >= ticket.request.max_new_tokens else None), None, None


def _shapes(state: Any) -> Any:
    """The shapes of a rule's state, as a tree."""
    return jax.tree.map(jnp.shape, state)
