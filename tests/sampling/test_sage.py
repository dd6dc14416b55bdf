"""SAGE against its words with lists and whole forward passes, and what becomes of the chains it finds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_search import (
    CFG,
    END,
    LENGTHS,
    PROMPTS,
    STEPS,
    TOKENS,
    assert_same,
    draw_plainly,
    draw_sage,
    found_rows,
    logp,
    make_params,
    next_logp,
    prepared,
)

from jaxrl_llm.models.scoring import score
from jaxrl_llm.sampling.found import to_trajectories
from jaxrl_llm.sampling.sage import sage
from jaxrl_llm.sampling.search import sequence_scores


@jax.jit
def uniform(seed, uid, position):
    return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), uid), position))


def plain_sage(prompt, uid, seed, beams, count, samples, rank_by, steps=3, size=3):
    """By the words of the algorithm; a draw is the first token whose cumulative probability exceeds it."""
    alive, complete = [()], []
    drawn = np.zeros(beams * samples, int)
    for _ in range(steps):
        pool = []
        for beam, s in enumerate(alive):
            for j in range(beam * samples, (beam + 1) * samples):
                step = ()
                while len(step) < size and END not in step and 0 not in step and step[-2:] != (1, 2):
                    u = float(uniform(seed, uid, len(prompt) + j * 2**18 + drawn[j]))
                    step += (int(np.argmax(np.cumsum(np.exp(next_logp(prompt + s + step))) > u)),)
                    drawn[j] += 1
                values = logp(prompt, s + step)
                if step[-1] == END:
                    complete.append((s + step, values.mean(), True))
                else:
                    pool.append((s + step, (values if rank_by == "chain" else values[len(s) :]).mean()))
        if len(complete) >= count:
            break
        alive = [s for s, _ in sorted(pool, key=lambda x: -x[1])[:beams]]
    complete = sorted(complete, key=lambda x: -x[1])[:count]
    if len(complete) < count:
        closed = [(s, logp(prompt, s).mean(), False) for s in ((*s, END) for s in alive)]
        complete += sorted(closed, key=lambda x: -x[1])[: count - len(complete)]
    complete += [((), -np.inf, False)] * (count - len(complete))
    return sorted(complete, key=lambda x: -x[1]), drawn.sum()


@pytest.mark.parametrize(("rank_by", "seeds"), [("chain", range(5)), ("step", range(5, 8))])
def test_sage_is_the_plain_one(rank_by, seeds):
    """Steps of one to three tokens, delimiters of one and two, beams that swap, chains closed by force."""
    forced, complete = 0, 0
    for seed in seeds:
        found, drawn = draw_sage(seed=seed, rank_by=rank_by)
        plain = [plain_sage(p, uid, seed, 2, 3, 4, rank_by) for p, uid in zip(PROMPTS, (7, 8, 9))]
        assert_same(found, [rows for rows, _ in plain])
        assert drawn.tolist() == [n for _, n in plain]
        assert max(drawn.tolist()) <= 3 * 2 * 4 * 3
        forced += sum(not f for rows, _ in plain for _, _, f in rows)
        complete += sum(f for rows, _ in plain for _, _, f in rows)
    assert forced and complete


@pytest.mark.parametrize("seed", range(4))
def test_one_beam_and_one_sample_are_ordinary_sampling(seed):
    found, drawn = draw_sage(1, 1, seed, samples=1)
    plain = draw_plainly(np.pad(TOKENS, ((0, 0), (0, 10))), LENGTHS, seed)
    for row in range(3):
        own = np.asarray(plain.tokens[row, LENGTHS[row] : int(plain.lengths[row])]).tolist()
        mine, n = list(found_rows(found, row)[0][0]), int(drawn[row])
        assert mine[:n] == own[:n]  # steps may end early, so that there are fewer than 9 tokens in three
        assert mine == own if bool(found.finished[row, 0]) else mine[n:] == [END]


def test_more_samples_of_one_step_are_a_superset():
    """The rows of fewer beams are among those of more: a chain found is found again, or a surer one."""
    ended = 0
    for seed in range(6):
        options = {"max_steps": 1, "max_step_tokens": 6, "delimiters": []}
        few, many = (draw_sage(beams, 1, seed, **options)[0] for beams in (1, 2))
        ended += np.sum(few.finished)
        assert np.all((many.scores >= few.scores - 1e-5)[few.finished]) and np.all(
            many.finished[few.finished]
        )
    assert ended > 4


def test_a_search_does_not_depend_on_its_neighbours():
    found, drawn = draw_sage()
    order = np.array([2, 0, 1])
    other, other_drawn = sage(
        prepared(),
        CFG,
        TOKENS[order],
        LENGTHS[order],
        beams=2,
        num_return=3,
        key=jax.random.key(3),
        uids=np.array([7, 8, 9])[order],
        **STEPS,
    )
    for name in ("tokens", "logp", "lengths", "scores", "finished"):
        assert np.array_equal(np.asarray(getattr(found, name))[order], getattr(other, name)), name
    assert np.array_equal(np.asarray(drawn)[order], other_drawn)


def test_what_was_found_is_a_row_to_learn_from():
    """The trainer's log-probs are the recorded ones, for chains and for answers that follow them."""
    found, _ = draw_sage()
    t = to_trajectories(found, TOKENS, LENGTHS, policy_version=4)
    assert t.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for row in range(9):
        prompt, (chain, _, finished) = PROMPTS[row // 3], found_rows(found, row // 3)[row % 3]
        n = len(prompt) + len(chain)
        assert tuple(t.tokens[row].tolist()[:n]) == prompt + chain and not np.any(t.tokens[row, n:])
        assert int(t.lengths[row]) == n and bool(t.finished[row]) == finished
        assert np.flatnonzero(t.action_mask[row]).tolist() == list(range(len(prompt), n))
        assert t.policy_version[row].tolist()[len(prompt) : n] == [4] * len(chain)
    found, _ = draw_sage(1, 1, samples=1)
    chains = to_trajectories(found, TOKENS, LENGTHS, policy_version=4)
    answers = draw_plainly(np.asarray(chains.tokens), np.asarray(chains.lengths), 1)
    both = to_trajectories(found, TOKENS, LENGTHS, policy_version=4, answers=answers)
    assert np.array_equal(both.completion_lengths, chains.completion_lengths + answers.completion_lengths)
    assert np.all((np.asarray(both.policy_version) == 4) == np.asarray(both.action_mask))
    for one in (t, both):
        own = score(make_params(), one.tokens, one.action_mask, CFG, temperature=one.temperature).logp
        mask = np.asarray(one.action_mask)
        assert np.max(np.abs(np.asarray(own - one.behaviour_logp))[mask]) <= 1e-5
        assert not np.any(np.asarray(one.behaviour_logp)[~mask])
    hot = dataclasses.replace(answers, temperature=answers.temperature * 0.5)
    with pytest.raises(ValueError, match="another temperature"):
        to_trajectories(found, TOKENS, LENGTHS, answers=hot)
    with pytest.raises(ValueError, match="2 answers for 3"):
        to_trajectories(found, TOKENS, LENGTHS, answers=answers.take(jnp.arange(2)))


def test_bad_input():
    for bad, message in (
        ({"delimiters": [()]}, "delimiter is empty"),
        ({"rank_by": "luck"}, "rank_by='luck'"),
        ({"uids": np.arange(2)}, "3 prompts need"),
        ({"max_steps": 2**18}, "at most"),
        ({"samples": 0}, "samples=0"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_sage(**bad)


def test_scores_of_sequences():
    found, _ = draw_sage()
    t = to_trajectories(found, TOKENS, LENGTHS)
    t = dataclasses.replace(t, action_mask=t.action_mask.at[4].set(False))  # a place without a chain
    sums, means = (np.asarray(sequence_scores(t, by=by)) for by in ("sum", "mean"))
    for row in range(9):
        chain = found_rows(found, row // 3)[row % 3][0]
        total = -np.inf if row == 4 else logp(PROMPTS[row // 3], chain).sum()
        np.testing.assert_allclose([sums[row], means[row]], [total, total / max(len(chain), 1)], atol=1e-5)
    with pytest.raises(ValueError, match="median"):
        sequence_scores(t, by="median")
