"""The binaries that sample: from a file, on a terminal, and over HTTP."""

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import openai
import pytest
from test_user_case import Scripts, write_model, write_rows
from test_user_case import environment as environment

from jaxrl_llm.models import huggingface, huggingface_config
from jaxrl_llm.models.scoring import score

ROOT = Path(__file__).parents[2]
score_jit = jax.jit(score, static_argnames="cfg")
PROMPTS = ["what is 1 plus 2", "what is 3", [{"role": "user", "content": "what"}]]
CONFIG = (
    "--config=configs/grpo.py:model",
    "--config.rollout.max_completion_length=40",
    "--config.rollout.temperature=0.7",
    "--config.model.compute_dtype=float32",
    "--config.data.max_prompt_length=16",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_model(home / "model")
    (home / "configs").symlink_to(ROOT / "configs")
    write_rows(home / "prompts.jsonl", [{"prompt": p, "number": i} for i, p in enumerate(PROMPTS)])
    return home


@pytest.fixture(scope="module")
def ask(home, environment):
    scripts = Scripts(home, environment)
    with scripts.process:
        yield scripts
    assert scripts.process.returncode == 0


@pytest.fixture(scope="module")
def rows(home, ask) -> list[dict]:
    """What is written for each row of a file."""
    code, out, err = ask(
        "sample", *CONFIG, "--count=3", "--slots=2", "--input=prompts.jsonl", "--output=out.jsonl"
    )
    assert code == 0 and not out and not err, out + err
    return [json.loads(line) for line in (home / "out.jsonl").read_text().splitlines()]


def test_a_file_of_prompts(home, rows):
    """Rows in order with their columns; the log-probs are those of the model, the text is that of the ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    cfg = huggingface_config.config_from_folder(home / "model")
    params = huggingface.load(home / "model", cfg)
    assert [(row["prompt"], row["number"]) for row in rows] == [(p, i) for i, p in enumerate(PROMPTS)]
    for row in rows:
        text = row["prompt"] if isinstance(row["prompt"], str) else "user what <eos> assistant "
        prompt = tokenizer(text)["input_ids"]
        ids, raw, behaviour = row["completion_ids"], row["raw_logp"], row["behaviour_logp"]
        assert len(ids) == len(row["completions"]) == len(row["reasons"]) == 3
        assert row["completions"] == [tokenizer.decode(x, skip_special_tokens=True) for x in ids]
        assert len({tuple(x) for x in ids}) == 3  # each completion has its own draws
        for j in range(3):
            assert row["reasons"][j] == ("stop" if ids[j][-1] == 1 else "length")
            assert row["reasons"][j] == "stop" or len(ids[j]) == 40
            tokens = np.zeros((1, 64), np.int32)
            end = len(prompt) + len(ids[j])
            tokens[0, :end] = prompt + ids[j]
            mask = (np.arange(64) >= len(prompt)) & (np.arange(64) < end)
            for temperature, got in ((1.0, raw[j]), (0.7, behaviour[j])):
                want = score_jit(params, tokens, mask[None], cfg, temperature=np.float32([temperature]))
                np.testing.assert_allclose(got, np.asarray(want.logp)[0, mask], atol=1e-5)


def test_plain_lines_and_flags_write_the_same(ask, rows):
    code, out, err = ask("sample", *CONFIG, "--count=3", *(f"--prompt={p}" for p in PROMPTS[:2]))
    assert code == 0 and not err, out + err
    assert out.splitlines() == [text for row in rows[:2] for text in row["completions"]]


def test_a_terminal_is_asked_for_prompts(home, ask, rows):
    """It shows what is written; a prompt that is too long is refused, and the next is asked for."""
    parent, terminal = pty.openpty()
    ask.start("terminal", os.ttyname(terminal), "sample", *CONFIG, "--count=3")
    output = b""

    def read_until(asked: int) -> None:
        nonlocal output
        while output.count(b"> ") < asked:
            output += os.read(parent, 1 << 16)

    read_until(1)
    os.write(parent, b"what is " + b"1 plus " * 9 + b"\n")
    read_until(2)
    os.write(parent, f"{PROMPTS[0]}\n".encode())
    read_until(3)
    os.write(parent, b"\x04")  # the end of input
    code, _, _ = ask.reply()
    os.close(parent)
    os.close(terminal)
    lines = output.decode().replace("\r\n", "\n")
    assert code == 0 and "not sampled: the prompt of row 0 has 20 tokens" in lines, lines
    assert lines.split(f"{PROMPTS[0]}\n")[1].split("\n> ")[0].split("\n") == rows[0]["completions"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input=prompts.jsonl"], "--input and --output belong together"),
        (["--input=promts.jsonl", "--output=new.jsonl"], "no file at 'promts.jsonl'"),
        (["--input=prompts.jsonl", "--output=prompts.jsonl"], "--output=prompts.jsonl is the input"),
        (["--input=prompts.jsonl", "--output=none/new.jsonl"], "there is no folder"),
        (["--input=prompts.jsonl", "--output=new.jsonl", "--chat"], "takes no --prompt and no --chat"),
        (
            ["--input=prompts.jsonl", "--output=new.jsonl", "--config.data.max_prompt_length=4"],
            "prompts.jsonl, row 1 has 5 tokens, more than max_prompt_length=4",
        ),
    ],
)
def test_mistakes_are_named(home, ask, arguments, message):
    code, out, err = ask("sample", *CONFIG, *arguments)
    assert code == 1 and message in err and "Traceback" not in err, out + err
    assert not (home / "new.jsonl").exists()


def test_serve_shows_its_flags_and_names_mistakes(ask):
    _, out, _ = ask("serve", "--helpshort")
    assert "--config" in out and "--port" in out and "python -m jaxrl_llm.serve" in out
    code, _, err = ask("serve", "--config=configs/grpo.py:modle")
    assert code == 1 and "no tokenizer folder at 'modle'" in err and "Traceback" not in err


def test_serve(home, environment):
    """A server of the same model, which ends at Ctrl-C."""
    command = [sys.executable, "-m", "jaxrl_llm.serve", *CONFIG, "--port=0", "--name=tiny"]
    log = home / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=home, env=environment, stderr=file, stdout=file)
    try:
        deadline = time.monotonic() + 90
        while not (found := re.search(r"running on (http://127.0.0.1:\d+)", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        with openai.OpenAI(base_url=f"{found[1]}/v1", api_key="none", max_retries=0) as client:
            asked = {"model": "tiny", "messages": PROMPTS[2], "temperature": 0.7, "logprobs": True}
            asked["presence_penalty"] = 0.5  # its engine has the rules
            reply = client.chat.completions.create(**asked).choices[0]
            assert reply.finish_reason in ("stop", "length") and len(reply.logprobs.content) > 0
            with pytest.raises(openai.BadRequestError, match="do not fit into max_length=56"):
                client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=56)
    finally:
        process.send_signal(2)
        code = process.wait(30)
    assert code in (0, 130) and "Traceback" not in log.read_text(), log.read_text()
