"""A masked-diffusion LM from random weights: pre-training, fine-tuning, decoding; and what is refused."""

import json
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from jaxrl_llm.data.order import Cursor
from jaxrl_llm.data.prompts import encode_prompts
from jaxrl_llm.data.rows import MalformedRow
from jaxrl_llm.data.tokenizers import load
from jaxrl_llm.models import huggingface, huggingface_config, transformer
from jaxrl_llm.models import params as params_lib
from jaxrl_llm.models.config import FEATURES, ModelConfig
from jaxrl_llm.sample_diffusion import Diffusion
from jaxrl_llm.training.architecture import model_config
from jaxrl_llm.training.config import default
from jaxrl_llm.training.diffusion import with_noise
from jaxrl_llm.training.job import build
from jaxrl_llm.training.loop import run
from jaxrl_llm.training.stages import Host, next_examples

LETTERS = "abcdefgh"


def config_of(name, argument=""):
    """A config of this project, which is a file and not a package."""
    path = Path(__file__).resolve().parents[2] / "configs" / f"{name}.py"
    return runpy.run_path(str(path))["get_config"](argument)


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def tiny(c, path, steps=80):
    """A config, made small."""
    c.model.compute_dtype, c.model.remat, c.log.plots = "float32", "none", False
    c.supervised.train.path = path
    c.supervised.num_steps, c.supervised.batch_rows, c.supervised.max_length = steps, 8, 30
    c.supervised.optimizer.learning_rate, c.supervised.optimizer.warmup_steps = 1e-2, 5
    return c


def new(c, family="llada"):
    """Sizes and tokenizer of a new model."""
    c.model.family = family
    c.model.hidden_size, c.model.num_layers, c.model.intermediate_size = 32, 1, 64
    c.model.num_heads = c.model.num_kv_heads = 4
    c.model.head_dim = 8
    c.tokenizer.kind, c.tokenizer.alphabet = "characters", LETTERS
    return c


def nll(workdir):
    """Nats per token of every step."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row["nll"] for row in map(json.loads, lines) if "nll" in row]


def test_from_random_weights_to_completions(tmp_path):
    """Texts are one of eight letters, four times. Of their five tokens (with EOS) a model knows

    the letters by their frequency alone: 4/5·ln 8 nats a token; and by each other: 1/5·ln 8, which is the
    entropy of the texts. It would be 0 if, as in fine-tuning, some token were never masked. Then a prompt of
    one letter is continued with the next one, once to three times. The model is sampled with room for three
    and EOS: how long its answers are it can have learnt only where EOS filled them up in training.
    """
    texts = write(tmp_path / "texts.jsonl", [{"text": 4 * x} for x in LETTERS])
    run(build(new(tiny(config_of("diffusion_training"), texts, 120), "Dream")), tmp_path / "one")
    history = nll(tmp_path / "one")
    assert history[0] > 0.8 * np.log(8)
    assert 0.15 * np.log(8) < np.mean(history[-20:]) < 0.4 * np.log(8)

    folder = tmp_path / "one" / "export"
    cfg = huggingface_config.config_from_folder(folder)
    assert (cfg.family, cfg.causal, cfg.logits_shift) == ("Dream", False, 1)
    tokenizer = load("folder", path=str(folder))
    assert cfg.mask_id == tokenizer.vocab_size
    following = LETTERS[1:] + LETTERS[0]
    answers = [(1 + i % 3) * y for i, y in enumerate(following)]
    rows = [{"prompt": x, "completion": answer} for x, answer in zip(LETTERS, answers)]
    c = tiny(config_of("diffusion_training", str(folder)), write(tmp_path / "rows.jsonl", rows), 300)
    c.supervised.completion_length = 4
    run(build(c), tmp_path / "two")

    c = config_of("diffusion", str(tmp_path / "two" / "export"))
    c.model.compute_dtype, c.method.max_new_tokens = "float32", 4
    sampler = Diffusion(c, 1)
    sampler.load(None, None, 8)
    prompts, _ = encode_prompts([{"prompt": x} for x in LETTERS], tokenizer, max_prompt_length=4)
    written = [row["completions"][0] for row in sampler.columns(prompts)]
    assert sum(map(str.__eq__, written, answers)) >= 7  # without the filling: 2 or 3


# --- a new model's shape


def shape(**overrides):
    """The policy of a config for RL on words, with a new model."""
    c = new(default(), overrides.pop("family", "llada"))
    c.num_steps, c.supervised.num_steps, c.checkpoint.export = 0, 1, overrides.pop("export", True)
    for key, value in overrides.items():
        c.model[key] = value
    return model_config(c, load("characters", alphabet=LETTERS))


@pytest.mark.parametrize("family", FEATURES)
def test_a_new_model_of_every_family_can_be_exported(family):
    """With its own switches; the mask token comes after the tokenizer's 14 ids, in a vocabulary of 64."""
    cfg = shape(family=family)
    huggingface_config.check_describes(huggingface_config.config_to_dict(cfg), cfg)
    assert cfg.vocab_size == 64
    assert cfg.mask_id == (14 if family in ("llada", "Dream") else None)


