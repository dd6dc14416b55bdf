"""Names, paths, signatures and columns: errors before training, and who is passed what."""

from pathlib import Path

import numpy as np
import pytest

from jaxrl_llm.rewards.functions import REWARDS
from jaxrl_llm.rewards.pool import RewardPool
from jaxrl_llm.rewards.specs import Batch, RewardSpec, arguments, check_columns, resolve

USER = str(Path(__file__).with_name("user_rewards.py"))


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_built_ins_resolve_under_their_own_name(name):
    assert resolve(name).name == name


def test_names_and_paths():
    assert resolve(f"{USER}:by_row").name == "by_row"
    assert resolve("jaxrl_llm.rewards.functions.exact_match").function("a", "a") == 1.0
    assert resolve({"path": f"{USER}:by_row", "name": "mine"}).name == "mine"
    assert resolve(RewardSpec("exact_match", {"tag": "x"})).function("<x>1</x>", "1") == 1.0


def test_forms():
    assert resolve(f"{USER}:by_row").per_row and resolve(f"{USER}:async_row").per_row
    assert not resolve(f"{USER}:by_batch").per_row and not resolve(f"{USER}:async_batch").per_row


@pytest.mark.parametrize(
    "spec, words",
    [
        ("exact_mach", ["exact_mach", "did you mean 'exact_match'", "path/to/file.py:function"]),
        ("no/such/file.py:f", ["no/such/file.py", "there is no file"]),
        ("no_such_package.f", ["no_such_package", "ModuleNotFoundError"]),
        (f"{USER}:missing", ["'missing'", "by_row"]),
        (f"{USER}:not_a_function", ["has no function 'not_a_function'"]),
        (f"{USER}:neither", ["user_rewards.py:neither", "(a, b)", "completion_ids", "solution_str"]),
        (f"{USER}:both", ["both forms"]),
        ({"path": "exact_match", "weight": 1.0}, ["'path', 'options' and 'name'"]),
        ({"name": "x"}, ["'path', 'options' and 'name'"]),
        ({"path": "exact_match", "options": {"tagg": "a"}}, ["'tagg'", "did you mean 'tag'"]),
        ({"path": "exact_match", "options": {"solution_str": "a"}}, ["'solution_str'"]),
    ],
)
def test_errors_name_the_fault_and_the_way_out(spec, words):
    with pytest.raises(ValueError) as error:
        resolve(spec)
    for word in words:
        assert word in str(error.value)


def test_a_file_that_does_not_compile(tmp_path):
    (tmp_path / "broken.py").write_text("def f(completions:\n")
    with pytest.raises(ValueError, match=r"broken.py:f.*SyntaxError"):
        resolve(f"{tmp_path / 'broken.py'}:f")


def test_a_file_may_import_its_neighbours(tmp_path, monkeypatch):
    (tmp_path / "jaxrl_test_neighbour.py").write_text("VALUE = 0.25\n")
    (tmp_path / "mine.py").write_text(
        "def f(completions, **columns):\n"
        "    from jaxrl_test_neighbour import VALUE\n"
        "    return [VALUE] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    with RewardPool(["mine.py:f"], workers=1, timeout=30) as pool:
        assert pool.score(["p"], ["c"], [[1]], {}).values["f"].tolist() == [0.25]


def test_pool_wants_distinct_names():
    with pytest.raises(ValueError, match="distinct names"):
        RewardPool(["exact_match", {"path": "exact_match", "options": {"tag": "a"}}])
    with pytest.raises(ValueError, match="distinct names"):
        RewardPool([])
    with pytest.raises(ValueError, match="positive"):
        RewardPool(["exact_match"], timeout=0)


def test_check_columns():
    check_columns(resolve("exact_match"), ["ground_truth"])
    check_columns(resolve("exact_match"), ["answer"])
    check_columns(resolve(f"{USER}:by_row"), ["data_source", "reward_model"])
    check_columns(resolve({"path": "format_regex", "options": {"pattern": "a"}}), [])
    with pytest.raises(ValueError, match=r"exact_match.*ground_truth.*'question'"):
        check_columns(resolve("exact_match"), ["question"])
    with pytest.raises(ValueError, match="pattern"):
        check_columns(resolve("format_regex"), ["answer"])
    with pytest.raises(ValueError, match=r"entry.*source_dataset"):
        check_columns(resolve("reasoning_gym"), ["answer"])


MESSAGES = [{"role": "user", "content": "q"}]
BATCH = Batch(
    prompts=["p0", MESSAGES, "p2"],
    completions=["c0", "c1", "c2"],
    completion_ids=[[1], np.array([2, 3]), [4]],
    columns={"answer": ["a0", "a1", "a2"], "level": [0, 1, 2], "prompt": ["p0", MESSAGES, "p2"]},
)


def test_trl_arguments():
    """Messages in, messages out; columns but not the prompt's own; an option hides the column of its name."""
    assert arguments(resolve(f"{USER}:by_batch"), BATCH, [0, 1]) == {
        "prompts": ["p0", MESSAGES],
        "completions": ["c0", [{"role": "assistant", "content": "c1"}]],
        "completion_ids": [[1], [2, 3]],
        "answer": ["a0", "a1"],
        "level": [0, 1],
    }
    hidden = resolve({"path": f"{USER}:by_batch", "options": {"level": 9}})
    assert "level" not in arguments(hidden, BATCH, [0])
    assert arguments(resolve(f"{USER}:as_array"), BATCH, [2]) == {"completions": ["c2"]}


def test_verl_arguments():
    given = arguments(resolve(f"{USER}:by_row"), BATCH, [1])
    assert given == {"data_source": None, "solution_str": "c1", "ground_truth": "a1"}
    columns = {
        "data_source": ["d"],
        "answer": ["wrong"],
        "reward_model": [{"style": "rule", "ground_truth": "g"}],
        "extra_info": [{"index": 5}],
    }
    verl = Batch(["p"], ["c"], [[1]], columns)
    expected = {"data_source": "d", "solution_str": "c", "ground_truth": "g", "extra_info": {"index": 5}}
    assert arguments(resolve(f"{USER}:by_row"), verl, [0]) == expected
