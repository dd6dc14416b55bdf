r"""Decoders of one small masked-diffusion LM, side by side: 4×4 sudoku, trained here in minutes.

    python tools/demonstrations/sudoku.py --output=/tmp/sudoku

For every seed three models of 0.6M params are trained from random weights (on what: `environments.sudoku`):

    weak    few updates: it makes mistakes that better decoding could repair
    strong  more updates: it solves almost everything, so what counts is how few rounds are needed
    habit   in most of its examples the answer is one and the same grid, whatever the clues: the model is
            calibrated, but what is likeliest is that grid, which guidance should talk it out of

Then each decodes the same new problems by every decoder of its list, greedily. A response is valid if its
grid is legal and keeps the clues; steps are rounds, NFE forward passes of a row (a guided round makes two),
and milliseconds those of a problem decoded alone. Two findings of FoCore (2605.01373) are tried as well:
whether four right cells shown beforehand help more than four right fillers, and whether cells settle earlier.

Models and numbers are kept in the output folder, a file for each seed, so that a run that was cut off goes on
where it was, and several processes may share the seeds (--seeds) before one makes the tables and the plot.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxrl_llm.environments import sudoku
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig, Rope
from jaxrl_llm.models.params import ParamSpec
from jaxrl_llm.sampling.diffusion import decode
from jaxrl_llm.sampling.diffusion_options import Method, settings
from jaxrl_llm.sampling.diffusion_state import Decoded, Denoiser, of_model
from jaxrl_llm.training.diffusion import fit, rows_of

Array = jax.Array

CFG = ModelConfig(
    family="llada",
    vocab_size=sudoku.VOCAB_SIZE,
    hidden_size=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    intermediate_size=384,
    qk_norm=True,
    tied_head=False,
    causal=False,
    mask_id=sudoku.MASK,
    rope=Rope(theta=100.0),  # 42 positions: longer waves would all look alike
)
SIZE = sudoku.RESPONSE_LENGTH
BATCH = 64
DIGITS = tuple(range(1, 5))


@dataclasses.dataclass(frozen=True)
class Training:
    """Of one kind of model.

    Attributes:
      steps: updates.
      habit: share of the examples that are answered by the first of all grids, whatever the clues.
      hidden: share of the examples whose prompt is masked, as classifier-free guidance will do.
    """

    steps: int
    habit: float = 0.0
    hidden: float = 0.0


TRAINING = {
    "weak": Training(220, hidden=0.1),
    "strong": Training(1200),
    "habit": Training(600, habit=0.6, hidden=0.1),
}


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A line of the table.

    Attributes:
      family: of decoders that differ in one number: a curve of the plot.
      name: of the line.
      structure: `Method` options.
      numbers: `settings` options.
    """

    family: str
    name: str
    structure: dict[str, Any] = dataclasses.field(default_factory=dict)
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)


def _focore(detector: str, **numbers: Any) -> Decoder:
    weight, end = numbers["guidance_weight"], numbers.get("guidance_end")
    name = f"FoCore, {'oracle' if detector == 'lexical' else detector}, w = {weight:g}"
    return Decoder(
        f"FoCore, {detector}",
        name if end is None else f"{name} to {end:g}",
        {"guidance": "high_information", "detector": detector},
        numbers,
    )


