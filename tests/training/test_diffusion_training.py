"""Training of masked-diffusion LMs: the sudoku task, its learning curve, and rewards that rise."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.supervised import Example, pack
from jaxrl_llm.environments import sudoku
from jaxrl_llm.models import huggingface, huggingface_config, transformer
from jaxrl_llm.models import params as params_lib
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.denoiser import denoise
from jaxrl_llm.sampling import diffusion_options
from jaxrl_llm.sampling.diffusion import decode
from jaxrl_llm.sampling.diffusion_options import Method
from jaxrl_llm.sampling.diffusion_state import of_model, to_trajectories
from jaxrl_llm.training import diffusion, diffusion_rl
from jaxrl_llm.training.config import default
from jaxrl_llm.training.job import build
from jaxrl_llm.training.loop import run
from jaxrl_llm.training.update import SupervisedBatch

CFG = ModelConfig(
    family="llada",
    vocab_size=12,
    hidden_size=32,
    num_layers=1,
    num_kv_heads=4,
    head_dim=8,
    intermediate_size=64,
    qk_norm=False,
    causal=False,
    mask_id=11,
)
PARAMS = params_lib.init(jax.random.key(0), transformer.param_specs(CFG))


# --- the task


def test_there_are_288_grids():
    """The known count; each has all digits in every row, column and box, by a loop of its own."""
    assert len({tuple(grid) for grid in sudoku.GRIDS}) == 288
    for grid in sudoku.GRIDS.reshape(-1, 4, 4):
        parts = [*grid, *grid.T, *(grid[a : a + 2, b : b + 2].ravel() for a in (0, 2) for b in (0, 2))]
        assert all(set(part) == {1, 2, 3, 4} for part in parts)


def test_problems_are_solved_by_their_responses():
    """Clues in number and place; fillers from the row's first cell in 90% (plus a seventh of the rest)."""
    problems = sudoku.make(np.random.default_rng(0), 2000)
    assert problems.tokens.shape == (2000, 42)
    clues = problems.prompts[:, 1:-1]
    given = (clues != sudoku.BLANK).sum(1)
    assert set(given) == set(range(3, 9))
    rows = problems.responses.reshape(-1, 4, 6)
    assert np.all((rows[:, :, 1:5].reshape(-1, 16) == clues) | (clues == sudoku.BLANK))
    is_faithful = rows[:, :, 5] == 6 + rows[:, :, 1]
    assert abs(is_faithful.mean() - (0.9 + 0.1 / 7)) < 0.01
    assert set(rows[:, :, [0, 5]].ravel()) == set(sudoku.FILLERS)
    assert sudoku.check(problems.prompts, problems.responses).is_valid.all()


def test_wrong_answers_are_found_out():
    """A cell changed breaks the grid; another grid keeps some clues only; fillers do not matter."""
    problems = sudoku.make(np.random.default_rng(1), 50, fewest=8)
    changed = problems.responses.copy()
    changed[:, 1] = changed[:, 1] % 4 + 1
    assert not sudoku.check(problems.prompts, changed).is_legal.any()
    others = sudoku.check(problems.prompts, np.roll(problems.responses, 1, axis=0))
    assert others.is_legal.all() and 0 < others.kept.mean() < 1
    same = (np.roll(problems.responses, 1, axis=0) == problems.responses)[:, sudoku.CELL_PLACES]
    clue = problems.prompts[:, 1:-1] != sudoku.BLANK
    np.testing.assert_allclose(others.kept, (same & clue).sum(1) / clue.sum(1))
    changed = problems.responses.copy()
    changed[:, 0] = changed[:, 5] = sudoku.MASK
    assert sudoku.check(problems.prompts, changed).is_valid.all()
    with pytest.raises(ValueError, match=r"\(50, 18\)"):
        sudoku.check(problems.prompts, problems.responses[:, :-1])
    with pytest.raises(ValueError, match="fewest=9"):
        sudoku.make(np.random.default_rng(0), 1, fewest=9)


# --- given texts