def test_keys_of_the_config_go_before_the_familys(monkeypatch):
    """From the command line too, whose keys have no value yet."""
    cfg = shape(mask_id=64)
    assert (cfg.mask_id, cfg.vocab_size) == (64, 128)
    cfg = shape(family="qwen3", causal=False, logits_shift=1, export=False)
    assert (cfg.causal, cfg.mask_id, cfg.logits_shift, cfg.qk_norm) == (False, 14, 1, True)
    arguments = [f"--given.model.{x}" for x in ("causal=False", "mask_id=99", "logits_shift=1")]
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    flag = config_flags.DEFINE_config_dict("given", default(), flag_values=(values := flags.FlagValues()))
    values(sys.argv)
    assert (flag.value.model.causal, flag.value.model.mask_id, flag.value.model.logits_shift) == (
        False,
        99,
        1,
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mask_id": 3}, "mask_id=3 is a token that the tokenizer uses: it writes 'd'"),
        ({"mask_id": 8}, "mask_id=8 is .* it is the padding. Take an id of its own, such as 14"),
        ({"mask_id": 9}, "mask_id=9 is .* it is an end of text"),
        ({"mask_id": 64, "vocab_size": 64}, "mask_id=64 is outside the vocabulary of 64"),
        ({"vocab_size": 14}, "mask_id=14 is outside the vocabulary of 14"),
        ({"family": "qwen3", "mask_id": 20}, "mask_id=20 .*: set causal=False"),
        ({"family": "qwen3", "causal": False}, "model: .*causal is True there and False here.*export=False"),
        ({"logits_shift": 1}, "model: .*logits_shift is 0 there and 1 here"),
        ({"causal": True}, "model.causal=True, and family 'llada' is masked diffusion: leave it out"),
        ({"head_dim": 16}, "model: .*head_dim is 8 there and 16 here"),
    ],
    ids=str,
)
def test_shapes_that_contradict_themselves(overrides, message):
    with pytest.raises(ValueError, match=message):
        shape(**overrides)


def config(tmp_path, rows=({"prompt": "a", "completion": "b"},), **overrides):
    """Of a new LLaDA and its fine-tuning."""
    c = new(tiny(default(), write(tmp_path / "given.jsonl", rows)))
    c.num_steps, c.supervised.train.kind = 0, "jsonl"
    for key, value in overrides.items():
        c[key].update(value)
    return c


def folder_of(path, cfg):
    huggingface.save(path, params_lib.init(jax.random.key(0), transformer.param_specs(cfg)), cfg)
    return str(path)


