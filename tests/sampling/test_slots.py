"""The device side of the engine: columns, blocks and what must not depend on them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import params as params_lib
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.sampling import int8, prefixes, slots
from jaxrl_llm.sampling.autoregressive import prepare
from jaxrl_llm.sampling.logits import Sampling, sample

CFG = ModelConfig(
    family="gemma2",
    vocab_size=60,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=24,
    attention_softcap=20.0,
    window=4,
    layer_kinds=("local", "global"),
)
PARAMS = params_lib.init(jax.random.key(0), transformer.param_specs(CFG))
PARAMS["embed"] *= 20
PREPARED = prepare(PARAMS, CFG)
NONE = jnp.full(1, -1)
TOKENS = np.random.default_rng(0).integers(0, 60, (3, 24))


def read(counts, width=16, past=None, start=(0, 0, 0), **options) -> prefixes.Prefix:
    """`counts` tokens of each row of TOKENS, from `start` on."""
    tokens = np.zeros((3, width), np.int32)
    for row, (begin, count) in enumerate(zip(start, counts)):
        tokens[row, width - count :] = TOKENS[row, begin : begin + count]
    return prefixes.prefill(
        PREPARED, past, jnp.asarray(tokens), jnp.asarray(counts, jnp.int32), CFG, **options
    )


def make_slots(counts=(5, 11, 2), left=(8, 8, 8), columns=16) -> slots.Slots:
    """Three slots in blocks of 8, with rows of TOKENS as contexts."""
    out = slots.empty(CFG, 3, columns, 8, jnp.float32)
    for index, row in enumerate(prefixes.rows(read(counts))):
        out = put(out, row, index, left[index])
    return out


def put(out: slots.Slots, row: prefixes.Prefix, slot: int, left: int = 8) -> slots.Slots:
    sampling = Sampling(jnp.float32(1), jnp.float32(1), jnp.int32(0), jnp.float32(0))
    return slots.place(out, row, jnp.int32(slot), jnp.int32(left), jnp.int32(slot), sampling, ())


def draw(state: slots.Slots) -> tuple[slots.Slots, slots.Chunk]:
    return slots.decode(PREPARED, state, jax.random.key(1), NONE, CFG)


def assert_close(a: prefixes.Prefix, b: prefixes.Prefix) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_attention_over_blocks_is_softmax_attention():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 1, 4, 8))
    keys = [rng.normal(size=(2, 2, 8, 3)) for _ in range(3)]
    values = [rng.normal(size=(2, 2, 3, 8)) for _ in range(3)]
    masks = [rng.random((2, 3)) < 0.5 for _ in range(3)]
    masks[1][:] = False  # a whole block out of sight
    masks[2][:, 0] = True
    out = slots.attention_over_blocks(
        *(jnp.asarray(np.array(x), jnp.float32) for x in (q, keys, values)),
        jnp.asarray(np.array(masks)),
        scale=0.3,
        softcap=2.0,
    )
    k, v, mask = np.concatenate(keys, 3), np.concatenate(values, 2), np.concatenate(masks, 1)
    for row in range(2):
        for head in range(4):
            score = 2 * np.tanh(0.3 * q[row, 0, head] @ k[row, head // 2] / 2)
            weight = np.where(mask[row], np.exp(score), 0)
            expected = weight / weight.sum() @ v[row, head // 2]
            np.testing.assert_allclose(out[row, 0, head], expected, atol=1e-5)


def test_a_prefix_is_right_aligned_after_zeros_and_ends_in_the_trainers_state():
    prefix = read((5, 11, 16))
    hidden = transformer.forward(PARAMS, jnp.asarray(TOKENS[:, :16]), CFG)
    assert prefix.lengths.tolist() == [5, 11, 16] and prefix.columns == 16
    for row, n in enumerate((5, 11, 16)):
        np.testing.assert_allclose(prefix.hidden[row], hidden[row, n - 1], atol=1e-5)
        for layer in range(2):
            keys, values = prefix.keys[layer][row], prefix.values[layer][row]
            assert not keys[:, :, : 16 - n].any() and not values[:, : 16 - n].any()
            assert keys[:, :, 16 - n :].any(axis=1).all() and values[:, 16 - n :].any(axis=2).all()


def test_a_context_read_in_pieces_is_the_context_read_at_once():
    """Pieces of several lengths side by side, the past narrower and wider than it must be."""
    first, second = (5, 11, 1), (7, 1, 8)
    for columns in (11, 16):
        past = prefixes.trim(read(first), columns=columns)
        pieces = read(second, width=8, past=past, start=first)
        whole = prefixes.trim(read((12, 12, 9)), columns=columns + 8)
        assert_close(pieces, whole)


@pytest.mark.parametrize("steps", [1, 5, 8])
def test_what_a_slot_holds_after_a_chunk_is_what_its_tokens_would_be_read_to(steps):
    state, chunk = draw(make_slots(left=(steps, 8, 8)))
    assert chunk.counts.tolist() == [steps, 8, 8] and state.lengths.tolist() == [5 + steps, 19, 10]
    taken = prefixes.trim(slots.take(state, jnp.int32(0), jnp.int32(steps)), columns=16)
    tokens = np.zeros((3, 16), np.int32)
    context = [*TOKENS[0, :5], *chunk.tokens[0, :steps].tolist()]
    tokens[:, 16 - len(context) :] = context
    again = prefixes.prefill(PREPARED, None, jnp.asarray(tokens), jnp.full(3, len(context), jnp.int32), CFG)
    assert_close(taken, prefixes.rows(again)[0])
    assert not taken.keys[0][..., : 16 - len(context)].any()


def test_columns_before_a_context_change_no_bit():
    outs = []
    for before in (0, 1):
        state, first = draw(slots.with_blocks(make_slots(), before, 0))
        state = dataclasses.replace(state, left=jnp.full(3, 8, jnp.int32))
        _, second = draw(slots.with_blocks(state, 1 - 2 * before, 1))
        outs.append((first, second))
    assert all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, outs)))


def test_a_slot_leaves_nothing_to_its_next_row():
    """Not even NaN, neither before the context nor where the next chunk is written."""
    clean = draw(make_slots())[1]
    dirty = make_slots()
    dirty = dataclasses.replace(
        dirty, **jax.tree.map(lambda x: x * jnp.nan, {"keys": dirty.keys, "values": dirty.values})
    )
    for index, row in enumerate(prefixes.rows(read((5, 11, 2)))):
        dirty = put(dirty, row, index)
    again = draw(dirty)[1]
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(clean), jax.tree.leaves(again)))


def test_free_and_released_slots_draw_nothing():
    state = slots.release(make_slots(), jnp.array([False, True, False]))
    state, chunk = draw(dataclasses.replace(state, left=state.left.at[2].set(3)))
    assert chunk.counts.tolist() == [8, 0, 3]
    for x in chunk[:4]:
        assert not x[1].any() and not x[2, 3:].any()
    assert state.lengths.tolist() == [13, 11, 5] and state.left.tolist() == [0, 0, 0]


# --- int8


def test_int8_columns_are_right_to_half_a_step_and_zeros_stay_zeros():
    x = (
        jax.random.normal(jax.random.key(0), (3, 2, 8, 5))
        * jnp.array([1.0, 1e-4, 100.0])[:, None, None, None]
    )
    x = x.at[0, 0, :, 3].set(0.0)
    for axis in (2, 3):
        packed = int8.pack(x, axis)
        whole, unit = int8.unpack(packed, axis)
        steps = np.max(np.abs(x), axis=axis, keepdims=True) / 127
        np.testing.assert_allclose(unit, steps, rtol=1e-6)
        assert np.all(np.abs(whole * unit - x) <= 0.5001 * steps)
        assert packed.shape[axis] == x.shape[axis] + 4 and packed.nbytes == packed.size
    assert not int8.pack(x, 2)[0, 0, :, 3].any()
    assert np.isnan(jnp.multiply(*int8.unpack(int8.pack(x.at[0].set(jnp.nan), 2), 2))[0]).all()
    for whole, unit in (int8.unpack(x, 2), int8.unpack(x.astype(jnp.bfloat16), 3)):
        assert unit.size == 1 and unit == 1 and whole.shape == x.shape


def test_an_int8_cache_holds_what_floats_are_close_to():
    """Read at once, in pieces or written while decoding: each number is rounded once, and so attended."""
    counts = (5, 11, 2)
    rough, exact = read(counts, kv_dtype=jnp.int8), read(counts)
    assert 0 < np.abs(rough.hidden - exact.hidden).max() < 0.03 * np.abs(exact.hidden).max()
    state = slots.empty(CFG, 3, 16, 8, jnp.float32, kv_dtype=jnp.int8)
    for index, row in enumerate(prefixes.rows(rough)):
        state = put(state, row, index)
    state, chunk = draw(state)
    pieces = prefixes.prefill(PREPARED, rough, chunk.tokens, chunk.counts, CFG, kv_dtype=jnp.int8)
    for slot in range(3):
        written = prefixes.trim(slots.take(state, jnp.int32(slot), jnp.int32(8)), columns=24)
        read_again = prefixes.rows(pieces)[slot]
        np.testing.assert_allclose(written.hidden, read_again.hidden, atol=1e-4)
        for ours, theirs in zip(written.keys, read_again.keys):
            assert np.mean(ours[:, :, :8] != theirs[:, :, :8]) < 0.01  # but for ties


# --- truncation


@pytest.mark.parametrize("scale, top_p", [(1, 0.99), (8, 0.99999)])
def test_what_is_kept_of_a_row_does_not_depend_on_how_long_others_are_searched(scale, top_p):
    """At these thresholds a sum over the vocabulary is no more exact than a token is likely."""
    logits = scale * jax.random.normal(jax.random.key(4096), (8, 4096))
    uniform = jax.random.uniform(jax.random.key(1), (8,))

    def first(others_p, others_k):
        sampling = Sampling(
            temperature=jnp.ones(8).at[0].set(0.7),
            top_p=jnp.full(8, others_p).at[0].set(top_p),
            top_k=jnp.full(8, others_k).at[0].set(0),
            min_p=jnp.zeros(8),
        )
        return [x[0].item() for x in jax.jit(sample)(logits, sampling, uniform)]

    assert first(1.0, 0) == first(0.3, 1) == first(0.9999999, 0) == first(1.0, 1000)
