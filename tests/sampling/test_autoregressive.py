"""The sampler: what it draws, what it says of what it drew, and that the trainer agrees."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import params as params_lib
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.scoring import score
from jaxrl_llm.parallel.sharding import ShardingRules, make_mesh, shardings
from jaxrl_llm.sampling import autoregressive
from jaxrl_llm.sampling.autoregressive import generate, prepare
from jaxrl_llm.sampling.logits import Sampling, invert, sample, sampling_params
from jaxrl_llm.trajectory import Trajectories

TINY = ModelConfig(
    vocab_size=150,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
)
GEMMA = dataclasses.replace(
    TINY,
    family="gemma2",
    qk_norm=False,
    norm_plus_one=True,
    post_norms=True,
    embed_scale=True,
    attention_softcap=20.0,
    logit_softcap=10.0,
    window=4,
    layer_kinds=("local", "global"),
)
GREEDY_STOP = 7


@functools.cache
def make_params(cfg: ModelConfig, seed: int = 0):
    params = params_lib.init(jax.random.key(seed), transformer.param_specs(cfg))
    # the default embedding is so small that every distribution would be flat
    return params | {"embed": params["embed"] * 20}


def make_prompts(lengths=(3, 9, 1), width=12, vocab=150, seed=1):
    rng = np.random.default_rng(seed)
    tokens = np.zeros((len(lengths), width), np.int32)
    for row, n in enumerate(lengths):
        tokens[row, :n] = rng.integers(1, vocab, n)
    return tokens, np.array(lengths, np.int32)


def run(cfg=TINY, *, tokens=None, lengths=None, group=3, new=10, stop_ids=(), uids=None, seed=5, **options):
    if tokens is None:
        tokens, lengths = make_prompts(vocab=cfg.vocab_size)
    batch = len(tokens) * group
    return generate(
        prepare(make_params(cfg), cfg),
        cfg,
        tokens,
        lengths,
        num_generations=group,
        max_new_tokens=new,
        sampling=options.pop("sampling", None) or sampling_params(batch, **options.pop("params", {})),
        key=jax.random.key(seed),
        uids=np.arange(batch) if uids is None else uids,
        stop_ids=stop_ids,
        **options,
    )


score_jit = jax.jit(score, static_argnames="cfg")


def trainer_logp(t: Trajectories, cfg: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    params = make_params(cfg)
    tempered = score_jit(params, t.tokens, t.action_mask, cfg, temperature=t.temperature).logp - t.log_kept
    raw = score_jit(params, t.tokens, t.action_mask, cfg, temperature=jnp.ones_like(t.temperature)).logp
    return np.asarray(tempered), np.asarray(raw)


@pytest.mark.parametrize("cfg", [TINY, GEMMA], ids=["qwen3", "gemma2"])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": temperature} | truncation
        for temperature, truncation in itertools.product(
            (0.6, 1.0, 1.3), ({}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"top_p": 0.9, "top_k": 20})
        )
    ],
    ids=str,
)
def test_trainer_agrees_with_sampler(cfg, params):
    """On-policy identity: |ratio - 1| ≤ 1e-5 for every temperature and truncation, padded rows included."""
    t = run(cfg, params=params, stop_ids=(3, 4, 5))
    mask = np.asarray(t.action_mask)
    tempered, raw = trainer_logp(t, cfg)
    assert mask.sum() > 50
    assert np.max(np.abs(np.expm1(tempered - np.asarray(t.behaviour_logp))[mask])) <= 1e-5
    assert np.max(np.abs(raw - np.asarray(t.raw_logp))[mask]) <= 1e-5
    assert np.all(np.asarray(t.log_kept) <= 1e-6)
    if set(params) == {"temperature"}:
        assert np.all(np.asarray(t.log_kept) == 0)


def test_rows_are_left_aligned_prompt_then_completion():
    tokens, lengths = make_prompts()
    t = run(stop_ids=tuple(range(60)))
    group = np.asarray(t.group)
    assert group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    finished = np.asarray(t.finished)
    assert 0 < finished.sum() < 9 or finished.all()
    for row in range(9):
        n, total = lengths[group[row]], int(t.lengths[row])
        ids = np.asarray(t.tokens[row])
        assert ids[:n].tolist() == tokens[group[row], :n].tolist()
        assert np.flatnonzero(np.asarray(t.action_mask[row])).tolist() == list(range(n, total))
        assert np.all(ids[total:] == 0)
        completion = ids[n:total].tolist()
        stops = [i for i, token in enumerate(completion) if token < 60]
        # a sampled stop token counts and is the last one; a row without one ran into the limit
        assert stops == ([len(completion) - 1] if finished[row] else [])
        assert finished[row] or len(completion) == 10


def test_a_row_does_not_depend_on_its_neighbours():
    """Rows permuted inside one compiled shape are bit-identical: keys go by uid, not by slot."""
    tokens, lengths = make_prompts((3, 9, 1, 6))
    first = run(tokens=tokens, lengths=lengths, group=1, uids=np.array([10, 11, 12, 13]))
    order = np.array([2, 0, 3, 1])
    second = run(
        tokens=tokens[order], lengths=lengths[order], group=1, uids=np.array([10, 11, 12, 13])[order]
    )
    for name in ("tokens", "behaviour_logp", "raw_logp", "lengths"):
        assert np.array_equal(np.asarray(getattr(first, name))[order], np.asarray(getattr(second, name))), (
            name
        )


def test_garbage_after_a_prompt_changes_nothing():
    tokens, lengths = make_prompts()
    dirty = tokens.copy()
    for row, n in enumerate(lengths):
        dirty[row, n:] = 99
    a, b = run(), run(tokens=dirty, lengths=lengths)
    assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.behaviour_logp, b.behaviour_logp)


def test_growing_cache_width_and_chunks_change_nothing():
    tokens, lengths = make_prompts()
    whole = run(tokens=tokens, lengths=lengths, new=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoregressive, "rooms", lambda most: [8, 16, most])
        pieces = run(tokens=tokens, lengths=lengths, new=40, find_stop=lambda ids: None, check_every=5)
    assert np.array_equal(whole.tokens, pieces.tokens)
    np.testing.assert_allclose(whole.behaviour_logp, pieces.behaviour_logp, atol=1e-5)


def test_a_mesh_draws_what_one_device_draws_and_shares_out_the_cache():
    tokens, lengths = make_prompts((3, 9, 1, 12))
    alone = run(tokens=tokens, lengths=lengths)
    rules, specs = ShardingRules(vocab=None), transformer.param_specs(TINY)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(make_params(TINY), shardings(specs, mesh, rules))
        prepared = prepare(placed, TINY)
        spread = generate(
            prepared,
            TINY,
            tokens,
            lengths,
            num_generations=3,
            max_new_tokens=10,
            sampling=sampling_params(12),
            key=jax.random.key(5),
            uids=np.arange(12),
            stop_ids=(),
            rules=rules,
        )
        state = autoregressive.prefill(
            prepared,
            *(jax.device_put(x, rules.spec(("batch",))) for x in (tokens, lengths)),
            TINY,
            num_generations=3,
            max_new_tokens=10,
            room=10,
            rules=rules,
        )
    assert np.array_equal(alone.tokens, spread.tokens)
    np.testing.assert_allclose(alone.behaviour_logp, spread.behaviour_logp, atol=1e-5)
    for cache in (*state.prompt_keys, *state.prompt_values, *state.keys, *state.values):
        assert cache.addressable_shards[0].data.size == cache.size // 8


def test_stop_string_cuts_the_row_where_it_appears():
    plain = run(new=20)
    start = int(plain.lengths[0]) - 20
    marker = np.asarray(plain.tokens[0, start + 5 : start + 7]).tolist()

    def find(ids):
        ids = ids.tolist()
        return next((i + 2 for i in range(len(ids) - 1) if ids[i : i + 2] == marker), None)

    t = run(new=20, find_stop=find, check_every=8)
    assert bool(t.finished[0]) and int(t.lengths[0]) == start + find(np.asarray(plain.tokens[0, start:]))
    for row in range(9):  # what is kept is what would have been drawn anyway
        n = int(t.lengths[row])
        assert np.array_equal(t.tokens[row, :n], plain.tokens[row, :n])
        assert not np.any(np.asarray(t.tokens[row, n:])) and not np.any(np.asarray(t.behaviour_logp[row, n:]))


def test_greedy_follows_the_argmax():
    cfg = TINY
    t = run(cfg, params={"temperature": 0.0}, group=1)
    logits = transformer.logits(make_params(cfg), transformer.forward(make_params(cfg), t.tokens, cfg), cfg)
    best = np.asarray(jnp.argmax(logits, axis=-1))
    mask = np.asarray(t.action_mask)
    assert np.array_equal(np.asarray(t.tokens)[:, 1:][mask[:, 1:]], best[:, :-1][mask[:, 1:]])


def test_nothing_is_traced_twice():
    """New temperatures, truncations, prompt lengths inside the bucket and seeds reuse what is compiled."""
    tokens, lengths = make_prompts()
    run(tokens=tokens, lengths=lengths)
    before = (autoregressive.prefill._cache_size(), autoregressive.decode._cache_size())
    for seed, params in enumerate(({"temperature": 0.7}, {"top_p": 0.5}, {"top_k": 3, "min_p": 0.2})):
        run(tokens=tokens, lengths=np.maximum(lengths - seed, 1), params=params, seed=seed)
    assert (autoregressive.prefill._cache_size(), autoregressive.decode._cache_size()) == before


def test_bad_input():
    tokens, _ = make_prompts()
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        run(tokens=tokens, lengths=np.array([3, 0, 1]))
    with pytest.raises(ValueError, match="need 9 uids"):
        run(uids=np.arange(4))
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"min_p": 2.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            sampling_params(2, **bad)


# --- the distribution drawn from, by an independent sort-based oracle


def oracle(logits: np.ndarray, temperature, top_p, top_k, min_p) -> np.ndarray:
    z = logits.astype(np.float64) / temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    keep = np.ones(len(p), bool)
    if top_k:
        keep &= p >= p[order[top_k - 1]]
    if top_p < 1:
        q = np.where(keep, p, 0) / p[keep].sum()
        before = np.concatenate([[0.0], np.cumsum(q[order])[:-1]])
        inside = np.zeros(len(p), bool)
        inside[order] = before < top_p
        keep &= inside
    keep &= p >= min_p * p.max()
    return np.where(keep, p, 0) / p[keep].sum()


@pytest.mark.parametrize("vocab", [5, 150, 1000])
@pytest.mark.parametrize(
    "options",
    [(1.0, 1.0, 0, 0.0), (0.6, 0.9, 0, 0.0), (1.3, 1.0, 3, 0.0), (1.0, 1.0, 0, 0.2), (0.8, 0.7, 4, 0.05)],
)
def test_kept_set_and_mass_equal_the_sorted_oracle(vocab, options):
    temperature, top_p, top_k, min_p = options
    rows = 64
    logits = 3 * jax.random.normal(jax.random.key(vocab), (rows, vocab))
    sampling = sampling_params(rows, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    uniform = (np.arange(rows) + 0.5) / rows
    drawn = sample(logits, sampling, jnp.asarray(uniform, jnp.float32))
    for row in range(rows):
        p = oracle(np.asarray(logits[row]), temperature, top_p, top_k, min_p)
        token = int(drawn.token[row])
        assert p[token] > 0
        assert abs(float(drawn.behaviour_logp[row]) - np.log(p[token])) < 2e-5
        full = oracle(np.asarray(logits[row]), temperature, 1.0, 0, 0.0)
        assert abs(float(drawn.log_kept[row]) - np.log(full[p > 0].sum())) < 2e-5


def test_draws_follow_the_distribution_exactly():
    """A fine grid of uniforms visits every token in proportion to its probability (enumeration, no luck)."""
    logits = 2 * jax.random.normal(jax.random.key(0), (1, 300))
    grid = 20_000
    weights = jnp.exp(logits - logits.max())
    folded = jnp.pad(weights, ((0, 0), (0, 20))).reshape(1, 20, 16)
    tokens = jax.vmap(lambda u: invert(folded, u[None])[0])((jnp.arange(grid) + 0.5) / grid)
    counts = np.bincount(np.asarray(tokens), minlength=320)
    expected = np.concatenate([np.asarray(weights[0] / weights.sum()), np.zeros(20)])
    assert np.max(np.abs(counts / grid - expected)) < 2 / grid + 1e-5


def test_extreme_uniforms_never_leave_the_kept_set():
    logits = jnp.where(jnp.arange(130) == 57, 5.0, -1e9)[None].repeat(3, axis=0)
    drawn = sample(
        logits, sampling_params(3), jnp.array([0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))])
    )
    assert drawn.token.tolist() == [57, 57, 57]


def test_parameters_differ_by_row():
    logits = jnp.tile(jnp.array([[2.0, 1.0, 0.0, -1.0]]), (3, 1))
    sampling = Sampling(
        temperature=jnp.array([0.0, 1.0, 1.0]),
        top_p=jnp.array([1.0, 1.0, 0.6]),
        top_k=jnp.array([0, 2, 0]),
        min_p=jnp.zeros(3),
    )
    drawn = sample(logits, sampling, jnp.array([0.99, 0.99, 0.99]))
    # greedy; the second of two kept; 0.64 of the mass lies on the first, which is enough for 0.6
    assert drawn.token.tolist() == [0, 1, 0]
    np.testing.assert_allclose(drawn.behaviour_logp, [0, np.log(1 / (1 + np.e)), 0], atol=1e-6)


def test_lookups_in_a_loop_make_no_copy_of_a_table_in_bfloat16():
    cfg = dataclasses.replace(TINY, vocab_size=4096)
    table = jax.random.normal(jax.random.key(0), (4096, 32)).astype(jnp.bfloat16)
    prepared = {"embed": table, "final_norm": jnp.ones(32, jnp.bfloat16)}

    def embeddings(prepared, tokens):
        def step(index, out):
            return out.at[index].set(autoregressive.lookup(prepared, tokens[index], cfg))

        return jax.lax.fori_loop(0, 3, step, jnp.zeros((3, 2, 1, 32), jnp.bfloat16))

    tokens = jnp.array([[0, 5], [4095, 9], [7, 7]])
    compiled = jax.jit(embeddings).lower(prepared, tokens).compile()
    np.testing.assert_array_equal(compiled(prepared, tokens)[:, :, 0], table[tokens])
    assert compiled.memory_analysis().temp_size_in_bytes < table.nbytes / 10