PLAIN = Decoder("fixed steps", "plain, 24 steps")
GUIDED = (
    *(
        Decoder("CFG", f"CFG, w = {w:g}", {"guidance": "prompt"}, {"guidance_weight": w})
        for w in (0.25, 0.5, 1, 2)
    ),
    *(
        Decoder("A-CFG", f"A-CFG, w = {w:g}", {"guidance": "low_confidence"}, {"guidance_weight": w})
        for w in (0.25, 0.5, 1)
    ),
    *(_focore("resolve", guidance_weight=w) for w in (0.25, 0.5, 1)),
    *(_focore(detector, guidance_weight=0.5) for detector in ("early", "lexical")),
    _focore("resolve", guidance_weight=1.0, guidance_end=0.0),
    _focore("resolve", guidance_weight=0.0, guidance_end=1.0),
    Decoder(
        "FoCore, prompt hidden too",
        "FoCore, resolve, prompt hidden too, w = 0.5",
        {"guidance": "high_information", "negative_prompt": "mask"},
        {"guidance_weight": 0.5},
    ),
)
ORDERS = (
    Decoder("order", "random order, 24 steps", {"order": "random"}),
    Decoder("blocks", "blocks of 6, 24 steps", {"block_size": 6}),
)
FOCORE_A = {
    "FoCore_A": {"guidance_weight": 0.25},
    "FoCore_A, w = 0": {"guidance_weight": 0.0},
    "FoCore_A, w = 0, no wait": {"guidance_weight": 0.0, "patience": 0, "stable_steps": 1},
}
"""The last takes tokens to have converged, and candidates to be stable, from the beginning."""
FAST = (
    *(Decoder("fixed steps", f"plain, {n} steps", numbers={"steps": n}) for n in (12, 8, 6)),
    *(
        Decoder("threshold", f"threshold {x:g}", {"commit": "threshold"}, {"threshold": x})
        for x in (0.7, 0.9, 0.95, 0.97, 0.99)
    ),
    *(Decoder("factor", f"factor {x:g}", {"commit": "factor"}, {"factor": x}) for x in (1.0, 0.1, 0.03)),
    *(
        Decoder(
            family,
            f"{family}, τ = {x:g}",
            {"guidance": "high_information", "accelerate": True},
            numbers | {"stable_probability": x},
        )
        for family, numbers in FOCORE_A.items()
        for x in (0.7, 0.9, 0.97, 0.99)
    ),
)
DECODERS: dict[str, tuple[Decoder, ...]] = {
    "weak": (PLAIN, *ORDERS, *GUIDED),
    "strong": (PLAIN, *ORDERS, *FAST, *(x for x in GUIDED if x.numbers.get("guidance_weight") == 0.25)),
    "habit": (PLAIN, *GUIDED),
}


def examples(rng: np.random.Generator, training: Training) -> Any:
    """A batch to train on."""
    problems, usual = sudoku.make(rng, BATCH), sudoku.make(rng, BATCH, grids=sudoku.GRIDS[:1])
    is_usual = rng.random(BATCH) < training.habit
    responses = np.where(is_usual[:, None], usual.responses, problems.responses)
    is_hidden = rng.random(BATCH) < training.hidden
    prompts = np.where(is_hidden[:, None], sudoku.MASK, problems.prompts)
    return rows_of(sudoku.Problems(prompts, responses).tokens, sudoku.PROMPT_LENGTH)


def answers(denoiser: Denoiser, params: Any, prompts: np.ndarray, decoder: Decoder) -> Decoded:
    """Greedy responses to prompts i32[N, P]."""
    count = len(prompts)
    method = Method(SIZE, **decoder.structure)
    is_oracle = decoder.structure.get("detector") == "lexical"
    out = decode(
        denoiser,
        params,
        jnp.asarray(prompts),
        jnp.full(count, prompts.shape[1]),
        method,
        settings(method, count, **decoder.numbers),
        key=jax.random.key(0),
        uids=jnp.arange(count),
        lexical=jnp.isin(jnp.arange(CFG.vocab_size), jnp.array(DIGITS)) if is_oracle else None,
    )
    return jax.block_until_ready(out)


def told(denoiser: Denoiser) -> Denoiser:
    """The denoiser of one who was told some tokens: params are (params, told i32[N, G], -1 = not).

    The model reads them in place of what is there, and they are proposed where they belong, so that they are
    committed as they are.
    """

    def states(params: Any, tokens: Array, lengths: Array, columns: Array) -> Array:
        own, hints = params
        hints = jnp.pad(hints, ((0, 0), (tokens.shape[1] - SIZE, 0)), constant_values=-1)
        tokens = jnp.where(hints >= 0, hints, tokens)
        said = jnp.take_along_axis(hints, columns, axis=1)
        hidden = denoiser.states(own, tokens, lengths, columns)
        return jnp.concatenate([hidden, 1e3 * jax.nn.one_hot(said, CFG.vocab_size)], axis=-1)

    def head(params: Any, hidden: Array) -> Array:
        return denoiser.head(params[0], hidden[..., : CFG.hidden_size]) + hidden[..., CFG.hidden_size :]

    return Denoiser(states, head, denoiser.mask_id)


def hints(rng: np.random.Generator, problems: sudoku.Problems, kind: str) -> np.ndarray:
    """i32[N, G]: four right tokens of each response, -1 elsewhere; cells that are clues are none."""
    may = np.zeros((len(problems.prompts), SIZE), bool)
    if kind == "cells":
        may[:, sudoku.CELL_PLACES] = problems.prompts[:, 1:-1] == sudoku.BLANK
    else:
        may[:] = ~np.isin(np.arange(SIZE), sudoku.CELL_PLACES)
    order = np.argsort(np.where(may, rng.random(may.shape), 2), axis=1).argsort(axis=1)
    return np.where(may & (order < 4), problems.responses, -1).astype(np.int32)


