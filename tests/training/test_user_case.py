"""A user's own model, data and reward, through `configs/grpo.py` and `configs/sft.py`, on a real terminal."""

import json
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest

from jaxrl_llm.models import huggingface, huggingface_config, transformer
from jaxrl_llm.models import params as params_lib
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.training.checkpoints import Checkpoints

ROOT = Path(__file__).parents[2]
STEPS = 4

REWARD = """
import os, time

def score(completions, completion_ids, answer, **columns):
    assert set(columns["level"]) <= {"easy", "hard"}
    with open("calls", "a") as file:
        file.write("x")
    while os.path.exists("slow"):
        time.sleep(0.05)
    return [(str(a) in text.split()) + 0.1 * len(set(ids))
            for text, ids, a in zip(completions, completion_ids, answer)]
"""
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
GRPO = (
    "--config=configs/grpo.py:model",
    "--config.data.train.path=train.jsonl",
    "--config.reward.functions=('reward.py:score',)",
    f"--config.num_steps={STEPS}",
    "--config.rollout.prompts_per_step=4",
    "--config.rollout.num_generations=4",
    "--config.rollout.max_completion_length=8",
    "--config.data.max_prompt_length=16",
    "--config.optimizer.learning_rate=1e-2",
    "--config.reward.workers=1",
    "--config.log.plots=False",
)
SFT = (
    "--config=configs/sft.py:model",
    "--config.supervised.num_steps=4",
    "--config.supervised.batch_rows=2",
    "--config.supervised.max_length=32",
    "--config.log.plots=False",
)


def write_tokenizer(folder: Path, more: int = 0) -> None:
    """One token per word; `more` words than the problems need."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", *map(str, range(12)), "what", "is", "plus", "user", "assistant"]
    words += [f"more{i}" for i in range(more)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE
    ).save_pretrained(folder)


def write_model(folder: Path) -> None:
    """A random model of some thousand params, with its tokenizer."""
    cfg = ModelConfig(
        vocab_size=24,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=32,
    )
    params = params_lib.init(jax.random.key(0), transformer.param_specs(cfg))
    huggingface.save(folder, params, cfg, hf_config={"eos_token_id": 1})
    write_tokenizer(folder)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """What a user has: a model's folder, files of rows, a reward; and the configs of this project."""
    home = tmp_path_factory.mktemp("home")
    write_model(home / "model")
    shutil.copytree(home / "model", home / "words")
    write_tokenizer(home / "words", more=9)
    (home / "configs").symlink_to(ROOT / "configs")
    (home / "reward.py").write_text(REWARD)

    problems = [(f"what is {a} plus {b}", str(a + b)) for a in range(6) for b in range(6)]
    rows = [{"prompt": q, "answer": a, "level": "easy" if a < "5" else "hard"} for q, a in problems]
    write_rows(home / "train.jsonl", rows)
    write_rows(home / "test.jsonl", rows[:4])
    write_rows(home / "malformed.jsonl", [*rows[:4], rows[4] | {"prompt": 7}])
    long = {"prompt": "what is " + "1 plus " * 9 + "1", "answer": "10", "level": "hard"}
    write_rows(home / "long.jsonl", [*rows[:20], long])
    write_rows(home / "all_long.jsonl", [long] * 9)
    write_rows(home / "level.jsonl", [{"prompt": q, "level": "easy"} for q, _ in problems])
    write_rows(home / "plain.jsonl", [{"prompt": q, "completion": a} for q, a in problems])
    chat = [
        {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
        for q, a in problems
    ]
    write_rows(home / "mended.jsonl", chat[:14])
    wrong = chat[4] | {"completion": [{"role": "user", "content": "7"}]}
    # the last of the first epoch, so some steps come before it
    write_rows(home / "chat.jsonl", [*chat[:4], wrong, *chat[5:14]])
    return home


@pytest.fixture(scope="module")
def environment(home) -> dict[str, str]:
    return os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2",  # the last counts
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "TERM": "xterm",
    }


Reply = tuple[int, str, str]
"""Exit code, standard output, standard error."""


class Scripts:
    """The console scripts, one after another, without paying for the imports each time."""

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "training" / "commands_child.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=home,
            env=environment,
            text=True,
        )

    def start(self, *command: str) -> None:
        print(json.dumps(command), file=self.process.stdin, flush=True)

    def reply(self) -> Reply:
        assert self.process.stdout is not None
        code, out, err = json.loads(self.process.stdout.readline())
        return code, out, err

    def __call__(self, *command: str) -> Reply:
        self.start(*command)
        return self.reply()


