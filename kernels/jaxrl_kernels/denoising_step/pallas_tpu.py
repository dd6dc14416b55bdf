"""A denoising step on a TPU: logits are read once, and what is known of a row so far stays on the chip.

A row's logits fall into 128 lanes, the columns of equal remainder. Each lane has its own largest logit, the
sums relative to it and so on, so a chunk of 128 columns is added without a look across lanes; they are
merged behind the last chunk. The K most likely tokens are the exception: while any row of a block has
another candidate for them, its best is put in its place and taken out of the block.
"""

import functools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrl_kernels.denoising_step.xla import Operands, Statistics, contrast
from jaxrl_kernels.manual import out_shape, vary, varying_axes

Array = jax.Array

LANES = 128
BLOCK_ROWS = 16
BLOCK_COLUMNS = 8192
"""Half a MiB of float32 logits, which lie together in HBM; twice each, of 16 MiB."""
CHUNKS = 4
"""Of 128 columns that are added at once. The vocabularies of LLaDA and Dream are multiples of 512.

With guidance they take 86 bundles of instructions on a v5e and 87 on a v6e, as libtpu's static schedule
counts them; to read them takes 120 cycles at 819 GB/s and 70 at 1,640 GB/s. With a look too they take 124 and
138, and 31 or 30 more for each candidate that any of the rows has in the block.
"""

LOWEST = -1e38
"""Where a running maximum starts. Finite: inf - inf is NaN."""
INF = float("inf")


class Likeliest(NamedTuple):
    """The best token of some columns: its logit, its id, and its plain logit."""

    logit: Array
    token: Array
    plain: Array

    def add(self, z: Array, plain: Array, column: Array) -> "Likeliest":
        """With more columns, whose ids are higher."""
        is_better = z > self.logit
        new = Likeliest(z, column, plain)
        return Likeliest(*(jnp.where(is_better, a, b) for a, b in zip(new, self)))

    def merged(self) -> "Likeliest":
        """Of all lanes, [BR, 1]; the lowest id of equals."""
        logit = jnp.max(self.logit, axis=1, keepdims=True)
        token = jnp.where(self.logit == logit, self.token, jnp.iinfo(jnp.int32).max)
        token = jnp.min(token, axis=1, keepdims=True)
        is_it = (self.logit == logit) & (self.token == token)
        plain = jnp.max(jnp.where(is_it, self.plain, -INF), axis=1, keepdims=True)
        return Likeliest(logit, token, plain)


class LogSum(NamedTuple):
    """m = max z and Σ e^(z-m) of some columns; with Σ (z-m)·e^(z-m) and the second largest z, or None."""

    peak: Array
    total: Array
    moment: Array | None
    second: Array | None

    def add(self, chunks: list[Array]) -> "LogSum":
        """With more columns."""
        second, top = self.second, self.peak
        for z in chunks:
            if second is not None:
                second = jnp.maximum(second, jnp.minimum(top, z))
            top = jnp.maximum(top, z)
        total, moment = self._below(top)
        for z in chunks:
            x = z - top
            weight = jnp.exp(x)
            total += weight
            if moment is not None:
                moment += jnp.maximum(x, LOWEST) * weight
        return LogSum(top, total, moment, second)

    def merged(self) -> "LogSum":
        """Of all lanes, [BR, 1]."""
        peak = jnp.max(self.peak, axis=1, keepdims=True)
        total, moment = self._below(peak)
        second = self.second
        if moment is not None and second is not None:
            moment = jnp.sum(moment, axis=1, keepdims=True)
            lane = jax.lax.broadcasted_iota(jnp.int32, self.peak.shape, 1)
            first = jnp.min(jnp.where(self.peak == peak, lane, LANES), axis=1, keepdims=True)
            second = jnp.maximum(second, jnp.where(lane == first, -INF, self.peak))
            second = jnp.max(second, axis=1, keepdims=True)
        return LogSum(peak, jnp.sum(total, axis=1, keepdims=True), moment, second)

    def log_prob(self, z: Array) -> Array:
        return (z - self.peak) - jnp.log(self.total)

    def _below(self, top: Array) -> tuple[Array, Array | None]:
        """The sums relative to a higher maximum."""
        by = self.peak - top
        shrink = jnp.exp(by)
        moment = None if self.moment is None else shrink * (self.moment + by * self.total)
        return shrink * self.total, moment


