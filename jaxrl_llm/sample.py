r"""Samples from a policy: prompts from --prompt, from a file, or one a line from standard input.

    python -m jaxrl_llm.sample --config=configs/quickstart.py --workdir=runs/quickstart \
        --prompt="Calculate 12 + 7."
    python -m jaxrl_llm.sample --config=configs/grpo.py:path/to/model --chat
    python -m jaxrl_llm.sample --config=configs/grpo.py:path/to/model --config.rollout.top_p=0.9 \
        --count=4 --input=prompts.jsonl --output=completions.jsonl

On a terminal it asks for prompts, and text appears as it is written. Of a file every row needs a `prompt`
(text or messages); the output has the rows, in order, with `completions`, `completion_ids`,
`behaviour_logp` and `raw_logp` (nats, by token) and `reasons` for which they ended.

Sampling parameters are the config's, under rollout.
"""

import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from jaxrl_llm import flags

if TYPE_CHECKING:  # flags are to be read, and shown, before anything slow is imported
    from jaxrl_llm.data.prompts import Prompt
    from jaxrl_llm.data.tokenizers import Tokenizer
    from jaxrl_llm.rollouts.engine import Completion, Engine, Request
    from jaxrl_llm.training.job import Job

absl_flags.adopt_module_key_flags(flags)

_STEP = absl_flags.DEFINE_integer("step", None, "Step of the checkpoint; none = the newest.")
_PROMPT = absl_flags.DEFINE_multi_string(
    "prompt", [], "A prompt; may be repeated. None = lines of standard input."
)
_INPUT = absl_flags.DEFINE_string("input", None, "JSONL file whose rows have a prompt.")
_OUTPUT = absl_flags.DEFINE_string("output", None, "JSONL file to write its rows to, with completions.")
_CHAT = absl_flags.DEFINE_bool("chat", False, "Wrap each prompt as a user's message in the chat template.")
_COUNT = absl_flags.DEFINE_integer("count", 1, "Completions per prompt.", lower_bound=1)
_SLOTS = absl_flags.DEFINE_integer("slots", 16, "Completions written at a time.", lower_bound=1)


def asked() -> Iterator[str]:
    """The prompts, one by one."""
    if _PROMPT.value:
        yield from _PROMPT.value
        return
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def requests(job: "Job", prompt: "Prompt", uid: int) -> "list[Request]":
    """The completions of a prompt, numbered from `uid`."""
    from jaxrl_llm.rollouts.engine import Request
    from jaxrl_llm.rollouts.single_turn import stop_finder

    s = job.settings()
    find_stop = stop_finder(job.tokenizer, s.stop_strings)
    sampling = s.temperature, s.top_p, s.top_k, s.min_p
    return [
        Request(prompt.ids, s.max_completion_length, *sampling, uid=(uid + i) % 2**31, find_stop=find_stop)
        for i in range(_COUNT.value)
    ]


async def show(engine: "Engine", tokenizer: "Tokenizer", request: "Request") -> None:
    """Prints a completion while it is written."""
    from jaxrl_llm.rollouts.streaming import TextStream

    text = TextStream(tokenizer)
    async for piece in engine.stream(request):
        print(text.push(piece.tokens.tolist(), last=bool(piece.reason)), end="", flush=True)
        if piece.error:
            print(f"not sampled: {piece.error}", file=sys.stderr)
    print(flush=True)


def batch(engine: "Engine", job: "Job", prompts: "Sequence[Prompt]", output: Path) -> None:
    """Writes a line for every prompt, as soon as it and those before it are done."""
    tickets = [[*map(engine.submit, requests(job, p, p.index * _COUNT.value))] for p in prompts]
    with output.open("w") as file:
        for prompt, own in zip(prompts, tickets):
            while not all(ticket.future.done() for ticket in own):
                engine.step()
            row = prompt.row | _columns(job.tokenizer, [ticket.future.result() for ticket in own])
            print(json.dumps(row, ensure_ascii=False), file=file, flush=True)
            own.clear()


def _columns(tokenizer: "Tokenizer", completions: "list[Completion]") -> dict[str, Any]:
    return {
        "completions": [tokenizer.decode(c.tokens.tolist()) for c in completions],
        "completion_ids": [c.tokens.tolist() for c in completions],
        "behaviour_logp": [c.behaviour_logp.tolist() for c in completions],
        "raw_logp": [c.raw_logp.tolist() for c in completions],
        "reasons": [c.reason for c in completions],
    }


def main(argv: list[str]) -> None:
    from jaxrl_llm.data.prompts import encode_prompts
    from jaxrl_llm.data.sources import open_source
    from jaxrl_llm.training import job as jobs
    from jaxrl_llm.training.checkpoints import CheckpointError

    output = Path(_OUTPUT.value).expanduser() if _OUTPUT.value else None
    rows: list[Prompt] = []
    try:
        if (_INPUT.value is None) != (output is None):
            raise ValueError("--input and --output belong together: give both or neither")
        if _INPUT.value and (_PROMPT.value or _CHAT.value):
            raise ValueError("--input takes no --prompt and no --chat: its rows have prompts, or messages")
        if output is not None and not output.absolute().parent.is_dir():
            raise FileNotFoundError(f"--output={output}: there is no folder {output.absolute().parent}")
        job = jobs.build(flags.config(), training=False, evaluation=False)
        limit = job.config.data.max_prompt_length
        if _INPUT.value:
            source = open_source("jsonl", path=_INPUT.value)
            if output is not None and output.resolve() == Path(_INPUT.value).expanduser().resolve():
                raise ValueError(f"--output={output} is the input: name another file")
            rows, _ = encode_prompts(
                source, job.tokenizer, max_prompt_length=limit, overlong="error", place=source.place
            )
        params, _ = jobs.policy_params(job, flags.workdir(), _STEP.value)
        engine = jobs.make_engine(job, params, slots=_SLOTS.value)
    except (ValueError, FileNotFoundError, CheckpointError) as error:
        flags.fail(error)
    if output is not None:
        batch(engine, job, rows, output)
        return
    uid = 0
    streaming = not _PROMPT.value and sys.stdin.isatty()
    for text in asked():
        row = {"prompt": [{"role": "user", "content": text}] if _CHAT.value else text}
        try:
            (prompt,), _ = encode_prompts([row], job.tokenizer, max_prompt_length=limit, overlong="error")
        except ValueError as error:
            print(f"not sampled: {error}", file=sys.stderr)
            continue
        own = requests(job, prompt, uid)
        uid += _COUNT.value
        if streaming:
            for request in own:
                asyncio.run(show(engine, job.tokenizer, request))
            continue
        for completion in engine.generate(own):
            print(job.tokenizer.decode(completion.tokens.tolist()), flush=True)
            if completion.error:
                print(f"not sampled: {completion.error}", file=sys.stderr)


if __name__ == "__main__":
    flags.run(main, required=("config",))
