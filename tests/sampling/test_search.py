"""Searches against enumeration of all sequences and against plain ones that run the whole model each time."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_search import (
    CFG,
    END,
    LENGTHS,
    PROMPTS,
    STEPS,
    TOKENS,
    V,
    assert_same,
    found_rows,
    logp,
    make_params,
    next_logp,
    prepared,
)

from jaxrl_llm.sampling import search
from jaxrl_llm.sampling.autoregressive import prepare
from jaxrl_llm.sampling.sage import sage
from jaxrl_llm.sampling.search import beam_search, best_of_n, tsearch

# --- best of n


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([-2.0, 0.5, 1.0, float("nan")]), min_size=6, max_size=6), st.integers(1, 3))
def test_best_of_n_sorts_each_group(scores, count):
    rows = best_of_n(jnp.array(scores), 3, count=count).tolist()
    for first in (0, 3):
        group = range(first, first + 3)
        expected = sorted(group, key=lambda i: (np.isnan(scores[i]), -np.nan_to_num(scores[i]), i))
        assert rows[first // 3 * count :][:count] == expected[:count]


# --- beam search


def every_sequence(most: int, stop_ids) -> list[tuple[int, ...]]:
    """All that end with a stop token within `most` tokens, or have that many without one."""
    plain = [t for t in range(V) if t not in stop_ids]
    out = list(itertools.product(plain, repeat=most))
    for n in range(most):
        out += [(*body, stop) for body in itertools.product(plain, repeat=n) for stop in stop_ids]
    return out


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 0.6, -0.5])
def test_as_many_beams_as_sequences_find_the_best_of_all(length_penalty):
    stop_ids, most = (END, 0), 3
    found = beam_search(
        prepared(),
        CFG,
        TOKENS,
        LENGTHS,
        beams=V**most,
        max_new_tokens=most,
        stop_ids=stop_ids,
        num_return=6,
        length_penalty=length_penalty,
    )
    expected = []
    for prompt in PROMPTS:
        scored = [
            (s, logp(prompt, s).sum() / len(s) ** length_penalty, s[-1] in stop_ids)
            for s in every_sequence(most, stop_ids)
        ]
        expected.append(sorted(scored, key=lambda x: -x[1])[:6])
    assert_same(found, expected)


def plain_beam_search(prompt, beams, most, stop_ids, count, penalty):
    """To the limit, without an early end."""
    alive, found = [((), 0.0)], []
    for _ in range(most):
        pool = [((*s, t), v + next_logp(prompt + s)[t]) for s, v in alive for t in range(V)]
        pool.sort(key=lambda x: -x[1])
        found += [(s, v / len(s) ** penalty, True) for s, v in pool[:beams] if s[-1] in stop_ids]
        alive = [(s, v) for s, v in pool if s[-1] not in stop_ids][:beams]
    found += [(s, v / len(s) ** penalty, False) for s, v in alive]
    return sorted(found, key=lambda x: -x[1])[:count]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 1.5])
def test_beam_search_is_the_plain_one(beams, penalty):
    """Stopping early loses nothing, and beams that change places keep their pasts."""
    found = beam_search(
        prepared(),
        CFG,
        TOKENS,
        LENGTHS,
        beams=beams,
        max_new_tokens=7,
        stop_ids=(END,),
        num_return=3,
        length_penalty=penalty,
    )
    expected = [plain_beam_search(p, beams, 7, (END,), 3, penalty) for p in PROMPTS]
    for rows in expected:
        rows += [((), -np.inf, False)] * (3 - len(rows))
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("penalty", "best", "score"),
    [
        # a beam that is far behind at first, and sure of every further token
        (1.0, (0,) * 7, (np.log(0.12) + 6 * np.log(0.95)) / 7),
        # one that is ahead, and would fall behind if it went on
        (-0.5, (0, END), (np.log(0.6) + np.log(0.95)) * np.sqrt(2)),
    ],
)
def test_the_search_does_not_end_while_something_better_can_come(penalty, best, score):
    """A model whose next token depends on the last alone, so that its log-probs are a table."""
    table = np.full((V, V), -9.0)
    if penalty > 0:
        table[2] = np.log([0.12, 0.12, 0.12, 0.12, 0.12, 0.4])
        table[0] = np.log([0.95, 0.01, 0.01, 0.01, 0.01, 0.01])
    else:
        table[2] = np.log([0.6, 0.025, 0.025, 0.025, 0.025, 0.3])
        table[0] = np.log([0.01, 0.01, 0.01, 0.01, 0.01, 0.95])
    table[[1, 3, 4, 5]] = np.log(1 / V)
    layers = jax.tree.map(jnp.zeros_like, make_params()["layers"])
    eye = jnp.eye(V, 16)  # an embedding comes out of the last norm 4 times as long, for 16 dimensions
    params = make_params() | {"layers": layers, "embed": eye, "head": jnp.pad(table.T / 4, ((0, 0), (0, 10)))}
    found = beam_search(
        prepare(params, CFG),
        CFG,
        TOKENS,
        LENGTHS,
        beams=3,
        max_new_tokens=7,
        stop_ids=(END,),
        length_penalty=penalty,
    )
    sequence, value, _ = found_rows(found, 2)[0]
    assert sequence == best and abs(value - score) < 1e-4


def test_one_beam_is_greedy():
    found = beam_search(
        prepared(), CFG, TOKENS, LENGTHS, beams=1, max_new_tokens=7, stop_ids=(END,), num_return=3
    )
    for row, prompt in enumerate(PROMPTS):
        own: tuple[int, ...] = ()
        while len(own) < 7 and END not in own:
            own += (int(np.argmax(next_logp(prompt + own))),)
        assert found_rows(found, row)[0][0] == own


# --- TSearch


def plain_tsearch(prompt, beams, count, most, admit):
    """By the words of the algorithm, with lists."""
    alive, complete = [()], []

    def phi(s):
        return logp(prompt, s).mean()

    for _ in range(most - 1):
        expansions = []
        for s in alive:
            p = next_logp(prompt + s)
            expansions += [(*s, int(t)) for t in np.argsort(-p)[: 2 * beams]]
        expansions.sort(key=lambda s: -phi(s))
        kept = expansions[:beams] if admit == "kept" else expansions
        complete += [s for s in kept if s[-1] == END]
        alive = [s for s in expansions if s[-1] != END][:beams]
        if len(complete) >= count:
            break
    complete = sorted(((s, phi(s), True) for s in complete), key=lambda x: -x[1])[:count]
    if len(complete) < count:
        closed = sorted(((s, phi(s), False) for s in ((*s, END) for s in alive)), key=lambda x: -x[1])
        complete += closed[: count - len(complete)]
    return sorted(complete, key=lambda x: -x[1])


@pytest.mark.parametrize(
    ("beams", "count", "most", "admit"),
    [(2, 2, 8, "kept"), (2, 2, 8, "expanded"), (3, 4, 5, "expanded")],
)
def test_tsearch_is_the_plain_one(beams, count, most, admit):
    found = tsearch(
        prepared(),
        CFG,
        TOKENS,
        LENGTHS,
        beams=beams,
        num_return=count,
        max_new_tokens=most,
        end_id=END,
        admit=admit,
    )
    expected = [plain_tsearch(p, beams, count, most, admit) for p in PROMPTS]
    for rows in expected:
        rows += [((), -np.inf, False)] * (count - len(rows))
    assert_same(found, expected)


# --- all of them


def test_nan_logits_fail_one_prompt_alone():
    # token 4 stands in the second prompt, and ends whatever could read it elsewhere
    broken = prepared() | {"embed": make_params()["embed"].at[4].set(jnp.nan)}
    two, three = {"beams": 2, "num_return": 2}, {"beams": 3, "num_return": 3}
    for run in (
        lambda p: beam_search(p, CFG, TOKENS, LENGTHS, max_new_tokens=7, stop_ids=(4,), **three),
        lambda p: tsearch(p, CFG, TOKENS, LENGTHS, max_new_tokens=8, end_id=4, **two),
        lambda p: sage(
            p,
            CFG,
            TOKENS,
            LENGTHS,
            key=jax.random.key(0),
            uids=np.arange(3),
            **STEPS | {"end_id": 4, "delimiters": [(4,), (1, 2)]},
            beams=2,
            num_return=3,
        )[0],
    ):
        found, sound = run(broken), run(prepared())
        assert np.all(np.asarray(found.scores[1]) == -np.inf) and not np.any(np.asarray(found.lengths[1]))
        for row in (0, 2):
            assert np.array_equal(found.tokens[row], sound.tokens[row])
            assert np.isfinite(found.scores[row, 0])


def test_new_prompts_penalties_and_keys_are_not_traced_again():
    options = {"beams": 3, "max_new_tokens": 7, "stop_ids": (END,), "num_return": 3}
    beam_search(prepared(), CFG, TOKENS, LENGTHS, **options)
    before = search._search._cache_size()
    for penalty in (0.5, 2.0):
        beam_search(prepared(), CFG, TOKENS[::-1].copy(), LENGTHS[::-1], length_penalty=penalty, **options)
    assert search._search._cache_size() == before


def test_bad_input():
    options = {"beams": 1, "max_new_tokens": 2}
    empty = np.array([3, 0, 1])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        beam_search(prepared(), CFG, TOKENS, empty, **options)
    with pytest.raises(ValueError, match="beams=0"):
        beam_search(prepared(), CFG, TOKENS, LENGTHS, **options | {"beams": 0})
    with pytest.raises(ValueError, match="token 6 is outside"):
        tsearch(prepared(), CFG, TOKENS, LENGTHS, num_return=1, end_id=6, **options)
    with pytest.raises(ValueError, match="admit='some'"):
        tsearch(prepared(), CFG, TOKENS, LENGTHS, num_return=1, end_id=1, admit="some", **options)
    with pytest.raises(ValueError, match="not groups of 2"):
        best_of_n(jnp.zeros(3), 2)
    with pytest.raises(ValueError, match="count=3"):
        best_of_n(jnp.zeros(4), 2, count=3)