def packed_batch():
    """Four examples in two rows of 12, one of them alone."""
    rng = np.random.default_rng(0)
    sizes = [(2, 4), (1, 3), (3, 5), (2, 2)]
    examples = [
        Example(rng.integers(0, 11, a + b).tolist(), [False] * a + [True] * b, i)
        for i, (a, b) in enumerate(sizes)
    ]
    packed, count = pack(examples, 12, 2)
    assert count == 4
    return SupervisedBatch(*(jnp.asarray(x) for x in packed)), examples


def test_packed_loss_is_that_of_the_examples_alone():
    """Of the same masks, by the plain logits of each example alone: Σ −ln p / rate, over tokens."""
    batch, examples = packed_batch()
    noisy = diffusion.with_noise(batch, jax.random.key(3), mask_id=CFG.mask_id)
    assert not np.any(noisy.masked & ~batch.loss_mask)
    total = count = 0.0
    by_example = []
    for row, segment in itertools.product(range(2), range(1, 4)):
        own = np.asarray(batch.segment_ids[row]) == segment
        if not own.any():
            continue
        logits = denoise(PARAMS, noisy.noisy[row, own][None], CFG)[0]
        logp = jax.nn.log_softmax(logits)[np.arange(own.sum()), batch.tokens[row, own]]
        is_masked, rate = np.asarray(noisy.masked[row, own]), np.asarray(noisy.rate[row, own])
        terms = np.where(is_masked, -logp / rate, 0)
        total, size = total + terms.sum(), np.asarray(batch.loss_mask[row, own]).sum()
        count += size
        by_example.append(terms.sum() / size)
    assert len(by_example) == len(examples)
    loss, metrics = diffusion.denoising_loss(CFG)(PARAMS, noisy)
    np.testing.assert_allclose(loss.sum, total, rtol=1e-5)
    assert loss.weight == count == metrics["nll"].weight
    loss, _ = diffusion.denoising_loss(CFG, by_example=True)(PARAMS, noisy)
    np.testing.assert_allclose([loss.sum, loss.weight], [sum(by_example), 4], rtol=1e-5)


def test_a_causal_model_is_refused():
    causal = ModelConfig()
    for call in (
        lambda: diffusion.denoising_loss(causal),
        lambda: diffusion.fit(causal, lambda rng: None, num_steps=1),
        lambda: diffusion_rl.estimate_of("diffu_grpo", causal),
        lambda: diffusion_rl.spg_loss(causal),
    ):
        with pytest.raises(ValueError, match="masked-diffusion"):
            call()


def copies(rng):
    """A token below 11 and four copies of it: ln 11 = 2.4 nats a token before anything is learned."""
    return diffusion.rows_of(np.repeat(rng.integers(0, 11, (32, 1)), 5, axis=1), prompt_length=1)


def test_sixty_steps_lower_the_loss():
    """And params are those of the seed: the same run again is the same, from params of its own too."""
    params, history = diffusion.fit(CFG, copies, num_steps=60, learning_rate=1e-2)
    assert np.mean(history[:5]) > 2.0 and np.mean(history[-10:]) < 0.3
    seen = []
    start = params_lib.init(jax.random.split(jax.random.key(0))[0], transformer.param_specs(CFG))
    again, repeated = diffusion.fit(
        CFG, copies, num_steps=60, learning_rate=1e-2, params=start, on_step=lambda *x: seen.append(x[0])
    )
    assert repeated == history and seen == list(range(1, 61))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    noisy = jnp.array([[7, 11, 11, 11, 11]])
    assert jnp.argmax(denoise(params, noisy, CFG), axis=-1)[0, 1:].tolist() == [7] * 4


