"""Decoding of a masked diffusion model: ours beside a plain PyTorch loop of LLaDA's algorithm.

    python tools/benchmarks/diffusion.py

One random LLaDA (8 layers of width 512, 8 heads, MLP 1408, vocabulary 4096, float32) that both read from the
same files, on 2 cores. Prompts of 16 tokens, new ones in every round, and 64 new tokens in 64 steps, greedy,
one block, the surest first: 64 passes over 80 positions for either. PyTorch's loop is a script of ours,
`contenders/torch_diffusion.py`: LLaDA's published loop on a plain model. A round is one call, prompts in and
tokens out on the host; not loading, not compiling. Ours returns the step and the log-prob of every commit
besides. Before that both decode the same prompts, and it is said how many sequences are equal.

Ours alone, taking turns too: a FoCore step beside a plain one; and eight blocks with and without a dual
cache, with the operations of their passes as the compiler counts them. At last new values of temperature,
guidance weight, threshold and window must trace and compile nothing.
"""

import contextlib
import itertools
import json
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import harness
import numpy as np
import peers
import report
from report import OURS, Row

THREADS = 2
PROMPT_LENGTH, NEW_TOKENS, STEPS, BLOCK = 16, 64, 64, 8
LLADA: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 512,
    "embedding_size": 4096,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 4095,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 1408,
    "multi_query_attention": None,
    "n_heads": 8,
    "n_kv_heads": 8,
    "n_layers": 8,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500_000.0,
    "scale_logits": False,
    "vocab_size": 4096,
    "weight_tying": False,
}
"""The model's config.json."""

CASES = {"batch 1": 1, "batch 8": 8}
FOCORE = {"guidance": "high_information", "detector": "early"}
OWN: dict[str, dict[str, Any]] = {
    f"{name}, {case}": {"count": count, "structure": structure}
    for case, count in CASES.items()
    for name, structure in {
        "plain": {},
        "FoCore": FOCORE,
        "8 blocks": {"block_size": BLOCK},
        "8 blocks, dual cache": {"block_size": BLOCK, "cache": "dual"},
    }.items()
}
RETRACES = "retraces"


def write_model(folder: pathlib.Path, config: Mapping[str, Any] = LLADA, seed: int = 0) -> None:
    """A random LLaDA as a Hugging Face folder. Its logits are about ±3, so that ties are rare."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    d, f, vocab = config["d_model"], config["mlp_hidden_size"], config["vocab_size"]

    def matrix(rows: int, columns: int, std: float | None = None) -> np.ndarray:
        return rng.normal(0, std or columns**-0.5, (rows, columns)).astype(np.float32)

    def norm() -> np.ndarray:
        return rng.uniform(0.8, 1.2, d).astype(np.float32)

    tensors = {"wte": matrix(vocab, d, 1.0), "ff_out": matrix(vocab, d, 3 * d**-0.5), "ln_f": norm()}
    for index in range(config["n_layers"]):
        layer = {
            "attn_norm": norm(),
            **{f"{name}_proj": matrix(d, d) for name in "qkv"},
            "attn_out": matrix(d, d),
            "ff_norm": norm(),
            "ff_proj": matrix(f, d),
            "up_proj": matrix(f, d),
            "ff_out": matrix(d, f),
        }
        tensors |= {f"blocks.{index}.{name}": tensor for name, tensor in layer.items()}
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"model.transformer.{name}.weight": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))


def random_prompts(seed: int, count: int) -> list[list[int]]:
    """Prompts without the mask token, which is the last of the vocabulary."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, LLADA["mask_token_id"], (count, PROMPT_LENGTH)).tolist()


def requests(cases: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, dict[str, Any]]]:
    """New prompts for every round; cases with as many prompts have the same."""
    for seed in itertools.count(1):
        yield {
            name: {"prompts": random_prompts(seed, case["count"]), "structure": case.get("structure", {})}
            for name, case in cases.items()
        }