class Top(NamedTuple):
    """The most likely tokens in order, one in each lane: logits, and ids (-1 = none)."""

    logits: Array
    ids: Array

    def insert(self, logit: Array, token: Array) -> "Top":
        """With another one [BR, 1] of higher id behind those of equal logit."""
        lane = jax.lax.broadcasted_iota(jnp.int32, self.ids.shape, 1)
        moved = Top(*(pltpu.roll(x, 1, 1) for x in self))
        stays, is_next = self.logits >= logit, (lane == 0) | (moved.logits >= logit)
        new = zip(self, moved, (logit, token))
        return Top(*(jnp.where(stays, old, jnp.where(is_next, own, behind)) for old, behind, own in new))


class Track(NamedTuple):
    """What is kept for the look.

    Attributes:
      sums: of the plain distribution without banned tokens.
      now: logits of the last look's tokens, one in each lane.
      best: the block's best candidate.
    """

    sums: LogSum
    now: Array
    best: Likeliest

    def add(self, z: Array, column: Array, first: Array, tracked: Array) -> "Track":
        """With the tokens of a chunk, of which `first` is the first; leaves `sums` alone."""
        place = tracked & (LANES - 1)
        found = jnp.take_along_axis(z, place, axis=1)
        now = jnp.where(tracked - place == first, found, self.now)
        return self._replace(now=now, best=self.best.add(z, z, column))


class Running(NamedTuple):
    """All that is kept of a row, [BR, 128] each."""

    proposal: Likeliest
    judged: LogSum
    plain: LogSum
    track: Track | None


def _start(shape: tuple[int, int], tracks: bool) -> Running:
    def full(value: float) -> Array:
        return jnp.full(shape, value, jnp.float32)

    none = jnp.zeros(shape, jnp.int32)
    best = Likeliest(full(-INF), none, full(-INF))
    sums = LogSum(full(LOWEST), full(0), None, None)
    track = Track(sums, full(-INF), best) if tracks else None
    return Running(best, LogSum(full(LOWEST), full(0), full(0), full(-INF)), sums, track)