def test_a_llada_folder_is_fine_tuned_by_the_training_binary(tmp_path):
    """What `jaxrl_llm.train` does: packed JSONL rows, noise by the step, and a folder at the end."""
    cfg = dataclasses.replace(CFG, vocab_size=320, mask_id=300, tied_head=False)
    params = params_lib.init(jax.random.key(1), transformer.param_specs(cfg))
    huggingface.save(tmp_path / "model", params, cfg)
    lines = [json.dumps({"prompt": f"{i}?", "completion": f"{i}!"}) for i in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    c = default()
    c.num_steps, c.model.path, c.tokenizer.kind, c.log.plots = 0, str(tmp_path / "model"), "bytes", False
    c.supervised.train.kind, c.supervised.train.path = "jsonl", str(tmp_path / "train.jsonl")
    c.supervised.num_steps, c.supervised.batch_rows, c.supervised.max_length = 30, 8, 32
    c.supervised.optimizer.learning_rate = 1e-2
    run(build(c), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    nll = [row["nll"] for row in rows if "nll" in row]
    assert len(nll) == 30 and np.mean(nll[-5:]) < np.mean(nll[:5]) - 1
    assert huggingface_config.config_from_folder(tmp_path / "run" / "export").mask_id == 300
    c.num_steps, c.data.train, c.reward.functions = 1, c.supervised.train, ("exact_match",)
    with pytest.raises(ValueError, match="masked-diffusion model, which is trained here"):
        build(c)


# --- reinforcement learning

PROMPTS = np.arange(4)[:, None]
DECODER = Method(4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("diffu_grpo", {}),
        ("diffu_grpo", {"num_iterations": 3, "prompt_rate": 0.3}),
        ("unigrpo", {"num_generations": 16, "learning_rate": 4e-3}),
        ("unigrpo", {"num_generations": 16, "num_iterations": 3, "learning_rate": 4e-3}),
        ("coupled_grpo", {}),
        ("trace", {}),
        ("trace", {"sampled_steps": 1}),
        ("spg", {"num_draws": 2}),
        ("spg", {"num_draws": 4, "block_size": 2, "upper_share": 1.0}),
    ],
    ids=str,
)
def test_every_method_raises_the_reward(method, options):
    """From a chance level of 1/11 to nine tokens in ten, in 60 batches of 32 or 64 responses."""
    _, history = diffusion_rl.improve(
        PARAMS,
        CFG,
        lambda rng: PROMPTS,
        lambda prompts, responses: (prompts == responses).mean(1),
        DECODER,
        lambda rows: diffusion_options.settings(DECODER, rows, steps=2, temperature=1.0),
        method=method,
        num_steps=60,
        **{"learning_rate": 1e-2} | options,
    )
    assert np.mean(history[:3]) < 0.2 and np.mean(history[-5:]) > 0.9


def test_the_trace_is_on_policy():
    """A transformer's rows, two tokens a round, prompts of two lengths: the ratio to the sampler's is 1."""
    prompts, lengths = jnp.array([[3, 7], [5, 0], [2, 9], [8, 0]]), jnp.array([2, 1, 2, 1])
    numbers = diffusion_options.settings(
        DECODER, 4, steps=2, temperature=[0.7, 1.0, 1.3, 1.0], top_k=[0, 0, 0, 4]
    )
    decoded = decode(
        of_model(CFG), PARAMS, prompts, lengths, DECODER, numbers, key=jax.random.key(1), uids=jnp.arange(4)
    )
    t = to_trajectories(decoded, prompts, lengths, numbers)
    keys = jax.random.split(jax.random.key(2), 4)
    estimate = diffusion_rl.estimate_of("trace", CFG, num_steps=2)
    logp = np.asarray(jax.jit(estimate)(PARAMS, t, keys).logp - t.log_kept)
    np.testing.assert_allclose(logp, t.behaviour_logp, atol=1e-5)
    mask, prompt = diffusion_rl.response_and_prompt(t)
    np.testing.assert_array_equal(mask.sum(1), [4] * 4)
    np.testing.assert_array_equal(prompt, np.arange(6) < lengths[:, None])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("grpo", {}, "unknown method 'grpo'"),
        ("spg", {"num_iterations": 2}, "num_iterations=2"),
    ],
)
def test_methods_and_options_that_do_not_go_together(method, options, message):
    with pytest.raises(ValueError, match=message):
        diffusion_rl.improve(PARAMS, CFG, None, None, DECODER, None, method=method, num_steps=1, **options)
    with pytest.raises(ValueError, match="num_steps=None"):
        diffusion_rl.estimate_of("trace", CFG)
    with pytest.raises(ValueError, match="method='spg' has no estimate"):
        diffusion_rl.estimate_of("spg", CFG)