def measure(denoiser: Denoiser, params: Any, problems: sudoku.Problems, decoder: Decoder) -> dict[str, float]:
    """What a line of the table says of one model."""
    out = answers(denoiser, params, problems.prompts, decoder)
    verdict = sudoku.check(problems.prompts, np.asarray(out.tokens))
    return {
        "valid": float(verdict.is_valid.mean()),
        "legal": float(verdict.is_legal.mean()),
        "kept": float(verdict.kept.mean()),
        "steps": float(np.mean(out.steps)),
        "nfe": float(np.mean(out.nfe)),
    }


def milliseconds(denoiser: Denoiser, params: Any, problems: sudoku.Problems, decoder: Decoder) -> float:
    """Of a problem decoded alone, once compiled: the mean over ten."""
    prompts = problems.prompts[:11, None]
    answers(denoiser, params, prompts[0], decoder)
    begin = time.perf_counter()
    for prompt in prompts[1:]:
        answers(denoiser, params, prompt, decoder)
    return 1e3 * (time.perf_counter() - begin) / len(prompts[1:])


def findings(denoiser: Denoiser, params: Any, problems: sudoku.Problems) -> dict[str, float]:
    """Of FoCore: are informative tokens the better context, and do they settle earlier?"""
    out = answers(denoiser, params, problems.prompts, PLAIN)
    when = np.asarray(out.commit_step)
    is_cell = np.isin(np.arange(SIZE), sudoku.CELL_PLACES)
    found = {
        "no hint": float(sudoku.check(problems.prompts, np.asarray(out.tokens)).is_valid.mean()),
        "step of cells": float(when[:, is_cell].mean()),
        "step of fillers": float(when[:, ~is_cell].mean()),
    }
    informed, rng = told(denoiser), np.random.default_rng(0)
    for kind in ("cells", "fillers"):
        out = answers(informed, (params, jnp.asarray(hints(rng, problems, kind))), problems.prompts, PLAIN)
        verdict = sudoku.check(problems.prompts, np.asarray(out.tokens))
        found[f"four {kind} shown"] = float(verdict.is_valid.mean())
    return found


def model(kind: str, seed: int, folder: pathlib.Path) -> Any:
    """The params of a model: trained, or as they were kept."""
    path = folder / f"{kind}_{seed}.npz"
    structure = jax.tree.structure(transformer.param_specs(CFG), is_leaf=lambda x: isinstance(x, ParamSpec))
    if path.exists():
        with np.load(path) as kept:
            return jax.tree.unflatten(structure, [jnp.asarray(kept[name]) for name in kept.files])
    training = TRAINING[kind]
    begin = time.perf_counter()
    batches = functools.partial(examples, training=training)
    params, history = fit(CFG, batches, num_steps=training.steps, seed=seed)
    minutes = (time.perf_counter() - begin) / 60
    loss = np.mean(history[-50:])
    print(
        f"{kind} {seed}: {training.steps} updates in {minutes:.1f} min, {loss:.3f} nats per token", flush=True
    )
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, *map(np.asarray, jax.tree.leaves(params)))
    partial.replace(path)
    return params


def results(kind: str, seed: int, num_problems: int, folder: pathlib.Path) -> dict[str, Any]:
    """What every decoder makes of a model on its seed's problems, measured, or as it was kept."""
    path = folder / f"{kind}_{seed}.json"
    if not path.exists():
        params = model(kind, seed, folder)
        problems = sudoku.make(np.random.default_rng(10**6 + seed), num_problems)
        denoiser = of_model(CFG)
        found = {
            "findings": findings(denoiser, params, problems),
            "decoders": {x.name: measure(denoiser, params, problems, x) for x in DECODERS[kind]},
        }
        path.write_text(json.dumps(found, indent=2))
    return json.loads(path.read_text())


