"""Sources: real files, a real tfds dataset, real tasks."""

import copy
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

import jaxrl_llm.data
from jaxrl_llm.data.rows import MalformedRow, Source, held_out, prompt_text
from jaxrl_llm.data.sources import open_source

CHAT = [{"role": "user", "content": "2+2?"}]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def write_parquet(path, rows):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return str(path)


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet}


@pytest.fixture(params=WRITERS)
def kind(request):
    return request.param


def opened(kind, tmp_path, rows, **arguments):
    return open_source(kind, path=WRITERS[kind](tmp_path / f"rows.{kind}", rows), **arguments)


def test_rows_come_back_as_written_in_any_order(kind, tmp_path):
    rows = [
        {"prompt": f"é ▁\n{i}", "answer": i, "none": None, "list": [{"a": "b"}, {"a": str(i)}]}
        for i in range(7)
    ]
    source = opened(kind, tmp_path, rows)
    assert len(source) == 7
    assert [source[i] for i in (6, 0, 3, 3)] == [rows[i] for i in (6, 0, 3, 3)]
    assert source[np.int64(5)] == rows[5]
    assert list(source) == rows
    for outside in (-1, 7):
        with pytest.raises(IndexError, match="7 rows"):
            source[outside]


def test_parquet_in_batches_is_checked_to_the_last_row(tmp_path):
    rows = [{"prompt": f"p{i}"} for i in range(3000)]
    rows[2999]["prompt"] = " "
    with pytest.raises(MalformedRow, match=r"rows.parquet, row 3000, column 'prompt': the text is empty"):
        opened("parquet", tmp_path, rows)
    assert opened("parquet", tmp_path, rows[:2999])[2998] == {"prompt": "p2998"}


def test_verl_rows_expose_the_ground_truth(kind, tmp_path):
    row = {
        "data_source": "openai/gsm8k",
        "prompt": CHAT,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"index": 0, "split": "train"},
    }
    assert opened(kind, tmp_path, [row, row])[1] == {**row, "ground_truth": "4"}
    bad = copy.deepcopy(row)
    bad["reward_model"]["ground_truth"] = None
    with pytest.raises(
        MalformedRow, match=r"row 2, column 'reward_model': an object with 'style' and 'ground_tr"
    ):
        opened(kind, tmp_path, [row, bad])


def test_preference_and_supervised_rows(kind, tmp_path):
    pair = {"prompt": "p", "chosen": "good", "rejected": ""}
    assert opened(kind, tmp_path, [pair, pair])[0] == pair
    talk = {"prompt": CHAT, "completion": [{"role": "assistant", "content": "4"}], "id": 1}
    assert opened(kind, tmp_path, [talk])[0] == talk
    with pytest.raises(MalformedRow, match="row 1, column 'rejected': missing"):
        opened(kind, tmp_path, [{"prompt": "p", "chosen": "good"}])
    with pytest.raises(MalformedRow, match="row 1, column 'completion': missing; there are prompt, answer"):
        opened(kind, tmp_path, [{"prompt": "p", "answer": "a"}], options={"form": "supervised"})
    # A column that only happens to bear the name of another form's.
    other = {"prompt": "p", "completion": 3}
    assert opened(kind, tmp_path, [other], options={"form": "prompt"})[0] == other


BAD_CELLS = [
    (None, "text or a list of messages was expected, not None"),
    ("", "the text is empty"),
    (" \n", "the text is empty"),
    (7, "text or a list of messages was expected, not 7"),
    ([], "the list of messages is empty"),
    (["hello"], "message 1 is not an object with 'role' and 'content' but 'hello'"),
    ([*CHAT, {"role": "user"}], "message 2 needs text as its 'content', not None"),
    ([{"role": None, "content": "x"}], "message 1 needs text as its 'role', not None"),
]


@pytest.mark.parametrize(("value", "message"), BAD_CELLS, ids=[str(i) for i in range(len(BAD_CELLS))])
def test_a_malformed_cell_names_file_row_and_column(value, message, tmp_path):
    rows = [{"q": "fine", "n": 1}, {"q": value, "n": 2}, {"q": "fine", "n": 3}]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(MalformedRow, match=re.escape(f"{path}, row 2, column 'q': {message}")):
        open_source("jsonl", path=path, options={"columns": {"prompt": "q"}})