@pytest.fixture(scope="module")
def ask(home, environment) -> Iterator[Scripts]:
    """ask(script, *arguments) -> its `Reply`."""
    scripts = Scripts(home, environment)
    with scripts.process:
        yield scripts
    assert scripts.process.returncode == 0


class Terminal:
    """A script on a pseudo-terminal of its own, whose Ctrl-C it gets."""

    def __init__(self, home: Path, scripts: Scripts, *command: str) -> None:
        self._parent, self._terminal = pty.openpty()
        self._calls = home / "calls"
        self._calls.write_text("")
        self._output = b""
        self._scripts = scripts
        scripts.start("terminal", os.ttyname(self._terminal), *command)
        os.set_blocking(self._parent, False)
        self.workers: list[int] = []

    def _read(self) -> bool:
        """Takes what is there; whether more may come."""
        try:
            data = os.read(self._parent, 1 << 16)
        except BlockingIOError:
            time.sleep(0.01)
            return True
        except OSError:  # Linux reports the closed terminal so
            return False
        self._output += data
        return bool(data)

    def wait_for_calls(self, count: int) -> None:
        """Until the reward is being asked for the `count`th time."""
        deadline = time.monotonic() + 120
        while len(self._calls.read_text()) < count:
            assert self._read() and time.monotonic() < deadline, self._output.decode()
        if self.workers:
            return
        (run,) = psutil.Process(self._scripts.process.pid).children()
        os.close(self._terminal)  # the run has it open by now, and is to be the last that does
        self.workers = [child.pid for child in run.children(recursive=True)]
        assert self.workers

    def wait_for(self, text: bytes) -> None:
        deadline = time.monotonic() + 60
        while text not in self._output:
            assert self._read() and time.monotonic() < deadline, self._output.decode()

    def ctrl_c(self) -> None:
        os.write(self._parent, b"\x03")

    def end(self) -> tuple[int, str]:
        """Exit code and all output, once the process has ended."""
        deadline = time.monotonic() + 120
        while self._read():
            assert time.monotonic() < deadline, self._output.decode()
        code, _, _ = self._scripts.reply()
        os.close(self._parent)
        return code, self._output.decode()

    def no_worker_is_left(self) -> bool:
        deadline = time.monotonic() + 5
        while any(map(psutil.pid_exists, self.workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return not any(map(psutil.pid_exists, self.workers))


@pytest.fixture(scope="module")
def trained(home, ask) -> Path:
    """A run that Ctrl-C ended after a step, that two of them ended at once when it had gone on, and whole."""
    command = ("train", *GRPO, "--workdir=run")
    (home / "slow").touch()
    first = Terminal(home, ask, *command)
    first.wait_for_calls(1)
    (home / "slow").unlink()
    first.wait_for_calls(2)
    first.ctrl_c()
    code, out = first.end()
    assert code == 0 and "Traceback" not in out, out
    assert "SIGINT: finishing this step, then saving" in out
    done = int(out.split("saved at step ")[1].split(" of ")[0])
    assert f"saved at step {done} of {STEPS}; the same command goes on from there" in out
    assert done < STEPS and first.no_worker_is_left()

    (home / "slow").touch()
    second = Terminal(home, ask, *command)
    second.wait_for_calls(1)
    second.ctrl_c()
    second.wait_for(b"finishing this step")
    second.ctrl_c()
    code, out = second.end()
    assert code == 130 and "SIGINT: stopping at once" in out and "Traceback" not in out, out
    assert second.no_worker_is_left()

    (home / "slow").unlink()
    (home / "calls").unlink()
    code, out, err = ask(*command)
    assert code == 0 and "run/export" in out and not err, out + err
    assert len((home / "calls").read_text()) == STEPS - done  # it went on, and did nothing twice
    return home / "run"


def test_metrics_have_every_step_once(trained):
    steps = [json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


def test_export_is_the_trained_policy_for_us_and_for_transformers(home, trained):
    from transformers import AutoConfig, AutoTokenizer

    cfg = huggingface_config.config_from_folder(trained / "export")
    assert cfg == huggingface_config.config_from_folder(home / "model")
    exported = huggingface.load(trained / "export", cfg)
    abstract = params_lib.abstract(transformer.param_specs(cfg))
    with Checkpoints(trained / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest() == STEPS
        final = checkpoints.restore({"params": abstract}, partial=True)[0]["params"]
    jax.tree.map(np.testing.assert_array_equal, exported, final)
    before = huggingface.load(home / "model", cfg)
    assert not np.array_equal(exported["embed"], before["embed"])

    config = AutoConfig.from_pretrained(trained / "export")
    assert (config.model_type, config.vocab_size, config.eos_token_id) == ("qwen3", 24, 1)
    text = "what is 3 plus 4"
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (trained / "export", home / "model"))
    assert ours(text)["input_ids"] == theirs(text)["input_ids"] == [14, 15, 5, 16, 6]
    assert ours.chat_template == TEMPLATE and ours.eos_token_id == 1


def test_evaluate_and_sample_an_exported_folder(home, trained, ask):
    exported = ("--config=configs/grpo.py:run/export", "--config.rollout.max_completion_length=8")
    (home / "train.jsonl").rename(home / "away.jsonl")  # neither needs the training rows
    try:
        evaluated = ask(
            "evaluate",
            *exported,
            "--config.data.max_prompt_length=16",
            "--config.eval.data.path=test.jsonl",
            "--config.eval.num_generations=4",
            "--config.mesh.data=2",
            "--config.reward.functions=('exact_match',)",
            "--out=figures.json",
        )
        sampled = ask("sample", *exported, "--prompt=what is 1 plus 2", "--count=3")
    finally:
        (home / "away.jsonl").rename(home / "train.jsonl")
    code, out, err = evaluated
    assert code == 0 and "4 held-out problems, the initial params" in out and not err, out + err
    figures = json.loads((home / "figures.json").read_text())
    assert figures["step"] is None and figures["eval/mean@4"] <= figures["eval/pass@4"] <= 1
    code, out, err = sampled
    words = {*map(str, range(12)), "what", "is", "plus", "user", "assistant"}
    assert code == 0 and len(out.splitlines()) == 3 and set(out.split()) <= words and not err, out + err


def supervised_steps(workdir: Path) -> list[int]:
    cfg = huggingface_config.config_from_folder(workdir / "export")
    huggingface.load(workdir / "export", cfg)
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_supervised_from_plain_text(home, ask):
    code, out, err = ask("train", *SFT, "--workdir=plain", "--config.supervised.train.path=plain.jsonl")
    assert code == 0 and "plain/export" in out and not err, out + err
    assert supervised_steps(home / "plain") == [1, 2, 3, 4]


def test_supervised_from_messages_when_a_row_is_refused_on_the_way(home, ask):
    """The row is named, the steps before it are saved, and with the row mended the same command goes on."""
    command = ("train", *SFT, "--workdir=chat", "--config.supervised.train.path=chat.jsonl")
    code, _, err = ask(*command)
    assert code == 1 and "Traceback" not in err, err
    assert "chat.jsonl, row 5, column 'completion': a completion begins and ends with an assistant" in err
    step = int(err.split("Saved at step ")[1].split(" of 4: once this is mended")[0])
    assert step > 0
    (home / "mended.jsonl").replace(home / "chat.jsonl")
    code, out, err = ask(*command)
    assert code == 0 and not err, out + err
    assert supervised_steps(home / "chat") == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("script", "flag"), [("train", "--workdir"), ("evaluate", "--out"), ("sample", "--count")]
)
def test_console_scripts_show_their_flags(ask, script, flag):
    _, out, _ = ask(script, "--helpshort")
    assert "--config" in out and flag in out and f"python -m jaxrl_llm.{script}" in out


NEW = ("train", *GRPO, "--workdir=new")
NO_TASK = (
    *NEW,
    "--config.data.train.kind=reasoning_gym",
    "--config.data.train.path=",
    "--config.data.train.size=9",
    "--config.data.train.name=basic_arithmetics",
)
MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "flag": ((*NEW, "--workdri=x"), "workdir"),
    "key": ((*NEW, "--config.optimizer.learning_rat=1"), "learning_rate"),
    "group of keys": ((*NEW, "--config.optimiser.learning_rate=1"), "optimizer"),
    "choice": ((*NEW, "--config.loss.loss_aggregation=token_meen"), "did you mean 'token_mean'?"),
    "task": (NO_TASK, "basic_arithmetic"),
    "divisor": ((*NEW, "--config.train.micro_batch_rows=5"), "micro_batch_rows=5 does not divide"),
    "mesh": ((*NEW, "--config.mesh.fsdp=3"), "needs 3 devices, there are 2"),
    "too few": (
        (*NEW, "--config.rollout.num_generations=0"),
        "rollout.num_generations=0: at least 1",
    ),
    "no such reward": (
        (*NEW, "--config.reward.functions=('exact_mach',)"),
        "exact_match",
    ),
    "no reward file": (
        (*NEW, "--config.reward.functions=('rewart.py:score',)"),
        "there is no file",
    ),
    "no reward function": (
        (*NEW, "--config.reward.functions=('reward.py:scor',)"),
        "reward.py has no function 'scor'; its functions are ['score']",
    ),
    "no config": (("train", "--config=configs/grop.py", "--workdir=new"), "configs/grop.py"),
    "argument of a config": (
        ("train", "--config=configs/quickstart.py:smoek", "--workdir=new"),
        "unknown argument 'smoek'; 'smoke' or none",
    ),
    "no folder": ((*NEW, "--config.model.path=modle"), "no tokenizer folder at 'modle'"),
    "vocabulary": (
        (*NEW, "--config.model.path=words"),
        "the tokenizer has 28 ids and the model's vocabulary 24 rows",
    ),
    "no rows": ((*NEW, "--config.data.train.path=trian.jsonl"), "no file at 'trian.jsonl'"),
    "malformed": (
        (*NEW, "--config.data.train.path=malformed.jsonl"),
        "malformed.jsonl, row 5, column 'prompt': text or a list of messages was expected, not 7",
    ),
    "too long": (
        (*NEW, "--config.data.train.path=long.jsonl", "--config.data.overlong_prompts=error"),
        "the prompt of long.jsonl, row 21 has 21 tokens, more than max_prompt_length=16: raise the limit",
    ),
    "all too long": (
        (*NEW, "--config.data.train.path=all_long.jsonl"),
        "no training row has at most data.max_prompt_length=16 tokens: raise the limit",
    ),
    "no completion": (
        ("train", *SFT, "--workdir=new", "--config.supervised.train.path=level.jsonl"),
        "level.jsonl, row 1 needs a prompt and a completion",
    ),
    "rewards of one name": (
        (*NEW, "--config.reward.functions=('reward.py:score', 'reward.py:score')"),
        "distinct names",
    ),
    "ranges": ((*NEW, "--config.rollout.top_p=0"), "rollout.top_p=0.0: above 0 and at most 1"),
    "workdir is a file": (("train", *GRPO, "--workdir=train.jsonl"), "cannot write in train.jsonl"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_error(home, ask, name):
    command, message = MISTAKES[name]
    code, _, err = ask(*command)
    assert code == 1 and message in err and "Traceback" not in err, err
    assert not (home / "new").exists()


WITH_A_RUN = {
    "another config": (("train", *GRPO, "--config.loss.epsilon=0.3"), "loss.epsilon: null -> 0.3"),
    "another model": (
        ("sample", *GRPO, "--config.model.path=", "--config.tokenizer.path=model"),
        "Give the config that it was saved with",
    ),
    "no such run": (("sample", *GRPO, "--workdir=rnu"), "no checkpoint folder"),
    "nothing held out": (("evaluate", *GRPO), "set eval.data.kind, and eval.data.path"),
    "nowhere to write": (("evaluate", *GRPO, "--out=nowhere/a.json"), "there is no folder"),
}


@pytest.mark.parametrize("name", WITH_A_RUN)
def test_a_mistake_with_a_run_is_one_clear_error(trained, ask, name):
    (script, *arguments), message = WITH_A_RUN[name]
    code, _, err = ask(script, "--workdir=run", *arguments)
    assert code == 1 and message in err and "Traceback" not in err, err


@pytest.mark.parametrize("script", ["train", "sample"])
def test_a_truncated_checkpoint_is_named(home, trained, ask, script):
    if not (home / "torn").exists():
        shutil.copytree(trained, home / "torn")
        files = [path for path in (home / "torn" / "checkpoints" / str(STEPS)).rglob("*") if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size - 1)
    code, _, err = ask(script, *GRPO, "--workdir=torn")
    assert code == 1 and "bytes instead of" in err and "Traceback" not in err, err