def timings(kind: str, seed: int, folder: pathlib.Path) -> dict[str, float]:
    """Milliseconds by decoder, measured, or as they were kept."""
    path = folder / f"{kind}_milliseconds.json"
    if not path.exists():
        params, problems = model(kind, seed, folder), sudoku.make(np.random.default_rng(10**6), 11)
        denoiser = of_model(CFG)
        found = {x.name: milliseconds(denoiser, params, problems, x) for x in DECODERS[kind]}
        path.write_text(json.dumps(found, indent=2))
    return json.loads(path.read_text())


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN for one value."""
    n = len(values)
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def table(kind: str, found: list[dict[str, Any]], times: dict[str, float]) -> Table:
    """A line per decoder, over the seeds; beside plain decoding as the difference within a seed."""
    title = f"{kind}: {TRAINING[kind].steps} updates, {len(found)} seeds, mean ± standard error over seeds"
    heads = ("decoder", "valid %", "beside plain", "legal %", "clues kept %", "steps", "NFE", "ms")
    out = Table(*heads[: None if times else -1], title=title)
    of = [x["decoders"] for x in found]
    for decoder in DECODERS[kind]:
        rows = [x[decoder.name] for x in of]
        valid, error = spread([100 * row["valid"] for row in rows])
        gain, its_error = spread([100 * (row["valid"] - x[PLAIN.name]["valid"]) for row, x in zip(rows, of)])
        mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        out.add_row(
            decoder.name,
            f"{valid:.1f} ± {error:.1f}",
            "" if decoder is PLAIN else f"{gain:+.1f} ± {its_error:.1f}",
            f"{100 * mean['legal']:.1f}",
            f"{100 * mean['kept']:.1f}",
            f"{mean['steps']:.1f}",
            f"{mean['nfe']:.1f}",
            *([f"{times[decoder.name]:.1f}"] if times else []),
        )
    return out


def finding_lines(kind: str, found: list[dict[str, Any]]) -> list[str]:
    """The two findings."""
    say = {}
    for key in found[0]["findings"]:
        scale = 1 if key.startswith("step") else 100
        say[key] = "{:.1f} ± {:.1f}".format(*spread([scale * x["findings"][key] for x in found]))
    return [
        f"{kind}: valid {say['no hint']} % without a hint, {say['four cells shown']} % with four right cells "
        f"shown, {say['four fillers shown']} % with four right fillers",
        f"{kind}: cells are committed in round {say['step of cells']} on average, fillers in "
        f"{say['step of fillers']}",
    ]


def plot(found: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Valid answers against forward passes, a curve for each family of decoders of the strong model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    curves: dict[str, list[tuple[float, ...]]] = {}
    for decoder in DECODERS["strong"]:
        rows = [x["decoders"][decoder.name] for x in found]
        valid = spread([100 * row["valid"] for row in rows])
        curves.setdefault(decoder.family, []).append((float(np.mean([row["nfe"] for row in rows])), *valid))
    for marker, family in zip("os^DvP", ("fixed steps", "threshold", "factor", *FOCORE_A)):
        if family in curves:
            x, y, error = zip(*sorted(curves[family]))
            axes.errorbar(
                x,
                y,
                np.nan_to_num(error),
                label=family,
                marker=marker,
                capsize=3,
                linewidth=1.2,
                markersize=5,
            )
    axes.set_xlabel("forward passes for a response (NFE)")
    axes.set_ylabel("valid answers (%)")
    axes.set_title(f"4×4 sudoku, strong model, {len(found)} seeds (bars: standard error)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder for numbers and plot")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="of training, separated by commas")
    parser.add_argument("--models", default=",".join(TRAINING), help=f"some of {', '.join(TRAINING)}")
    parser.add_argument("--problems", type=int, default=200, help="new problems for every seed")
    parser.add_argument(
        "--milliseconds", action="store_true", help="time the decoders too: nothing else may run"
    )
    args = parser.parse_args(argv)
    seeds, kinds = [int(seed) for seed in args.seeds.split(",")], args.models.split(",")
    if unknown := [kind for kind in kinds if kind not in TRAINING]:
        parser.error(f"--models={args.models}: unknown {unknown[0]!r}; some of {', '.join(TRAINING)}")
    args.output.mkdir(parents=True, exist_ok=True)
    console = Console(width=120)
    for kind in kinds:
        found = [results(kind, seed, args.problems, args.output) for seed in seeds]
        console.print(table(kind, found, timings(kind, seeds[0], args.output) if args.milliseconds else {}))
        for line in finding_lines(kind, found):
            console.print(line)
        if kind == "strong":
            plot(found, args.output / "frontier.png")
            console.print(f"frontier: {args.output / 'frontier.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