def test_every_jsonl_row_has_the_same_columns(tmp_path):
    with pytest.raises(MalformedRow, match="row 2, column 'answer': missing, and the first row has it"):
        opened("jsonl", tmp_path, [{"prompt": "p", "answer": 1}, {"prompt": "p"}])
    with pytest.raises(MalformedRow, match="row 2, column 'anwser': not in the first row"):
        opened("jsonl", tmp_path, [{"prompt": "p"}, {"prompt": "p", "anwser": 1}])
    with pytest.raises(MalformedRow, match="row 2, column 'answer': missing"):
        opened(
            "jsonl",
            tmp_path,
            [{"prompt": "p", "answer": 1}, {"prompt": "p"}],
            options={"columns": {"ground_truth": "answer"}},
        )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "cut', "row 3: not a JSON object on one line"),
        (b'{"prompt": "\xff"}', "row 3: not a JSON object on one line"),
        (b'["prompt"]', r"row 3: an object with columns was expected, not \['prompt'\]"),
    ],
)
def test_a_line_that_is_no_object(line, message, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n' + line + b"\n")  # the blank line counts as a line
    with pytest.raises(MalformedRow, match=message):
        open_source("jsonl", path=str(path))


def test_jsonl_with_mark_blank_lines_and_no_newline_at_the_end(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n\n{"prompt": "b"}')
    assert [row["prompt"] for row in open_source("jsonl", path=str(path))] == ["a", "b"]


def test_columns_are_renamed(kind, tmp_path):
    rows = [{"question": "q", "prompt": "not this", "gold": "g"}]
    source = opened(kind, tmp_path, rows, options={"columns": {"prompt": "question", "ground_truth": "gold"}})
    assert source[0] == {"prompt": "q", "ground_truth": "g"}
    assert set(source.columns) == set(source[0])
    with pytest.raises(ValueError, match="did you mean 'question'"):
        opened(kind, tmp_path, rows, options={"columns": {"prompt": "qestion"}})


def test_a_pattern_reads_files_one_after_another(kind, tmp_path):
    for part in range(3):
        WRITERS[kind](tmp_path / f"part-{part}", [{"prompt": f"{part}{i}"} for i in range(part + 1)])
    source = open_source(kind, path=str(tmp_path / "part-*"))
    assert [source[i]["prompt"] for i in range(len(source))] == ["00", "10", "11", "20", "21", "22"]
    assert [row["prompt"] for row in open_source(kind, path=str(tmp_path / "part-*"), size=3)] == [
        "00",
        "10",
        "11",
    ]
    assert len(open_source(kind, path=str(tmp_path / "part-*"), size=99)) == 6
    WRITERS[kind](tmp_path / "part-9", [{"prompt": "p", "other": 1}])
    with pytest.raises(ValueError, match=r"part-9 has columns prompt, other and .*part-0 has prompt"):
        open_source(kind, path=str(tmp_path / "part-*"))


def test_unusable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        open_source("jsonl", path=str(tmp_path / "nothing.jsonl"))
    (tmp_path / "empty").write_text("")
    (tmp_path / "blank").write_text("\n \n")
    (tmp_path / "half.parquet").write_bytes(b"PAR1....")
    for kind, name, message in [
        ("jsonl", "empty", "is empty"),
        ("jsonl", "blank", "holds no rows"),
        ("parquet", "half.parquet", "not a readable parquet file"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_source(kind, path=str(tmp_path / name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "csv"}, "unknown data source 'csv'; one of reasoning_gym, jsonl, parquet, tfds"),
        ({"kind": "jsonl"}, "needs path"),
        ({"kind": "tfds", "name": "x"}, "needs split"),
        ({"kind": "jsonl", "path": "x", "name": "y"}, "takes no name, got 'y'"),
        ({"kind": "reasoning_gym", "name": "chain_sum", "size": 2, "path": "x"}, "takes no path"),
        ({"kind": "jsonl", "path": "x", "options": {"colums": {}}}, "unknown option 'colums'.*'columns'"),
        (
            {"kind": "jsonl", "path": __file__, "options": {"form": "pairs"}},
            "unknown form 'pairs'; one of prompt",
        ),
        ({"kind": "reasoning_gym", "name": "chain_summ", "size": 2}, "did you mean 'chain_sum'"),
        (
            {"kind": "reasoning_gym", "name": "chain_sum", "size": 2, "options": {"min_term": 2}},
            "unknown option 'min_term' of reasoning_gym task 'chain_sum'; did you mean 'min_terms'",
        ),
        (
            {
                "kind": "reasoning_gym",
                "name": "chain_sum",
                "size": 2,
                "options": {"min_terms": 9, "max_terms": 2},
            },
            "'chain_sum' refuses {'min_terms': 9",
        ),
        ({"kind": "reasoning_gym", "name": "chain_sum", "size": 10**6 + 1}, "1000000 at most"),
        ({"kind": "reasoning_gym", "name": "chain_sum", "size": 2, "seed": -1}, "must not be negative"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        open_source(**arguments)


SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_reasoning_gym_seeds_do_not_overlap_and_rows_are_pure():
    def sums(seed, size=40):
        return open_source(
            "reasoning_gym",
            name="chain_sum",
            size=size,
            seed=seed,
            options=dict.fromkeys(("min_digits", "max_digits"), 6),
        )

    a, b = sums(0), sums(1)
    assert a[7] == sums(0)[7] == sums(0, size=8)[7] | {"task_config": a[7]["task_config"]}
    assert not {row["prompt"] for row in a} & {row["prompt"] for row in b}


def test_reasoning_gym_rows_are_scored_in_another_process():
    rows = [
        open_source("reasoning_gym", name=name, size=2, seed=3, options=options)[1]
        for name, options in [
            ("chain_sum", SMALL),
            ("countdown", {"min_numbers": 3}),
            ("arc_1d", {}),
            ("rearc", {}),
        ]
    ]
    for row in rows:
        json.dumps(row)
    code = """
import pickle, sys, reasoning_gym
for row in pickle.load(sys.stdin.buffer):
    task = reasoning_gym.create_dataset(row["source_dataset"], **row["task_config"])
    print(task.score_answer(row["answer"], row["entry"]), task.score_answer("nonsense", row["entry"]))
"""
    out = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(rows), capture_output=True, check=True
    )
    scores = [tuple(map(float, line.split())) for line in out.stdout.splitlines()]
    assert len(scores) == len(rows)
    assert all(right == 1 and wrong < 0.1 for right, wrong in scores)


def test_held_out_prompts_leave_training_by_text():
    train = open_source("reasoning_gym", name="chain_sum", size=300, seed=0, options=SMALL)
    test = open_source("reasoning_gym", name="chain_sum", size=50, seed=1, options=SMALL)
    kept, removed = held_out(train, test)
    tested = {row["prompt"] for row in test}
    assert [row["entry"] for row in kept] == [row["entry"] for row in train if row["prompt"] not in tested]
    assert removed == len(train) - len(kept) > 0
    with pytest.raises(ValueError, match="all 50 training prompts"):
        held_out(test, test)


def test_held_out_looks_through_spacing_and_messages():
    def source(*prompts):
        return Source(len(prompts), lambda i: {"prompt": prompts[i]}, ("prompt",))

    kept, removed = held_out(source("2+2? ", "3+3?", CHAT, "2+ 2?"), source(CHAT))
    assert removed == 2 and [prompt_text(row["prompt"]) for row in kept] == ["3+3?", "2+ 2?"]


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """Where the toy dataset has been prepared, as its user would: no TensorFlow involved."""
    folder = tmp_path_factory.mktemp("tfds")
    code = (
        "from toy_sums.toy_sums_dataset_builder import Builder; import sys;"
        "Builder(data_dir=sys.argv[1], file_format='array_record').download_and_prepare();"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code, folder], cwd=Path(__file__).parent, check=True, capture_output=True
    )
    return str(folder)


def test_tfds(tfds_folder):
    columns = {"columns": {"prompt": "question"}}
    source = open_source("tfds", name="toy_sums", path=tfds_folder, split="train", options=columns)
    assert sorted(row["answer"] for row in source) == [2 * i for i in range(10)]
    for row in (source[4], source[0]):
        i = row["answer"] // 2
        assert row == {
            "prompt": f"é\n{i}+{i}=",
            "answer": 2 * i,
            "tags": ["sum", f"n{i}"],
            "dialogue": [{"role": "system", "content": "Add."}, {"role": "user", "content": f"{i}+{i}"}],
            "meta": {"hard": i > 5, "weight": 0.5, "grid": [i, i]},
        }
    json.dumps(list(source))  # nothing of numpy is left
    part = open_source("tfds", name="toy_sums", path=tfds_folder, split="train[:30%]", options=columns)
    assert list(part) == [source[i] for i in range(3)]
    talk = open_source(
        "tfds", name="toy_sums", path=tfds_folder, split="test", options={"columns": {"prompt": "dialogue"}}
    )
    assert talk[0]["prompt"][0] == {"role": "system", "content": "Add."}
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "toy_sum", "split": "train"}, "no dataset 'toy_sum' in .*did you mean 'toy_sums'"),
        (
            {"name": "toy_sums", "split": "trian"},
            r"Unknown split 'trian'. Should be one of \['train', 'test'\]",
        ),
        (
            {"name": "toy_sums", "split": "train"},
            "row 1, column 'prompt': missing; there are answer, dialogue",
        ),
    ],
)
def test_tfds_errors(arguments, message, tfds_folder):
    with pytest.raises(ValueError, match=message):
        open_source("tfds", path=tfds_folder, **arguments)


def test_tfds_that_was_never_prepared(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"download_and_prepare\(\)"):
        open_source("tfds", name="mnist", path=str(tmp_path), split="train")


def test_importing_data_imports_no_heavy_library():
    modules = sorted(file.stem for file in Path(jaxrl_llm.data.__path__[0]).glob("*.py"))
    assert "sources" in modules
    heavy = ["jax", "transformers", "tokenizers", "sentencepiece", "tensorflow_datasets", "tensorflow"]
    heavy += ["reasoning_gym", "pyarrow", "torch"]
    code = (
        "import importlib, sys\n"
        f"for name in {modules}: importlib.import_module('jaxrl_llm.data.' + name)\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert out.stdout.strip() == "[]"
