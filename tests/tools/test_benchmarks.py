"""The benchmark drivers, with contenders that take no time: no peer is needed and nothing is timed."""

import importlib
import json
import pathlib
import re
import sys
import textwrap
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_llm.models.huggingface import load
from jaxrl_llm.models.huggingface_config import config_from_folder

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "tools" / "benchmarks"
MODULES = ("peers", "report", "toy", "harness", "sampler", "grpo_step", "loss", "rollout", "diffusion")


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The scripts as modules, which import one another by their bare names as scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "contenders"))
    yield importlib.import_module("worker")
    sys.modules.pop("worker", None)


@pytest.fixture
def loss_worker(worker: ModuleType) -> Iterator[ModuleType]:
    yield importlib.import_module("loss_worker")
    sys.modules.pop("loss_worker", None)


def contender(tools: SimpleNamespace, folder: pathlib.Path, name: str, body: str, **task: object):
    """A contender whose script talks to the driver through the real `worker.Channel`."""
    script = folder / f"{name}.py"
    head = f"import sys; sys.path.insert(0, {str(BENCHMARKS / 'contenders')!r})\nimport worker\n"
    script.write_text(head + "channel, task = worker.Channel(), worker.task()\n" + textwrap.dedent(body))
    return tools.harness.Contender(name, sys.executable, script, task, folder / f"{name}.log")


ECHO = """
    print("noise on stdout", flush=True)
    channel.send({"versions": {}, "logits": task["logits"]})
    while (request := channel.receive()) is not None:
        print("more noise", flush=True)
        channel.send({"seconds": task["seconds"] * request["factor"], "tokens": 6, "parts": {"rollout": 0.5}})
"""


