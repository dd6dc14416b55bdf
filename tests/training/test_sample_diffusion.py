"""Sampling from a masked diffusion model: in a terminal, into a pipe, and over a file."""

import dataclasses
import importlib.util
import inspect
import json
import os
import pty
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_user_case import Scripts, write_model, write_rows
from test_user_case import environment as environment

from jaxrl_llm.models import huggingface, huggingface_config, transformer
from jaxrl_llm.models import params as params_lib
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.sampling.diffusion import decode, rounds
from jaxrl_llm.sampling.diffusion_options import Method, settings
from jaxrl_llm.sampling.diffusion_state import of_model
from jaxrl_llm.training import heat_map

ROOT = Path(__file__).parents[2]
EOS, MASK, NEW = 1, 23, 12
WORDS = [
    "<unk>",
    "<eos>",
    "<|eot_id|>",
    *map(str, range(10)),
    "what",
    "is",
    "plus",
    "user",
    "assistant",
    "so",
]
PROMPTS = ["what is 1 plus 2", "what is 3"]
SIZES = (
    "--config.model.compute_dtype=float32",
    "--config.data.max_prompt_length=16",
    f"--config.method.max_new_tokens={NEW}",
    "--config.method.block_size=6",
)


def write_denoiser(folder: Path, family: str) -> None:
    """A random LLaDA or Dream of some thousand params, with its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    cfg = ModelConfig(
        family=family,
        vocab_size=24,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=32,
        norm_eps=1e-5 if family == "llada" else 1e-6,
        qk_norm=False,
        qkv_bias=family == "Dream",
        tied_head=False,
        causal=False,
        mask_id=MASK,
        logits_shift=int(family == "Dream"),
    )
    params = params_lib.init(jax.random.key(3), transformer.param_specs(cfg))
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params)  # tell tokens apart
    huggingface.save(folder, params, cfg, hf_config={"eos_token_id": EOS, "eot_token_id": 2})
    words = {word: i for i, word in enumerate([*WORDS, "a", "b", "c", "d", "<mask>"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>", mask_token="<mask>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_denoiser(home / "llada", "llada")
    write_denoiser(home / "dream", "Dream")
    write_model(home / "causal")
    (home / "configs").symlink_to(ROOT / "configs")
    write_rows(home / "prompts.jsonl", [{"prompt": p, "number": i} for i, p in enumerate(PROMPTS)])
    write_rows(home / "masked.jsonl", [{"prompt": PROMPTS[0]}, {"prompt": "what is <mask>"}])
    return home


@pytest.fixture(scope="module")
def ask(home, environment):
    scripts = Scripts(home, environment)
    with scripts.process:
        yield scripts
    assert scripts.process.returncode == 0


def config(*arguments: str, model: str = "llada") -> tuple[str, ...]:
    return (f"--config=configs/diffusion.py:{model}", *SIZES, *arguments)


@pytest.fixture(scope="module")
def rows(home, ask) -> list[dict]:
    """What is written for each row of a file, three at a time."""
    arguments = (
        "--count=2",
        "--slots=3",
        "--input=prompts.jsonl",
        "--output=out.jsonl",
        "--heat_map=map.png",
    )
    code, out, err = ask("sample", *config("--config.settings.temperature=0.7"), *arguments)
    assert code == 0 and not out and not err, out + err
    return [json.loads(line) for line in (home / "out.jsonl").read_text().splitlines()]


def decoded(home, folder: str, rows: list[list[int]], uids: list[int], method: dict, numbers: dict):
    """The same by the library."""
    cfg = huggingface_config.config_from_folder(home / folder)
    params = huggingface.load(home / folder, cfg)
    lengths = np.array([len(ids) for ids in rows], np.int32)
    prompts = np.zeros((len(rows), lengths.max()), np.int32)
    for target, ids in zip(prompts, rows):
        target[: len(ids)] = ids
    own = Method(NEW, 6, **method)
    numbers = settings(own, len(rows), eos_id=EOS, eot_id=2, stop_at_eos=True, **numbers)
    out = decode(
        of_model(cfg, jnp.dtype("float32")),
        params,
        prompts,
        lengths,
        own,
        numbers,
        key=jax.random.key(0),
        uids=jnp.asarray(uids),
    )
    return jax.tree.map(np.asarray, out)


def encode(prompt: str) -> list[int]:
    return [WORDS.index(word) for word in prompt.split()]


def text(ids) -> str:
    """Words up to the first end of a text or a message."""
    words = [*WORDS, "a", "b", "c", "d"]
    end = next((i for i, token in enumerate(ids) if token in (EOS, 2)), len(ids))
    return " ".join(words[token] for token in ids[:end] if words[token] != "<unk>")


def test_a_file_of_prompts(home, rows):
    """Rows in order with their columns, as the library decodes them; a picture of the completions."""
    prompts = [encode(p) for p in PROMPTS for _ in range(2)]
    want = decoded(home, "llada", prompts, [0, 1, 2, 3], {}, {"temperature": 0.7})
    assert [(row["prompt"], row["number"]) for row in rows] == [(p, i) for i, p in enumerate(PROMPTS)]
    written = rows[0].keys() - {"prompt", "number"}
    got = {name: [x for row in rows for x in row[name]] for name in written}
    assert np.array_equal(got["completion_ids"], want.tokens)
    assert np.array_equal(got["commit_steps"], want.commit_step)
    np.testing.assert_allclose(got["behaviour_logp"], want.commit_logp, atol=1e-5)
    np.testing.assert_allclose(got["raw_logp"], want.raw_logp, atol=1e-5)
    assert got["steps"] == want.steps.tolist() and got["nfe"] == want.nfe.tolist()
    assert got["reasons"] == ["stop" if end else "length" for end in want.finished]
    assert got["completions"] == [text(ids) for ids in want.tokens]
    assert len({tuple(ids) for ids in got["completion_ids"]}) == 4  # each completion has its own draws
    assert (home / "map.png").read_bytes().startswith(b"\x89PNG")


def test_a_pipe_gets_final_texts(ask, rows):
    prompts = [f"--prompt={p}" for p in PROMPTS]
    code, out, err = ask("sample", *config("--config.settings.temperature=0.7"), "--count=2", *prompts)
    assert code == 0 and not err, out + err
    assert out.splitlines() == [x for row in rows for x in row["completions"]]


def test_a_terminal_sees_the_response_fill(home, ask, rows):
    """Masks give way to words, with the count of rounds and passes; then the text stands there alone."""
    parent, terminal = pty.openpty()
    arguments = config("--config.settings.temperature=0.7"), "--count=2", "--heat_map=seen.png"
    ask.start("terminal", os.ttyname(terminal), "sample", *arguments[0], *arguments[1:])
    output = b""
    for prompt in (*PROMPTS, None):
        while output.count(b"> ") < (len(PROMPTS) + 1 if prompt is None else PROMPTS.index(prompt) + 1):
            output += os.read(parent, 1 << 16)
        os.write(parent, b"\x04" if prompt is None else f"{prompt}\n".encode())
    code, _, _ = ask.reply()
    os.close(parent)
    os.close(terminal)
    seen = output.decode()
    assert code == 0 and "Traceback" not in seen, seen
    first = rows[0]
    for r in range(1, first["steps"][0] + 1):
        left = sum(step < 0 or step >= r for step in first["commit_steps"][0])
        assert f"round {r}, {r} passes, {NEW - left} of {NEW} tokens" in seen, (r, seen)
    assert "░" * 6 in seen and (home / "seen.png").exists()
    assert all(x in seen for row in rows for x in row["completions"])


def test_a_dream_folder_takes_its_own_schedule(home, ask):
    """FoCore_A by name, with Dream's grid; lexical tokens by a pattern."""
    options = "--config.settings.steps=8", "--config.settings.stable_steps=1", "--config.settings.window=99"
    command = config(*options, model="dream,focore_a")
    code, _, err = ask("sample", *command, "--input=prompts.jsonl", "--output=dream.jsonl")
    assert code == 0, err
    method = {"family": "dream", "guidance": "high_information", "accelerate": True}
    numbers = {"steps": 8, "stable_steps": 1, "window": 99}
    want = decoded(home, "dream", [encode(p) for p in PROMPTS], [0, 1], method, numbers)
    got = [json.loads(line) for line in (home / "dream.jsonl").read_text().splitlines()]
    assert [row["completion_ids"][0] for row in got] == want.tokens.tolist()
    assert [row["commit_steps"][0] for row in got] == want.commit_step.tolist()
    assert [(row["steps"][0], row["nfe"][0]) for row in got] == list(zip(want.steps, want.nfe))
    assert np.all(want.nfe > want.steps)  # guided


