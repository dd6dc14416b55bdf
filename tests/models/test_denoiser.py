"""Masked-diffusion LMs: what each position sees, which state predicts it, and who refuses such a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import transformer
from jaxrl_llm.models.attention import attention
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.denoiser import denoise, predictors, states
from jaxrl_llm.models.params import init
from jaxrl_llm.models.scoring import score, score_groups
from jaxrl_llm.rollouts.engine import Engine
from jaxrl_llm.sampling import autoregressive, prefixes
from jaxrl_llm.sampling.logits import Sampling
from jaxrl_llm.sampling.search import beam_search

CFG = ModelConfig(
    family="llada",
    vocab_size=23,
    hidden_size=16,
    num_heads=4,
    head_dim=4,
    intermediate_size=24,
    qk_norm=False,
    tied_head=False,
    causal=False,
    mask_id=22,
)
SHIFTED = dataclasses.replace(CFG, family="Dream", logits_shift=1)
CAUSAL = dataclasses.replace(CFG, family="llama", causal=True, mask_id=None)
PARAMS = init(jax.random.key(0), transformer.param_specs(CFG))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 23, (2, 9)), jnp.int32)
jitted = jax.jit(denoise, static_argnames=("cfg", "dtype"))


def raw_logits(tokens):
    """Of each output, at its own place."""
    return np.asarray(jitted(PARAMS, tokens, CFG))


def test_every_token_sees_the_whole_row_and_nothing_of_others():
    tokens = TOKENS.at[0, 4].set((TOKENS[0, 4] + 1) % 23)
    before, after = raw_logits(TOKENS), raw_logits(tokens)
    changed = np.abs(after - before).max(axis=-1) > 1e-5
    assert changed[0].all() and not changed[1].any()
    causal = transformer.forward(PARAMS, TOKENS, CAUSAL)
    both = transformer.forward(PARAMS, TOKENS, CFG)
    assert np.abs(causal - both).max(axis=-1).min() > 1e-4  # even the last token's keys have looked ahead


@pytest.mark.parametrize("cfg", [CFG, SHIFTED], ids=["llada", "dream"])
def test_padding_and_neighbours_in_a_packed_row_are_not_seen(cfg):
    """A row of 5 tokens and one of 4: alone, padded with anything, and packed into one row."""
    alone = [np.asarray(jitted(PARAMS, TOKENS[i : i + 1, :n], cfg)) for i, n in ((0, 5), (1, 4))]
    padded = TOKENS.at[0, 5:].set(7).at[1, 4:].set(7)
    lengths = jnp.array([[5], [4]])
    real = (jnp.arange(9) < lengths).astype(jnp.int32)
    one = np.asarray(jitted(PARAMS, padded, cfg, segment_ids=real))
    other = np.asarray(jitted(PARAMS, jnp.where(real == 1, padded, 22), cfg, segment_ids=real))
    np.testing.assert_array_equal(one[real == 1], other[real == 1])
    packed = jnp.concatenate([TOKENS[:1, :5], TOKENS[1:, :4]], axis=1)
    segments = jnp.array([[1] * 5 + [2] * 4])
    positions = jnp.array([[*range(5), *range(4)]])
    both = np.asarray(jitted(PARAMS, packed, cfg, segment_ids=segments, positions=positions))[0]
    for row, (expected, part) in enumerate(zip(alone, (both[:5], both[5:]))):
        np.testing.assert_allclose(one[row, : expected.shape[1]], expected[0], atol=2e-5)
        np.testing.assert_allclose(part, expected[0], atol=2e-5)


def test_a_shifted_model_predicts_from_the_output_before():
    raw, shifted = raw_logits(TOKENS), np.asarray(jitted(PARAMS, TOKENS, SHIFTED))
    np.testing.assert_allclose(shifted[:, 1:], raw[:, :-1], atol=2e-5)
    np.testing.assert_allclose(shifted[:, 0], raw[:, 0], atol=2e-5)
    # packed: the first token of the second sequence has nothing before it either
    positions = jnp.array([[0, 1, 2, 0, 1]])
    columns = jnp.array([[4, 3, 3, 0, 2]])
    assert predictors(SHIFTED, columns, positions).tolist() == [[3, 3, 3, 0, 1]]
    assert predictors(SHIFTED, columns).tolist() == [[3, 2, 2, 0, 1]]
    assert predictors(CFG, columns, positions) is columns


@pytest.mark.parametrize("cfg", [CFG, SHIFTED], ids=["llada", "dream"])
def test_wanted_columns_alone(cfg):
    whole = np.asarray(jitted(PARAMS, TOKENS, cfg))
    columns = np.array([[8, 0, 3], [1, 1, 5]])
    some = jitted(PARAMS, TOKENS, cfg, columns=jnp.asarray(columns))
    np.testing.assert_allclose(some, np.take_along_axis(whole, columns[:, :, None], axis=1), atol=2e-5)
    lowered = jax.jit(denoise, static_argnames="cfg").lower(PARAMS, TOKENS, cfg, columns=jnp.asarray(columns))
    assert "2x3x23x" in lowered.as_text() and "2x9x23x" not in lowered.as_text()


def test_unrolled_and_fused_layers_give_the_same():
    prepared = autoregressive.prepare(PARAMS, CFG)
    assert isinstance(prepared["layers"], tuple)
    np.testing.assert_allclose(jitted(prepared, TOKENS, CFG), raw_logits(TOKENS), atol=2e-5)


def test_a_window_of_the_row_against_cached_keys():
    """What a block cache needs of `block`: rotated keys and values of the row, some of them written anew."""
    layer = jax.tree.map(lambda x: x[0], PARAMS["layers"])
    x = transformer.embed(PARAMS, TOKENS, CFG)
    (rope,) = transformer.rope_tables(CFG, jnp.arange(9)[None]).values()
    cache = []

    def attend(q, k, v):
        if cache:
            k, v = (old.at[:, 3:6].set(new) for old, new in zip(cache, (k, v)))
        cache[:] = k, v
        mask = jnp.ones((1, 1, q.shape[1], k.shape[1]), bool)
        return attention(q, k, v, mask, scale=transformer.score_scale(CFG), softcap=None)

    transformer.block(layer, x, CFG, rope, attend)
    x = x.at[:, 3:6].multiply(-0.5)
    window = transformer.block(layer, x[:, 3:6], CFG, jax.tree.map(lambda t: t[:, 3:6], rope), attend)
    cache.clear()
    whole = transformer.block(layer, x, CFG, rope, attend)
    np.testing.assert_allclose(window, whole[:, 3:6], atol=1e-5)


def test_compute_dtype():
    low = jitted(PARAMS, TOKENS, CFG, dtype=jnp.bfloat16)
    assert low.dtype == jnp.float32 and states(PARAMS, TOKENS, CFG, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert 0 < np.abs(low - raw_logits(TOKENS)).max() < 0.1


def causal_users():
    """By name: what needs each token to follow from those before it."""
    mask, lengths = jnp.ones((2, 9), bool), np.array([9, 9])
    sampling = Sampling(jnp.ones(2), jnp.ones(2), jnp.zeros(2, jnp.int32), jnp.zeros(2))
    prepared = autoregressive.prepare(PARAMS, CFG)
    group = dict(group_size=2, max_prompt_length=4, max_completion_length=4)
    generate = dict(num_generations=1, max_new_tokens=2, sampling=sampling, uids=np.arange(2), stop_ids=())
    key = jax.random.key(0)
    tokens = np.asarray(TOKENS)
    return {
        "score": lambda: score(PARAMS, TOKENS, mask, CFG),
        "score_groups": lambda: score_groups(PARAMS, TOKENS, mask, CFG, **group),
        "generate": lambda: autoregressive.generate(prepared, CFG, tokens, lengths, key=key, **generate),
        "prefill": lambda: prefixes.prefill(prepared, None, TOKENS, jnp.asarray(lengths), CFG),
        "engine": lambda: Engine(prepared, CFG, slots=1, max_length=16, key=key),
        "beam_search": lambda: beam_search(prepared, CFG, tokens, lengths, beams=2, max_new_tokens=2),
    }


@pytest.mark.parametrize("name", causal_users())
def test_causal_users_refuse_a_bidirectional_model(name):
    with pytest.raises(ValueError, match=r"needs a causal model; .*'llada', causal=False"):
        causal_users()[name]()


def test_denoising_refuses_a_causal_model_and_one_without_a_mask_token():
    with pytest.raises(ValueError, match=r"denoising needs a masked-diffusion model .*'llama'"):
        denoise(PARAMS, TOKENS, CAUSAL)
    with pytest.raises(ValueError, match="denoising needs a mask token"):
        denoise(PARAMS, TOKENS, dataclasses.replace(CFG, mask_id=None))


IMPOSSIBLE = {
    "causal": (dict(causal=True), "mask_id=22 and logits_shift=0 .* set causal=False"),
    "window": (dict(window=4, layer_kinds=("local", "global")), "causal=False takes no local layers"),
    "mask": (dict(mask_id=23), "mask_id=23 is outside the vocabulary of 23"),
    "shift": (dict(logits_shift=2), "logits_shift=2 must be 0 or 1"),
}


@pytest.mark.parametrize("changes,message", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_config_that_makes_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, **changes)
