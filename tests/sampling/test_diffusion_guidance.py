"""The parts of guidance and of the search for informative tokens, against loops and closed forms."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_oracle import dream_share
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_denoiser import LENGTHS, MASK, PARAMS, PROMPTS, head, states

from jaxrl_kernels.denoising_step import contrast, jensen_shannon
from jaxrl_llm.sampling import diffusion_options, diffusion_predict, enumerated, information
from jaxrl_llm.sampling.diffusion import decode
from jaxrl_llm.sampling.diffusion_commit import even_quota, ranks
from jaxrl_llm.sampling.diffusion_options import Method, grid_shares
from jaxrl_llm.sampling.diffusion_state import Denoiser, place, states_at
from jaxrl_llm.sampling.guidance import highest, share_down, share_up

rng = np.random.default_rng(0)


def test_contrast():
    """One formula: off at w = 0, blind to constants per position, linear in w with the contrast as slope."""
    plain, negative = (jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32) for _ in range(2))
    w = np.array([0.7, 1.5], np.float32)[:, None, None]
    out = contrast(plain, negative, w)
    llada = np.asarray(negative) + (w + 1) * (np.asarray(plain) - np.asarray(negative))
    np.testing.assert_allclose(out, llada, atol=1e-5)
    assert np.array_equal(contrast(plain, plain, w), plain)
    assert np.array_equal(contrast(plain, negative * jnp.nan, 0 * w), plain)
    shift = jnp.asarray(rng.normal(size=(2, 3, 1)), jnp.float32)
    moved = contrast(plain + shift, negative + 3 * shift, w)
    np.testing.assert_allclose(jax.nn.softmax(moved), jax.nn.softmax(out), atol=1e-5)
    slope = jax.jacfwd(lambda w: contrast(plain, negative, w))(jnp.float32(0.3))
    np.testing.assert_allclose(slope, plain - negative, atol=1e-6)


@pytest.mark.parametrize("guidance", ["prompt", "low_confidence"])
def test_members_of_the_family_differ_only_in_what_they_hide(guidance, monkeypatch):
    """FoCore told to hide what another member hides is that member."""

    def run(**options):
        # a denoiser of its own, so that nothing compiled before the patch is used
        denoiser = Denoiser(lambda *args: states(*args), head, MASK)
        method = Method(8, **options)
        numbers = diffusion_options.settings(method, 4, guidance_weight=1.5)
        key, uids = jax.random.key(0), jnp.arange(4)
        return decode(denoiser, PARAMS, PROMPTS, LENGTHS, method, numbers, key=key, uids=uids)

    def as_asked(inputs, state, masked, method):
        if guidance == "prompt":
            return masked  # masks are hidden already
        positions = jnp.tile(jnp.arange(8), (4, 1))
        canvas = place(inputs.prompts, inputs.lengths, state.decoded.tokens)
        out = states_at(inputs, canvas, positions, Denoiser(states, head, MASK))
        return diffusion_predict._unsure(head(inputs.params, out), positions, masked, inputs.settings)

    own = run(guidance=guidance)
    monkeypatch.setattr(diffusion_predict, "_informative", as_asked)
    negative_prompt = "mask" if guidance == "prompt" else "keep"
    focore = run(guidance="high_information", detector="early", negative_prompt=negative_prompt)
    for name in ("tokens", "commit_step", "steps", "nfe", "raw_logp"):
        assert np.array_equal(getattr(own, name), getattr(focore, name)), name


def test_counts_and_ranks():
    count = jnp.arange(12)
    for share in (0.0, 0.1, 0.3, 0.5, 1.0):
        up = [min(max(1, math.ceil(round(share * n, 6))), n) for n in range(12)]
        down = [min(max(1, int(round(share * n, 6))), n) for n in range(12)]
        assert share_up(count, jnp.float32(share)).tolist() == up
        assert share_down(count, jnp.float32(share)).tolist() == down
    scores = jnp.array([[0.5, -jnp.inf, 2.0, 0.5, 2.0]])
    assert ranks(scores).tolist() == [[2, 4, 0, 3, 1]]
    among = jnp.array([[True, True, False, True, True]])
    assert highest(scores, among, jnp.array([2])).tolist() == [[True, False, False, False, True]]
    assert highest(scores, among, jnp.array([9])).tolist() == [[True, False, False, True, True]]


@given(masks=st.integers(1, 300), steps=st.integers(1, 300))
@settings(max_examples=50, deadline=None)
def test_quotas_commit_every_mask(masks, steps):
    even = [int(masks // steps) + (i < masks % steps) for i in range(steps)]
    ours = even_quota(np.int32(masks), np.arange(steps, dtype=np.int32), np.int32(steps))
    assert ours.tolist() == even and sum(even) == masks
    shares = grid_shares(steps, 1e-3, steps)
    assert shares.tolist() == [dream_share(i, steps) for i in range(steps)]
    left = masks
    for share in shares:
        left -= int(np.float32(left) * share)
    assert left == 0


def test_the_grid_of_256_tokens_in_128_steps():
    left, counts = 256, []
    for share in grid_shares(128, 1e-3, 128):
        counts.append(int(np.float32(left) * share))
        left -= counts[-1]
    assert counts[:4] == [1, 2, 2, 2] and counts[-1] == 3 and sum(counts) == 256


def test_jensen_shannon():
    """Exact with all tokens or with their rest in one bucket; never more than over all tokens."""
    p, q = rng.dirichlet(np.ones(6), size=(2, 50))
    middle = (p + q) / 2
    exact = ((p * np.log(p / middle)).sum(1) + (q * np.log(q / middle)).sum(1)) / 2
    full = jensen_shannon(jnp.asarray(p), jnp.asarray(q))
    np.testing.assert_allclose(full, exact, atol=1e-6)
    part = jensen_shannon(jnp.asarray(p[:, :3]), jnp.asarray(q[:, :3]))
    assert np.all(part <= exact + 1e-6) and np.all(part >= 0) and part.max() > 0.05
    np.testing.assert_allclose(part, jensen_shannon(jnp.asarray(q[:, :3]), jnp.asarray(p[:, :3])), atol=1e-7)
    ends = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(jensen_shannon(ends, ends[::-1]), math.log(2), rtol=1e-6)
    assert jensen_shannon(ends, ends).tolist() == [0.0, 0.0]


def test_memory_of_predictions():
    """Three looks at one masked and one committed position: changes, the peak, and how long they hold."""
    probs = np.array([[[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], [[0.2, 0.7, 0.1], [0.1, 0.8, 0.1]]])
    memory = information.blank_memory(1, 2, 2)
    masked = jnp.array([[True, False]])
    seen = []
    for step in (0, 1, 1):
        logits = jnp.log(jnp.asarray(probs[step]))[None]
        memory = information.look(memory, logits, masked, jnp.array([[-1]]))
        seen.append(memory)
    js = float(jensen_shannon(jnp.asarray(probs[0, 0]), jnp.asarray(probs[1, 0])))
    changes = np.array([m.change[0] for m in seen])
    np.testing.assert_allclose(changes, [[math.log(2)] * 2, [js, 0], [0, 0]], atol=1e-6)
    np.testing.assert_allclose([m.peak[0] for m in seen], [[0, 0], [js, 0], [js, 0]], atol=1e-6)
    assert [m.stable[0].tolist() for m in seen] == [[1, 1], [1, 2], [2, 3]]
    assert memory.ids[0].tolist() == [[1, 0], [1, 0]]


@given(st.lists(st.integers(-1, 6), min_size=7, max_size=7), st.integers(1, 8), st.integers(0, 8))
@settings(max_examples=30, deadline=None)
def test_earliness_and_windows(steps, radius, window):
    commit_step, t = np.array(steps), 7
    ours = information.earliness(jnp.array([steps]), jnp.array([t]), jnp.array([radius]))[0]
    when = np.where(commit_step < 0, t + 1, commit_step)
    for j in range(7):
        near = [when[i] for i in range(7) if 0 < abs(i - j) <= radius]
        assert float(ours[j]) == pytest.approx(np.mean(near) - when[j], abs=1e-5)
    committed = commit_step >= 0
    masked = ~committed & (np.arange(7) >= 2)  # of a block that begins at 2
    centres = [*np.flatnonzero(committed), *np.flatnonzero(masked)[:1]]
    if centres:
        near = information.near_committed(jnp.array([committed]), jnp.array([masked]), jnp.array([window]))
        assert near[0].tolist() == [min(abs(j - c) for c in centres) <= window for j in range(7)]


def test_influence_is_what_a_token_tells_about_the_others():
    """Of three tokens the first decides the last and the second is noise."""
    sequences = np.array([(a, b, a) for a, b in itertools.product(range(2), repeat=2)], np.int32)
    corpus = enumerated.Corpus(sequences, np.array([0.45, 0.45, 0.05, 0.05]), 2)
    denoiser = enumerated.denoiser(2)

    def logits_of(response):
        batch = len(response)
        columns, lengths = jnp.tile(jnp.arange(3), (batch, 1)), jnp.full(batch, 3)
        return denoiser.states(corpus.params, response, lengths, columns)

    scores = information.influence(logits_of, jnp.array([[1, 0, 2], [0, 2, 2]]), mask_id=2)
    np.testing.assert_allclose(scores, [[math.log(1 / 0.1), 0, 0], [math.log(1 / 0.9) / 2, 0, 0]], atol=1e-5)