def _body(
    operands: Any, outputs: Any, running: Any, top: Any, allowed: Any, *, judge: str, vocab: int
) -> None:
    """Blocks of the operands [BR, BV] and [BR, n], of `Statistics` [BR, 1] and [BR, K]; and scratch: what is
    kept of the rows, their most likely tokens, and the block's logits that may still become such.
    """
    tile = pl.program_id(1)
    rows, width = operands.logits.shape
    shape = (rows, LANES)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    tracks = operands.tracked is not None

    @pl.when(tile == 0)
    def _() -> None:
        jax.tree.map(lambda ref, x: ref.__setitem__(..., x), running, _start(shape, tracks))
        if tracks:
            top.logits[...] = jnp.full(shape, -INF, jnp.float32)
            top.ids[...] = jnp.full(shape, -1, jnp.int32)

    def offsets(ref: Any) -> list[Array]:
        """For each id where its chunk begins, in its lane."""
        return [] if ref is None else [ref[:, j : j + 1] - lane for j in range(ref.shape[1])]

    banned, distrusted = offsets(operands.banned), offsets(operands.distrusted)
    weight = None if operands.weight is None else jnp.broadcast_to(operands.weight[...], shape)
    tracked = operands.tracked[...] if tracks else None

    def without(z: Array, ids: list[Array], first: Array) -> Array:
        hits = [x == first for x in ids]
        return jnp.where(functools.reduce(jnp.logical_or, hits), -INF, z) if hits else z

    def chunks(step: Array) -> list[tuple[Any, Array]]:
        """Where they lie in the block, and their first ids."""
        starts = [pl.multiple_of((step * CHUNKS + chunk) * LANES, LANES) for chunk in range(CHUNKS)]
        return [(pl.ds(start, LANES), tile * width + start) for start in starts]

    def add(step: Array, state: Running) -> Running:
        """With the next columns of the block."""
        plains, judges, alloweds = [], [], []
        proposal, track = state.proposal, state.track
        for here, first in chunks(step):
            column = first + lane
            # beyond the last token stands anything
            is_token = column < vocab if vocab % (CHUNKS * LANES) else None
            plain = operands.logits[:, here].astype(jnp.float32)
            plain = plain if is_token is None else jnp.where(is_token, plain, -INF)
            clean = guided = without(plain, banned, first)
            if weight is not None:
                guided = contrast(plain, operands.negative[:, here].astype(jnp.float32), weight)
                guided = guided if is_token is None else jnp.where(is_token, guided, -INF)
                guided = without(guided, banned, first)
            proposal = proposal.add(guided, plain, column)
            plains.append(plain)
            judges.append(without(guided if judge == "guided" else clean, distrusted, first))
            if track is not None and tracked is not None:
                alloweds.append(clean)
                allowed[:, here] = clean
                track = track.add(clean, column, first, tracked)
        if track is not None:
            track = track._replace(sums=track.sums.add(alloweds))
        return Running(proposal, state.judged.add(judges), state.plain.add(plains), track)

    # the last block may end before its columns do
    steps = pl.cdiv(jnp.minimum(width, vocab - tile * width), CHUNKS * LANES)
    state = jax.tree.map(lambda ref: ref[...], running)
    if tracks:  # candidates of this block alone
        state = state._replace(track=state.track._replace(best=_start(shape, True).proposal))
    state = jax.lax.fori_loop(0, steps, add, state)
    jax.tree.map(lambda ref, x: ref.__setitem__(..., x), running, state)

    if tracks:
        last = lane == outputs.ids.shape[1] - 1

        def is_candidate(best: Likeliest) -> Array:
            kept = jnp.max(jnp.where(last, top.logits[...], -INF), axis=1, keepdims=True)
            return jnp.max((jnp.max(best.logit, axis=1, keepdims=True) > kept).astype(jnp.int32)) > 0

        def move(best: Likeliest) -> Likeliest:
            """From the block into the list; gives the block's next candidates."""
            found = best.merged()
            new = Top(top.logits[...], top.ids[...]).insert(found.logit, found.token)
            top.logits[...], top.ids[...] = new

            def rest(step: Array, best: Likeliest) -> Likeliest:
                for here, first in chunks(step):
                    z = jnp.where(first + lane == found.token, -INF, allowed[:, here])
                    allowed[:, here] = z
                    best = best.add(z, z, first + lane)
                return best

            return jax.lax.fori_loop(0, steps, rest, _start(shape, True).proposal)

        jax.lax.while_loop(is_candidate, move, state.track.best)

    @pl.when(tile == pl.num_programs(1) - 1)
    def _() -> None:
        state = jax.tree.map(lambda ref: ref[...], running)
        _finish(state, top, operands.distrusted, outputs, judge)


def _finish(state: Running, top: Any, distrusted: Any, outputs: Any, judge: str) -> None:
    """From what was kept to the results."""
    proposal, judged, plain = state.proposal.merged(), state.judged.merged(), state.plain.merged()
    logit = proposal.logit if judge == "guided" else proposal.plain
    for j in range(0 if distrusted is None else distrusted.shape[1]):
        logit = jnp.where(distrusted[:, j : j + 1] == proposal.token, -INF, logit)
    assert judged.moment is not None and judged.second is not None
    numbers = {
        "token": proposal.token,
        "probability": jnp.exp(judged.log_prob(logit)),
        "margin": (1 - jnp.exp(judged.second - judged.peak)) / judged.total,
        "entropy": jnp.log(judged.total) - judged.moment / judged.total,
        "raw_logp": plain.log_prob(proposal.plain),
    }
    for name, x in numbers.items():
        getattr(outputs, name)[...] = x
    if state.track is not None:
        width = outputs.ids.shape[1]
        sums = state.track.sums.merged()
        logp = sums.log_prob(top.logits[...])
        outputs.probs[...] = jnp.exp(logp)[:, :width]
        outputs.ids[...] = jnp.where(logp > -INF, top.ids[...], -1)[:, :width]
        outputs.now[...] = jnp.exp(sums.log_prob(state.track.now))[:, :width]