SHARED = {name: {"count": count} for name, count in CASES.items()}
BENCHMARK = harness.Benchmark(
    name="diffusion",
    description=__doc__,
    peers=(peers.TORCH_LOOP,),
    scripts={OURS: "ours_diffusion.py", peers.TORCH_LOOP.name: "torch_diffusion.py"},
    task={
        "prompt_length": PROMPT_LENGTH,
        "new_tokens": NEW_TOKENS,
        "steps": STEPS,
        "threads": THREADS,
        "config": LLADA,
    },
    requests=requests(SHARED),
    goals={("batch 1", peers.TORCH_LOOP.name): 2.5, ("batch 8", peers.TORCH_LOOP.name): 4.0},
    cases=(*CASES, *OWN, RETRACES),
    repetitions=5,
    warmup=1,
)


def equal_sequences(contenders: Sequence[harness.Contender], count: int = 8) -> str:
    """How many sequences all contenders decode alike: a tie broken otherwise changes all that follows."""
    request = {"prompts": random_prompts(0, count), "ids": True}
    first, *others = (contender.ask(request)["ids"] for contender in contenders)
    equal = sum(all(row == other[i] for other in others) for i, row in enumerate(first))
    return f"{equal} of {count} sequences are equal token by token"


def own_lines(rows: Sequence[Row]) -> list[str]:
    """Ratios within ours, each from the same rounds."""
    seconds = {row.case: row.seconds for row in rows if row.contender == OURS}
    lines = []
    for case in CASES:
        for name, beside, goal in (("FoCore", "plain", 1.9), ("8 blocks, dual cache", "8 blocks", None)):
            pair = seconds.get(f"{name}, {case}"), seconds.get(f"{beside}, {case}")
            if pair[0] and pair[1]:
                ratio = statistics.median(pair[0]) / statistics.median(pair[1])
                verdict = "" if goal is None else f" (≤ {goal}×: {'reached' if ratio <= goal else 'missed'})"
                lines.append(f"{case}: a step of {name} takes {ratio:.2f}× that of {beside}{verdict}")
    return lines


def operations_line(counts: Mapping[str, float]) -> str:
    """How many operations a dual cache saves at eight blocks."""
    none, dual = counts["none"], counts["dual"]
    return (
        f"operations of one response in {NEW_TOKENS // BLOCK} blocks: {none / 1e9:.1f} G without a cache, "
        f"{dual / 1e9:.1f} G with a dual one, {none / dual:.2f}× fewer ({report.verdict(none / dual, 3)})"
    )


def retraces_line(reply: Mapping[str, int]) -> str:
    """What new values have made the decoder trace and compile."""
    verdict = "none wanted: " + ("reached" if reply["traced"] == reply["compiled"] == 0 else "missed")
    return (
        f"{reply['values']} new values of temperature, guidance weight, threshold and window: "
        f"{reply['traced']} functions traced, {reply['compiled']} compiled ({verdict})"
    )


def run(argv: Sequence[str]) -> list[Row]:
    """From the command line to the tables and the JSON.

    Raises:
      SystemExit: something was traced or compiled that should not have been.
    """
    this = harness.begin(argv, BENCHMARK, threads=THREADS)
    args = this.args
    shared = {name: case for name, case in SHARED.items() if name in args.cases}
    own = {name: case for name, case in OWN.items() if name in args.cases}
    rows: list[Row] = []
    lines: list[str] = []
    operations = retraces = None
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_model(folder)
        task = {**BENCHMARK.task, "model": str(folder), "prompts": random_prompts(0, 1)}
        contenders = harness.start(stack, this.pythons, BENCHMARK, task, args.output)
        versions = {contender.name: contender.about["versions"] for contender in contenders}
        harness.check_same_model(contenders)
        ours = next((contender for contender in contenders if contender.name == OURS), None)
        if len(contenders) > 1:
            lines.append(equal_sequences(contenders))
        if shared:
            rows += harness.measure(contenders, requests(shared), args.warmup, args.repetitions)
        if own and ours:
            rows += harness.measure([ours], requests(own), args.warmup, args.repetitions)
            lines += own_lines(rows)
            operations = ours.ask({"call": "operations", "prompts": task["prompts"], "block_size": BLOCK})
            lines.append(operations_line(operations))
        if RETRACES in args.cases and ours:
            retraces = ours.ask({"call": "retraces", "prompts": task["prompts"]})
            lines.append(retraces_line(retraces))
    lines.insert(0, report.table(rows, BENCHMARK.goals))
    this.finish(rows, versions, lines, operations=operations, retraces=retraces, notes=lines[1:])
    harness.refuse_retraces(retraces)
    return rows


if __name__ == "__main__":
    run(sys.argv[1:])