@pytest.mark.parametrize("name", ["sampler", "grpo_step", "loss", "rollout"])
def test_defaults_and_flags(tools: SimpleNamespace, name: str, tmp_path: pathlib.Path) -> None:
    benchmark = getattr(tools, name).BENCHMARK
    args = tools.harness.parse_args([], benchmark)
    assert args.only == list(benchmark.scripts)
    assert args.repetitions >= 5 and args.warmup >= 1
    assert args.output.name == f"{name}.json" and args.tunix_python is None
    flags = ["--only", "google-tunix", "--tunix_python", "/x/python", "--output", str(tmp_path / "o.json")]
    args = tools.harness.parse_args(flags, benchmark)
    assert (args.only, args.tunix_python, args.output) == (["google-tunix"], "/x/python", tmp_path / "o.json")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--repetitions", "4"], "--repetitions=4: a median needs at least 5"),
        (["--warmup", "0"], "--warmup=0"),
        (["--only", "vllm"], "invalid choice: 'vllm'"),
    ],
)
def test_bad_flags_name_the_value(
    tools: SimpleNamespace, flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tools.harness.parse_args(flags, tools.sampler.BENCHMARK)
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sampler", "grpo_step", "loss", "rollout", "diffusion"])
def test_every_contender_has_its_script(tools: SimpleNamespace, name: str) -> None:
    benchmark = getattr(tools, name).BENCHMARK
    assert set(benchmark.scripts) == {*benchmark.own, *(peer.name for peer in benchmark.peers)}
    for script in benchmark.scripts.values():
        assert (BENCHMARKS / "contenders" / script).is_file()
    cases = set(next(benchmark.requests))
    assert {case for case, _ in benchmark.goals} <= cases


def test_missing_peer_says_how_to_install_it(tools: SimpleNamespace) -> None:
    with pytest.raises(tools.peers.Missing) as missing:
        tools.peers.find_python(tools.peers.TUNIX, "/nowhere/python", {})
    for part in ("google-tunix is skipped", "/nowhere/python", "pip install google-tunix==0.1.7"):
        assert part in str(missing.value)
    assert "--tunix_python=PATH" in str(missing.value) and "JAXRL_TUNIX_PYTHON=PATH" in str(missing.value)


def test_interpreter_without_the_peer_is_missing_too(tools: SimpleNamespace) -> None:
    peer = tools.peers.Peer("ghost", "ghost_python", "GHOST", ".venv-ghost", {"no-such-distribution": "1"})
    with pytest.raises(tools.peers.Missing, match="has no no-such-distribution"):
        tools.peers.find_python(peer, sys.executable, {})


def test_flag_wins_over_variable_wins_over_folder(
    tools: SimpleNamespace, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def python(path: pathlib.Path) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\nexit 0\n")
        path.chmod(0o755)
        return str(path)

    find, peer = tools.peers.find_python, tools.peers.TUNIX
    monkeypatch.setattr(tools.peers, "PROJECT", tmp_path)
    with pytest.raises(tools.peers.Missing, match=re.escape(str(tmp_path / ".venv-tunix"))):
        find(peer, None, {})
    folder = python(tmp_path / ".venv-tunix" / "bin" / "python")
    variable, flag = python(tmp_path / "variable"), python(tmp_path / "flag")
    assert find(peer, None, {}) == folder
    assert find(peer, None, {"JAXRL_TUNIX_PYTHON": variable}) == variable
    assert find(peer, flag, {"JAXRL_TUNIX_PYTHON": variable}) == flag
    with pytest.raises(tools.peers.Missing, match="/nowhere"):  # what was asked for, and no other
        find(peer, "/nowhere", {"JAXRL_TUNIX_PYTHON": variable})


def test_other_versions_are_noted(tools: SimpleNamespace) -> None:
    differences = tools.peers.TORCH.differences
    assert differences({"transformers": "5.23.0", "torch": "2.13.0+cpu"}) == []
    assert differences({"transformers": "5.24.0", "torch": "2.13.0"}) == [
        "note: transformers is 5.24.0 here, and the goals are about 5.23.0"
    ]


def test_peers_of_one_environment_share_its_flag(
    tools: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tools.harness.parse_args(["--help"], tools.loss.BENCHMARK)
    said = capsys.readouterr().out
    assert said.count("  --torch_python PATH") == 1
    assert "trl==1.16.0" in said and "liger-kernel==0.8.5" in said


def test_nothing_installed_is_said_and_nothing_written(
    tools: SimpleNamespace, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--only",
        "google-tunix",
        "--tunix_python",
        "/nowhere",
        "--output",
        str(tmp_path / "a" / "b.json"),
    ]
    with pytest.raises(SystemExit, match="nothing to measure"):
        tools.harness.run(flags, tools.grpo_step.BENCHMARK)
    assert "google-tunix is skipped" in capsys.readouterr().out
    assert not (tmp_path / "a").exists()


def test_speedup_is_the_ratio_of_medians_with_the_range_of_rounds(tools: SimpleNamespace) -> None:
    row = tools.report.Row
    rows = [row("c", "jaxrl_llm", [1.0, 2.0, 4.0], 100), row("c", "peer", [5.0, 8.0, 6.0], 100)]
    assert tools.report.speedups(rows) == {("c", "peer"): (3.0, 1.5, 5.0)}
    assert tools.report.speedups(rows[1:]) == {}


def test_table(tools: SimpleNamespace) -> None:
    row = tools.report.Row
    rows = [
        row("cold", "jaxrl_llm", [0.5, 0.4, 0.6], 2048, {"rollout": [0.1, 0.2, 0.3]}),
        row("cold", "peer", [1.5, 1.4, 1.6], 2048),
        row("warm", "jaxrl_llm", [1.0], 10),
        row("warm", "peer", [1.9], 10),
        row("warm", "other", [1.9], 10),
    ]
    assert tools.report.table([], {}) == ""
    table = tools.report.table(rows, {("cold", "peer"): 2.0, ("warm", "peer"): 2.0})
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 2 + len(rows)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2] == ["cold", "jaxrl_llm", "0.500 (0.400–0.600)", "4,096", "rollout 0.200", "", ""]
    assert cells[3] == [
        "cold",
        "peer",
        "1.500 (1.400–1.600)",
        "1,365",
        "",
        "3.00× (2.67–3.50)",
        "2×: reached",
    ]
    assert cells[5][5:] == ["1.90× (1.90–1.90)", "2×: missed"]
    assert cells[6][5:] == ["1.90× (1.90–1.90)", ""]


def test_turns_alternate_and_warmup_is_not_counted(
    tools: SimpleNamespace, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = contender(tools, tmp_path, "jaxrl_llm", ECHO, seconds=1.0, logits=[0.0, 1.0])
    peer = contender(tools, tmp_path, "peer", ECHO, seconds=3.0, logits=[0.0, 1.0 + 1e-5])
    try:
        tools.harness.check_same_model([ours, peer])
        rounds = iter([{"case": {"factor": factor}} for factor in (100, 1, 2, 3)])
        rows = tools.harness.measure([ours, peer], rounds, warmup=1, repetitions=3)
    finally:
        ours.close()
        peer.close()
    assert [(row.contender, row.seconds, row.tokens) for row in rows] == [
        ("jaxrl_llm", [1.0, 2.0, 3.0], 6),
        ("peer", [3.0, 6.0, 9.0], 6),
    ]
    assert rows[0].parts == {"rollout": [0.5, 0.5, 0.5]}
    assert tools.report.speedups(rows) == {("case", "peer"): (3.0, 3.0, 3.0)}
    turns = [line.split()[3] for line in capsys.readouterr().out.splitlines() if line.startswith("round")]
    assert turns == ["jaxrl_llm", "peer", "peer", "jaxrl_llm", "jaxrl_llm", "peer"]
    assert "more noise" in (tmp_path / "peer.log").read_text()
    record = tools.report.record(rows, {"peer": {"x": "1"}}, {"new_tokens": 3}, 0.1)
    assert json.loads(json.dumps(record))["rows"][1]["median"] == 6.0


def test_different_models_are_refused(tools: SimpleNamespace) -> None:
    def sent(name: str, *logits: float) -> SimpleNamespace:
        return SimpleNamespace(name=name, about={"logits": logits})

    with pytest.raises(RuntimeError, match=r"a and b run different models: logits 0\.5 apart"):
        tools.harness.check_same_model([sent("a", 0.0, 1.0), sent("b", 0.0, 1.5)])
    with pytest.raises(RuntimeError, match="different models"):
        tools.harness.check_same_model([sent("a", 0.0), sent("b", float("nan"))])


def test_a_contender_that_dies_shows_its_last_words(tools: SimpleNamespace, tmp_path: pathlib.Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)exit code 3.*out of luck"):
        contender(tools, tmp_path, "early", 'print("out of luck"); sys.exit(3)')
    dying = 'channel.send({}); channel.receive(); raise KeyError("later")'
    late = contender(tools, tmp_path, "late", dying)
    with pytest.raises(RuntimeError, match=r"(?s)exit code 1.*KeyError: 'later'"):
        late.ask({})
    late.close()


def test_different_numbers_of_tokens_are_refused(tools: SimpleNamespace, tmp_path: pathlib.Path) -> None:
    body = """
        channel.send({})
        while (request := channel.receive()) is not None:
            channel.send({"seconds": 1.0, "tokens": request["tokens"]})
    """
    short = contender(tools, tmp_path, "short", body)
    rounds = iter([{"case": {"tokens": tokens}} for tokens in (7, 8, 7)])
    with pytest.raises(RuntimeError, match=r"short wrote different numbers of tokens.*\[7, 8\]"):
        tools.harness.measure([short], rounds, warmup=1, repetitions=2)
    short.close()


def test_model_folder(tools: SimpleNamespace, tmp_path: pathlib.Path) -> None:
    config = {**tools.toy.QWEN3, "num_hidden_layers": 2, "vocab_size": 64}
    for name in ("a", "b"):
        tools.toy.write_model(tmp_path / name, config)
    tensors, again = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert len(tensors) == 2 + 2 * 11
    assert all(tensor.dtype == np.float32 for tensor in tensors.values())
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (4 * 32, 256)
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape == (256, 768)
    assert all(np.array_equal(tensor, again[name]) for name, tensor in tensors.items())
    assert json.loads((tmp_path / "a" / "config.json").read_text())["vocab_size"] == 64


def test_requests_have_new_prompts_each_round(tools: SimpleNamespace) -> None:
    rounds = tools.sampler.requests()
    first, second = next(rounds), next(rounds)
    for request in first.values():
        prompts = np.array(request["prompts"])
        assert len(prompts) * request["num_generations"] == 16 and prompts.shape[1] == 64
        assert prompts.min() >= 0 and prompts.max() < 4096
    assert first["temperature 1"]["prompts"] == first["top-p 0.95"]["prompts"]
    assert first["temperature 1"]["prompts"] != second["temperature 1"]["prompts"]
    assert first["temperature 1"]["seed"] != second["temperature 1"]["seed"]


def test_cases_and_rounds_are_the_benchmarks_own(
    tools: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    parse, rollout = tools.harness.parse_args, tools.rollout.BENCHMARK
    args = parse([], rollout)
    assert args.cases == list(rollout.cases) and args.repetitions == rollout.repetitions
    assert parse(["--cases", "queue", "retraces"], rollout).cases == ["queue", "retraces"]
    assert not hasattr(parse([], tools.sampler.BENCHMARK), "cases")
    with pytest.raises(SystemExit):
        parse(["--cases", "tail"], rollout)
    assert "invalid choice: 'tail'" in capsys.readouterr().err


def test_long_tailed_lengths(tools: SimpleNamespace) -> None:
    lengths = np.array(tools.rollout.long_tail())
    assert lengths.shape == (256,) and lengths.min() >= 1 and lengths.max() == 512
    assert abs(lengths.mean() - 64) < 0.1 and np.median(lengths) < 45
    assert lengths.tolist() == tools.rollout.long_tail()


def test_rollout_requests_share_no_prompts(tools: SimpleNamespace) -> None:
    """What one case has left in a cache must not help another, nor a later round."""
    rounds = tools.rollout.requests(tools.rollout.TOY)
    wanted = [request for _ in range(2) for request in next(rounds).values()]
    prompts = [tuple(prompt[:64]) for request in wanted for prompt in request["prompts"]]
    assert len(set(prompts)) == len(prompts)
    for request in wanted:
        assert len(request["new_tokens"]) == len(request["prompts"]) * request["num_generations"]


def test_rollout_goals_are_about_the_fastest(tools: SimpleNamespace) -> None:
    def goals(case: str, **seconds: float) -> dict[str, float]:
        names = {
            "ours": "jaxrl_llm",
            "cb": "transformers-cb",
            "bare": "bare products",
            "tunix": "google-tunix",
        }
        rows = [tools.report.Row(case, names.get(name, name), [s], 1) for name, s in seconds.items()]
        return {peer: goal for (_, peer), goal in tools.rollout.goals(rows).items()}

    assert goals("queue", ours=1.0, tunix=5.0, gemma=4.0, cb=2.0) == {"gemma": 3.0, "transformers-cb": 1.5}
    assert goals("first token", ours=1.0, tunix=5.0, gemma=4.0) == {"google-tunix": 4.0}
    assert goals("0.6B, float32", ours=1.0, bare=0.9, tunix=5.0) == {
        "google-tunix": 1.0,
        "bare products": 0.8,
    }
    assert goals("16 rows, T = 1", ours=1.0, tunix=5.0, cb=4.0) == {"transformers-cb": 2.0}
    assert goals("64 rows, top-p .95", ours=1.0, tunix=5.0) == {"google-tunix": 6.0}
    assert goals("queue", ours=1.0) == {}


def test_rollout_foot_says_whether_anything_was_compiled(tools: SimpleNamespace) -> None:
    reply = {"requests": 1000, "tokens": 65_432, "traced": 0, "compiled": 0}
    line = tools.rollout.retraces_line(reply)
    assert line.startswith("1,000 requests") and "65,432" in line and line.endswith("reached)")
    assert tools.rollout.retraces_line(reply | {"traced": 1}).endswith("missed)")


@pytest.fixture
def rollout_worker(worker: ModuleType) -> Iterator[ModuleType]:
    yield importlib.import_module("rollout_worker")
    sys.modules.pop("rollout_worker", None)


def test_batches_without_refill_go_on_until_their_longest_row(rollout_worker: ModuleType) -> None:
    wanted = rollout_worker.Wanted([[1], [2], [3], [4], [5]], 1, [2, 7, 1, 3, 4], 2, 8, 1.0, 1.0, 0)
    calls = []

    def generate(rows: slice, new_tokens: int) -> list[list[int]]:
        calls.append((wanted.prompts[rows], new_tokens))
        return [prompt * new_tokens for prompt in wanted.prompts[rows]]

    completions = rollout_worker.in_batches(wanted, generate)
    assert calls == [([[1], [2]], 7), ([[3], [4]], 3), ([[5]], 4)]
    assert completions == [[1] * 2, [2] * 7, [3], [4] * 3, [5] * 4]


def test_rollout_answers(rollout_worker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves on by one second per new token of the longest row, and two for the prompts."""
    now, asked = [0.0], []
    monkeypatch.setattr(rollout_worker.time, "perf_counter", lambda: now[0])

    def plan(wanted: Any) -> Any:
        def call() -> list[list[int]]:
            asked.append(wanted)
            now[0] += 2 + max(wanted.new_tokens)
            return [[0] * n for n in wanted.new_tokens]

        return call

    contender = SimpleNamespace(queue_rows=3, plan=plan)
    request = {"prompts": [[1, 2]], "num_generations": 2, "new_tokens": [4, 5], "rows": None}
    request |= {"temperature": 1.0, "top_p": 1.0, "seed": 0}
    assert rollout_worker.answer(contender, request) == {"seconds": 7.0, "tokens": 9}
    assert asked[0].prompts == [[1, 2], [1, 2]] and (asked[0].rows, asked[0].room) == (3, 7)
    reply = rollout_worker.answer(contender, request | {"decode_alone": True, "rows": 2})
    assert reply == {"seconds": 4.0, "tokens": 7, "parts": {"each step": 1.0}}
    assert asked[2].prompts == [[2, 1], [2, 1]] and (asked[2].rows, asked[2].room) == (2, 7)
    contender.plan = lambda wanted: lambda: [[0], [0]]
    with pytest.raises(RuntimeError, match=r"wanted rows of \[4, 5\] new tokens and got \[1, 1\]"):
        rollout_worker.answer(contender, request)


def test_worker_tokenizer_and_reward(worker: ModuleType) -> None:
    numbers = worker.Numbers(4096)
    assert numbers.decode([17, 3, 250]) == "17 3 250" and numbers.encode("17 3 250") == [17, 3, 250]
    assert numbers.eos_id() == 4096 and numbers.pad_id() == 4096  # never sampled
    assert worker.even_share([], [], [[2, 4, 5, 7], [1], [8, 8]]) == [0.5, 0.0, 1.0]


def prepared(policy: float, hidden: float = 2.0, head: float = 3.0, **other: float) -> dict[str, object]:
    return {"losses": {"policy": policy, **other}, "gradients": [hidden, head]}


def test_same_losses_pass_and_others_are_refused(tools: SimpleNamespace) -> None:
    check = tools.loss.check_same_loss
    entropy_alone = {"losses": {"cross": 7.0}, "gradients": [90.0, 80.0]}
    check({"a": prepared(1.0, cross=7.0), "b": prepared(1.00009, 2.0019), "c": entropy_alone})
    check({"a": prepared(-1.0), "b": prepared(-1.00009)})
    with pytest.raises(RuntimeError, match=r"a and b compute different losses: policy 1 and 1\.0002"):
        check({"a": prepared(1.0), "b": prepared(1.0002)})
    with pytest.raises(RuntimeError, match="policy -1 and 1"):
        check({"a": prepared(-1.0), "b": prepared(1.0)})
    with pytest.raises(RuntimeError, match=r"policy, gradient of head 3 and 3\.01"):
        check({"a": prepared(1.0), "b": prepared(1.0, head=3.01)})
    with pytest.raises(RuntimeError, match=r"a and c .*: cross 6 and 7"):
        check({"a": prepared(1.0, cross=6.0), "c": entropy_alone})
    with pytest.raises(RuntimeError, match="nan"):
        check({"a": prepared(1.0), "b": prepared(float("nan"))})


def test_the_goal_is_about_the_fastest_other(tools: SimpleNamespace) -> None:
    row = tools.report.Row
    slow = [row("x", "jaxrl_llm", [1.0], 1), row("x", "a", [3.0], 1), row("x", "b", [2.0], 1)]
    fast = [row("y", "jaxrl_llm", [9.0], 1), row("y", "a", [1.0], 1), row("y", "b", [2.0], 1)]
    assert tools.loss.fastest_goals(slow + fast) == {("x", "b"): 1.25, ("y", "a"): 1.25}
    assert tools.loss.fastest_goals(slow[:1]) == {}


def test_tables_of_the_loss(tools: SimpleNamespace) -> None:
    def cells(table: str) -> list[list[str]]:
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]

    row, mib = tools.report.Row, 2**20
    rows = [
        row("x", "jaxrl_llm", [1.4, 1.2, 9.0], 1, {"products": [1.0, 8.0, 0.5]}),
        row("x", "naive", [2.0] * 3, 1),
        row("y", "jaxrl_llm", [1.6], 1, {"products": [1.0]}),
    ]
    sizes = {("x", "jaxrl_llm"): 2 * mib, ("x", "naive"): 32 * mib, ("y", "jaxrl_llm"): 3 * mib}
    lines = cells(tools.loss.work_table(rows, sizes))[2:]
    assert lines == [
        ["x", "1.400", "1.000", "1.40×", "≤ 1.5×: reached", "2.0", "32.0", "16.0×", "16×: reached"],
        ["y", "1.600", "1.000", "1.60×", "≤ 1.5×: missed", "3.0", "", "", ""],
    ]
    table = tools.loss.tpu_table({"jaxrl_llm": 2**30 // 10, "google-tunix": 5 * 2**29, "naive": None})
    lines = cells(table)
    assert lines[2:4] == [["jaxrl_llm", "0.10", "≤ 0.10: reached"], ["google-tunix", "2.50", ""]]
    assert "naive was not compiled for the TPU" in table and "pip install -e '.[tpu]'" in table
    nothing = tools.loss.tpu_table({"jaxrl_llm": None})
    assert nothing.startswith("jaxrl_llm was not compiled") and "|" not in nothing


SMALL = {"sequences": 3, "tokens": 16, "features": 8, "vocab": 512}


def by_hand(problem: Any) -> tuple[float, float, list[float]]:
    """Policy loss, cross-entropy, norms of the gradients of hidden and head: the formulas in float64."""
    hidden = problem.hidden.reshape(-1, problem.hidden.shape[-1]).astype(float)
    head, rows, targets = problem.head.astype(float), np.arange(len(hidden)), problem.targets.reshape(-1)
    z = hidden @ head.T
    logp = z - np.log(np.exp(z).sum(1, keepdims=True))
    advantages = np.repeat(problem.advantages, problem.targets.shape[1])
    weights = problem.mask.reshape(-1) / problem.mask.sum()
    chosen = logp[rows, targets]
    ratio = np.exp(chosen - problem.old_logp.reshape(-1))
    free, bound = ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages
    by_logp = np.where(free <= bound, -free, 0) * weights
    by_logits = -np.exp(logp) * by_logp[:, None]
    by_logits[rows, targets] += by_logp
    norms = [float(np.linalg.norm(gradient)) for gradient in (by_logits @ head, by_logits.T @ hidden)]
    return float(-np.sum(np.minimum(free, bound) * weights)), float(-chosen.mean()), norms


def test_the_problem_of_the_loss(loss_worker: ModuleType) -> None:
    problem = loss_worker.make_problem(**SMALL)
    for array, again in zip(problem, loss_worker.make_problem(**SMALL)):
        assert np.array_equal(array, again)
    assert problem.targets.min() >= 0 and problem.targets.max() < 512
    z = problem.hidden @ problem.head.T
    logp = np.take_along_axis(z - np.log(np.exp(z).sum(-1, keepdims=True)), problem.targets[..., None], -1)
    ratio = np.exp(logp[..., 0] - problem.old_logp)[problem.mask > 0]
    clipped = np.mean(abs(ratio - 1) > 0.2)
    assert 0.1 < clipped < 0.7 and abs(np.log(ratio)).max() < 2
    lengths = problem.mask.sum(1)
    assert ((lengths >= 8) & (lengths <= 16)).all() and len(set(lengths)) > 1


@pytest.mark.parametrize("script", ["ours_loss.py", "naive_loss.py"])
def test_contenders_compute_the_loss_of_the_formulas(
    tools: SimpleNamespace, loss_worker: ModuleType, tmp_path: pathlib.Path, script: str
) -> None:
    path, log = BENCHMARKS / "contenders" / script, tmp_path / "log"
    contender = tools.harness.Contender("jaxrl_llm", sys.executable, path, {"threads": 2}, log)
    try:
        reply, timed = contender.ask({"prepare": SMALL}), contender.ask({"time": True})
    finally:
        contender.close()
    policy, cross_entropy, norms = by_hand(loss_worker.make_problem(**SMALL))
    np.testing.assert_allclose(reply["losses"]["policy"], policy, rtol=1e-4)
    np.testing.assert_allclose(reply["losses"]["cross-entropy"], cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(reply["gradients"], norms, rtol=1e-4)
    assert reply["temporaries"] > 0
    assert timed["tokens"] == 3 * 16 and timed["seconds"] > 0
    assert ("parts" in timed) == (script == "ours_loss.py")


def test_lines_of_the_diffusion_benchmark(tools: SimpleNamespace, tmp_path: pathlib.Path) -> None:
    row, driver = tools.report.Row, tools.diffusion
    rows = [
        row(f"{name}, batch 1", "jaxrl_llm", [seconds, 9.0, 0.1], 64)
        for name, seconds in (("plain", 1.0), ("FoCore", 1.8), ("8 blocks", 2.0))
    ]
    assert driver.own_lines(rows) == ["batch 1: a step of FoCore takes 1.80× that of plain (≤ 1.9×: reached)"]
    assert "4.00× fewer (3×: reached)" in driver.operations_line({"none": 8e9, "dual": 2e9})
    assert driver.retraces_line({"values": 8, "traced": 1, "compiled": 0}).endswith("(none wanted: missed)")
    assert max(max(prompt) for prompt in driver.random_prompts(0, 300)) == driver.LLADA["mask_token_id"] - 1
    small = driver.LLADA | {
        **{"d_model": 16, "mlp_hidden_size": 24, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2},
        **{"vocab_size": 32, "embedding_size": 32, "mask_token_id": 31},
    }
    driver.write_model(tmp_path, small)
    cfg = config_from_folder(tmp_path)
    assert cfg.mask_id == 31 and load(tmp_path, cfg)["layers"]["gate"].shape == (2, 16, 24)