def statistics(judge: str, operands: Operands) -> Statistics:
    """As `xla.statistics`; the entropy is exact."""
    axes = tuple(varying_axes(*jax.tree.leaves(operands)))
    count, vocab = operands.logits.shape
    tracks = 0 if operands.tracked is None else operands.tracked.shape[1]

    def readable(x: Array) -> Array:  # Mosaic knows bfloat16 and float32
        return x if x.dtype in (jnp.bfloat16, jnp.int32) else x.astype(jnp.float32)

    operands = jax.tree.map(lambda x: vary(readable(x), axes), operands)
    if tracks:
        assert operands.tracked is not None
        tracked = jnp.pad(operands.tracked, ((0, 0), (0, LANES - tracks)), constant_values=-1)
        operands = operands._replace(tracked=tracked)
    if operands.weight is not None:
        operands = operands._replace(weight=operands.weight[:, None])
    rows = next((size for size in (BLOCK_ROWS, 8) if size <= count), count)
    step = CHUNKS * LANES
    if vocab < step:
        wide = partial(jnp.pad, pad_width=((0, 0), (0, step - vocab)))
        logits, negative = jax.tree.map(wide, operands[:2])
        operands = operands._replace(logits=logits, negative=negative)
    columns = min(BLOCK_COLUMNS, vocab // step * step) or step
    like = jax.tree.leaves(operands)

    def spec(x: Array) -> pl.BlockSpec:
        if x is operands.logits or x is operands.negative:
            return pl.BlockSpec((rows, columns), lambda i, j: (i, j))
        return pl.BlockSpec((rows, x.shape[1]), lambda i, j: (i, 0))

    def result(width: int, dtype: Any) -> tuple[Any, pl.BlockSpec]:
        return out_shape((count, width), dtype, like), pl.BlockSpec((rows, width), lambda i, j: (i, 0))

    numbers = [result(1, dtype) for dtype in (jnp.int32, *[jnp.float32] * 4)]
    looks = [result(tracks, dtype) if tracks else (None, None) for dtype in (jnp.int32, *[jnp.float32] * 2)]
    shapes, specs = (Statistics(*x) for x in zip(*numbers, *looks))

    lanes = (rows, LANES)
    running = jax.eval_shape(partial(_start, lanes, bool(tracks)))
    scratch: list[Any] = [jax.tree.map(lambda x: pltpu.VMEM(x.shape, x.dtype), running), None, None]
    if tracks:
        top = Top(*(pltpu.VMEM(lanes, dtype) for dtype in (jnp.float32, jnp.int32)))
        scratch[1:] = top, pltpu.VMEM((rows, columns), jnp.float32)
    (found,) = pl.pallas_call(
        partial(_body, judge=judge, vocab=vocab),
        grid=(pl.cdiv(count, rows), pl.cdiv(vocab, columns)),
        in_specs=[jax.tree.map(spec, operands)],
        out_specs=[specs],
        out_shape=[shapes],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=50 * count * vocab,
            transcendentals=(3 if tracks else 2) * count * vocab,
            bytes_accessed=sum(x.nbytes for x in like) + sum(x.size * 4 for x in jax.tree.leaves(shapes)),
        ),
        name="denoising_step",
    )(operands)
    return Statistics(*(x[:, 0] for x in found[:5]), *found[5:])