def test_objectives_and_models_that_do_not_go_together(tmp_path):
    """A causal folder, a new causal model, a folder that contradicts the config; all before any compiling."""
    causal = folder_of(tmp_path / "causal", ModelConfig(hidden_size=16, num_layers=1, intermediate_size=16))
    denoiser = folder_of(tmp_path / "denoiser", shape())
    for overrides, message in (
        (
            {"model": {"path": causal}, "supervised": {"objective": "diffusion_pretraining"}},
            r"objective='diffusion_pretraining', but .*causal \(family 'qwen3'\) is causal: give a LLaDA",
        ),
        (
            {"model": {"family": "llama"}, "supervised": {"objective": "diffusion_finetuning"}},
            r"but the new model \(family 'llama'\) is causal",
        ),
        (
            {"supervised": {"objective": "next_token"}},
            "is a masked-diffusion LM: set it to diffusion_finetun",
        ),
        (
            {"model": {"path": denoiser, "mask_id": 15}},
            "model.mask_id=15, and .*denoiser has 14: leave it out",
        ),
        ({"model": {"path": causal, "causal": False}}, "model.causal=False, and .*causal has True"),
        ({"supervised": {"objective": "pretraining"}}, "objective='pretraining'.*did you mean"),
        (
            {"model": {"path": causal}, "supervised": {"completion_length": 4}},
            "completion_length=4 is for .* and this is a causal model: leave it 0",
        ),
        (
            {"supervised": {"completion_length": 4, "objective": "diffusion_pretraining"}},
            "this is pre-training: leave it 0",
        ),
        ({"model": {"family": "dream"}}, "model.family='dream'.*did you mean 'Dream'"),
        (
            {"eval": {"data": {"kind": "jsonl", "path": str(tmp_path / "given.jsonl")}}},
            "the new model is a mas",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build(config(tmp_path, **overrides))
    with pytest.raises(ValueError, match=r"max_length=30 \(its completion filled to .*=30\) tokens: raise"):
        build(config(tmp_path, supervised={"completion_length": 30}))
    assert build(config(tmp_path)).objective == "diffusion_finetuning"
    assert build(config(tmp_path, model={"family": "qwen3"})).objective == "next_token"


# --- texts


def test_a_text_has_no_prompt(tmp_path):
    """All its tokens are learned, and its end; in pre-training the first one too, and prompts."""
    how = {"objective": "diffusion_pretraining", "max_length": 6}
    text = {"supervised": how | {"train": {"options": {"form": "text"}}}}
    job = build(config(tmp_path, [{"text": "abc"}], **text))
    batch = next_examples(job, Host(0, Cursor(0), Cursor(0)), 2)
    np.testing.assert_array_equal(batch.tokens, [[0, 1, 2, 9, 0, 0]] * 2)
    np.testing.assert_array_equal(batch.loss_mask, [[0, 1, 1, 1, 0, 0]] * 2)
    noisy = with_noise(batch, jax.random.key(0), mask_id=14, everywhere=True, least=1.0)
    np.testing.assert_array_equal(noisy.noisy, [[14, 14, 14, 14, 0, 0]] * 2)
    np.testing.assert_array_equal(noisy.loss_mask, noisy.masked)
    noisy = with_noise(batch, jax.random.key(0), mask_id=14, least=1.0)
    np.testing.assert_array_equal(noisy.noisy, [[0, 14, 14, 14, 0, 0]] * 2)


def test_rows_that_cannot_be_learned_are_named(tmp_path):
    form = {"supervised": {"train": {"options": {"form": "text"}}}}
    for rows, overrides, message in (
        ([{"text": ""}], form, "row 1, column 'text': the text is empty"),
        ([{"prompt": "a", "completion": "b"}], form, "row 1, column 'text': missing"),
        ([{"text": "a"}], {}, "row 1, column 'prompt': missing"),
        ([{"text": [{"role": "user", "content": "a"}]}], form, "column 'text': a text is a string"),
        (
            [{"prompt": "a", "completion": "b<|user|>"}],
            {"model": {"mask_id": 11}},
            "row 1 has the mask token, id 11, in place 3",
        ),
    ):
        with pytest.raises(MalformedRow, match=message):
            build(config(tmp_path, rows, **overrides))