def test_rounds_are_the_rounds_of_decode(home):
    cfg = huggingface_config.config_from_folder(home / "llada")
    own = Method(NEW, 6, guidance="prompt")
    arguments = dict(
        denoiser=of_model(cfg),
        params=huggingface.load(home / "llada", cfg),
        prompts=np.array([encode(PROMPTS[0]), [0] * 5]),
        lengths=np.array([5, 0]),
        method=own,
        settings=settings(own, 2, steps=[6, 12], temperature=0.9),
        key=jax.random.key(1),
        uids=jnp.arange(2),
    )
    want, seen = decode(**arguments), list(rounds(**arguments))
    assert len(seen) == int(want.steps.max()) == 12
    for r, between in enumerate(seen):
        done = (want.commit_step >= 0) & (want.commit_step <= r)
        assert np.array_equal(between.tokens, np.where(done, want.tokens, MASK))
        assert np.array_equal(between.steps, np.minimum(r + 1, want.steps))
    np.testing.assert_allclose(seen[-1].commit_logp, want.commit_logp, atol=1e-5)


MISTAKES = {
    "key": (config("--config.method.guidence=prompt"), "guidance"),
    "decoder": (config(model="llada,fucore"), "unknown decoder 'fucore'"),
    "choice": (config("--config.method.order=entrophy"), "unknown order='entrophy'"),
    "block": (config("--config.method.block_size=5"), "max_new_tokens=12 is not divisible by block_size=5"),
    "steps": (config("--config.settings.steps=14"), "steps=14 are more than the 12 masked positions"),
    "range": (config("--config.settings.temperature=-1.0"), "temperature=-1.0 is outside its range"),
    "causal": (config(model="causal"), "decoding by unmasking needs a masked-diffusion model"),
    "no folder": (config(model="ladda"), "no tokenizer folder at 'ladda'"),
    "no path": (config(model=""), "model.path is empty"),
    "lexical": (config("--config.lexical=[0-9]"), "method.detector='lexical'"),
    "pattern": (
        config("--config.lexical=[", "--config.method.detector=lexical", model="llada,focore"),
        "lexical='[' is no regular expression",
    ),
    "workdir": (config("--workdir=run"), "give the run's folder export"),
    "picture": (config("--heat_map=none/a.png"), "--heat_map=none/a.png: there is no folder"),
    "no picture": (config("--heat_map=a.jpg"), "--heat_map=a.jpg: a .png file"),
    "masked": (
        config("--input=masked.jsonl", "--output=new.jsonl"),
        "the prompt of masked.jsonl, row 2 contains the mask token 23",
    ),
    "train": (("--config=configs/grpo.py:llada", "--prompt=what"), "needs a causal model"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_error(home, ask, name):
    command, message = MISTAKES[name]
    code, _, err = ask("sample", *command)
    assert code == 1 and message in err and "Traceback" not in err, err
    assert not (home / "new.jsonl").exists()


def test_the_config_has_every_option_with_its_default():
    spec = importlib.util.spec_from_file_location("diffusion_config", ROOT / "configs" / "diffusion.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own = module.get_config("folder")
    fields = {field.name: field.default for field in dataclasses.fields(Method)}
    assert own.method.to_dict() == fields | {"max_new_tokens": 128, "family": ""}
    keywords = {name: p.default for name, p in inspect.signature(settings).parameters.items()}
    given = {"method", "batch", "eos_id", "eot_id"}
    want = {name: default for name, default in keywords.items() if name not in given}
    assert own.settings.to_dict() == want | {"stop_at_eos": True}
    for decoder in module.DECODERS:
        Method(**module.get_config(f"folder,{decoder}").method.to_dict() | {"family": "llada"})


def test_a_heat_map_writes_labels_that_fit():
    """Two responses of other lengths, in lines of 16; labels where they fit and were committed."""
    labels = ["a", " the", "\n", "x" * 30, "語", "", "gone", *"bcdefghijk"]
    traces = [
        heat_map.Trace(labels, np.array([0, 1, 2, 3, 3, 3, -1, *range(4, 14)]), 20),
        heat_map.Trace(["z", "y"], np.array([1, 0]), 4),
    ]
    figure = heat_map.draw(traces)
    first, second, _ = figure.axes
    assert [t.get_text() for t in first.texts] == ["a", "the", "⏎", *"bcdefghijk"]
    assert [t.get_position() for t in first.texts][-1] == (0, 1)  # the seventeenth position
    assert first.get_title(loc="left") == "response 1: 16 tokens in 14 rounds, 20 forward passes"
    drawn = first.images[0].get_array()
    assert drawn.shape == (2, 16) and drawn[0, 1] == 1 and drawn[0, 6] < 0 and drawn[1, 0] == 13
    assert np.flatnonzero(np.ma.getmaskarray(drawn)).tolist() == list(range(17, 32))
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, 13)
    with pytest.raises(ValueError, match="needs a response"):
        heat_map.draw([])
