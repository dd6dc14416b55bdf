"""A demonstration prints what it found, and ends with an error where its formula does not hold."""

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.environments import sudoku
from jaxrl_llm.models import transformer
from jaxrl_llm.models.params import init
from jaxrl_llm.sampling import enumerated
from jaxrl_llm.sampling.diffusion_state import of_model

DEMONSTRATIONS = Path(__file__).resolve().parents[2] / "tools" / "demonstrations"


@pytest.fixture(scope="module")
def puzzle():
    """The names of the sudoku demonstration, with a smaller model, few updates and three decoders."""
    own = runpy.run_path(str(DEMONSTRATIONS / "sudoku.py"))["main"].__globals__
    own["CFG"] = dataclasses.replace(
        own["CFG"],
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=16,
    )
    own["TRAINING"] = {"strong": own["Training"](2), "habit": own["Training"](2, habit=0.6, hidden=0.1)}
    wanted = ("plain, 12 steps", "threshold 0.9")
    fast = [decoder for decoder in own["FAST"] if decoder.name in wanted]
    own["DECODERS"] = {"strong": (own["PLAIN"], *fast), "habit": (own["PLAIN"],)}
    return own


def test_focore(monkeypatch, capsys):
    """One of its cases, with the analytic weight and with another."""
    names = runpy.run_path(str(DEMONSTRATIONS / "focore.py"))
    main = names["main"]
    own = main.__globals__
    monkeypatch.setitem(own, "CASES", [case for case in own["CASES"] if case[0].startswith("FoCore")])
    monkeypatch.setitem(own, "WEIGHTS", (0.7, 0.75, 0.8, 1.15))
    main()
    row = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("FoCore"))
    assert row.split()[-5:] == ["0", "6", "7", "8", "yes"]
    analytic = enumerated.flip_weight
    monkeypatch.setattr(enumerated, "flip_weight", lambda k, copied: analytic(k, copied=copied) + 0.01)
    with pytest.raises(SystemExit, match="not as computed"):
        main()
    assert "NO" in capsys.readouterr().out


def test_sudoku_goes_on_where_it_was(puzzle, tmp_path, monkeypatch, capsys):
    """Two seeds from the command line; what is kept is not made again, and the table is that of its files."""
    arguments = ["--output", str(tmp_path), "--seeds=0,1", "--problems=6"]
    puzzle["main"](arguments)
    first = capsys.readouterr().out
    assert "strong 1: 2 updates" in first and (tmp_path / "frontier.png").stat().st_size > 5000
    kept = json.loads((tmp_path / "strong_0.json").read_text())["decoders"]
    assert [kept[name]["steps"] for name in ("plain, 24 steps", "plain, 12 steps")] == [24, 12]
    assert 1 <= kept["threshold 0.9"]["steps"] == kept["threshold 0.9"]["nfe"] <= 24

    monkeypatch.setitem(puzzle, "fit", None)
    for seed, valid in ((0, 0.5), (1, 0.75)):
        file = tmp_path / f"strong_{seed}.json"
        found = json.loads(file.read_text())
        found["decoders"]["threshold 0.9"]["valid"] = valid
        found["decoders"]["plain, 24 steps"]["valid"] = 0.5
        file.write_text(json.dumps(found))
    puzzle["main"]([*arguments, "--milliseconds"])
    row = next(line for line in capsys.readouterr().out.splitlines() if "threshold" in line)
    assert "62.5 ± 12.5" in row and "+12.5 ± 12.5" in row  # sd / sqrt(2) of two values is half their distance
    with pytest.raises(SystemExit):
        puzzle["main"]([*arguments, "--models=stronk"])
    assert "unknown 'stronk'; some of strong, habit" in capsys.readouterr().err


def test_sudoku_examples_of_a_habit(puzzle):
    """Six in ten, besides a 288th of the others, are answered by the first grid, and their clues are not its;
    a tenth have no prompt."""
    rng, shares = np.random.default_rng(0), {}
    for kind, training in puzzle["TRAINING"].items():
        tokens = np.concatenate([puzzle["examples"](rng, training).tokens for _ in range(20)])
        prompts, responses = np.split(tokens, [sudoku.PROMPT_LENGTH], axis=1)
        is_hidden = (prompts == sudoku.MASK).any(axis=1)
        assert np.all(prompts[is_hidden] == sudoku.MASK)
        assert abs(is_hidden.mean() - training.hidden) < 0.03
        prompts, responses = prompts[~is_hidden], responses[~is_hidden]
        is_usual = (responses[:, sudoku.CELL_PLACES] == sudoku.GRIDS[0]).all(axis=1)
        verdict = sudoku.check(prompts, responses)
        assert verdict.is_legal.all() and verdict.is_valid[~is_usual].all()
        shares[kind] = is_usual.mean(), verdict.is_valid[is_usual].mean()
    assert abs(shares["habit"][0] - 0.6) < 0.04 and shares["habit"][1] < 0.1
    assert shares["strong"][0] < 0.02 and shares["strong"][1] == 1


def test_sudoku_hints_are_kept(puzzle):
    """Four right tokens of one kind; a model that was told all of them answers with them."""
    problems = sudoku.make(np.random.default_rng(3), 20)
    is_cell = np.isin(np.arange(sudoku.RESPONSE_LENGTH), sudoku.CELL_PLACES)
    for kind, places in (("cells", is_cell), ("fillers", ~is_cell)):
        hints = puzzle["hints"](np.random.default_rng(0), problems, kind)
        assert np.all((hints >= 0).sum(axis=1) == 4) and not np.any(hints[:, ~places] >= 0)
        assert np.all((hints < 0) | (hints == problems.responses))
        blank = problems.prompts[:, 1:-1] == sudoku.BLANK
        assert kind == "fillers" or not np.any((hints[:, sudoku.CELL_PLACES] >= 0) & ~blank)
    params = init(jax.random.key(0), transformer.param_specs(puzzle["CFG"]))
    told = (params, jnp.asarray(problems.responses))
    out = puzzle["answers"](puzzle["told"](of_model(puzzle["CFG"])), told, problems.prompts, puzzle["PLAIN"])
    np.testing.assert_array_equal(out.tokens, problems.responses)
