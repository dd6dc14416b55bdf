r"""Samples from a policy: prompts from --prompt, from a file, or one a line from standard input.

    python -m jaxrl_llm.sample --config=configs/quickstart.py --workdir=runs/quickstart \
        --prompt="Calculate 12 + 7."
    python -m jaxrl_llm.sample --config=configs/grpo.py:path/to/model --chat
    python -m jaxrl_llm.sample --config=configs/grpo.py:path/to/model --config.rollout.top_p=0.9 \
        --count=4 --input=prompts.jsonl --output=completions.jsonl
    python -m jaxrl_llm.sample --config=configs/diffusion.py:path/to/model,focore --heat_map=commits.png

On a terminal it asks for prompts, and text appears as it is written; elsewhere it is printed when it is done.
Of a file every row needs a `prompt` (text or messages); the output has the rows, in order, with
`completions`, `completion_ids`, `behaviour_logp` and `raw_logp` (nats, by token) and `reasons` for which they
ended. With a masked diffusion model ids are those of the whole response, and there are `commit_steps` (the
round that committed each token, from 0; -1 = none did), `steps` (rounds) and `nfe` (forward passes).

Sampling parameters are the config's: under rollout, or method and settings of `configs/diffusion.py`.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags as absl_flags

from jaxrl_llm import flags

if TYPE_CHECKING:  # flags are to be read, and shown, before anything slow is imported
    from jaxrl_llm.data.prompts import Prompt
    from jaxrl_llm.data.sources import Row

absl_flags.adopt_module_key_flags(flags)

_STEP = absl_flags.DEFINE_integer("step", None, "Step of the checkpoint; none = the newest.")
_PROMPT = absl_flags.DEFINE_multi_string(
    "prompt", [], "A prompt; may be repeated. None = lines of standard input."
)
_INPUT = absl_flags.DEFINE_string("input", None, "JSONL file whose rows have a prompt.")
_OUTPUT = absl_flags.DEFINE_string("output", None, "JSONL file to write its rows to, with completions.")
_CHAT = absl_flags.DEFINE_bool("chat", False, "Wrap each prompt as a user's message in the chat template.")
_COUNT = absl_flags.DEFINE_integer("count", 1, "Completions per prompt.", lower_bound=1)
_HEAT_MAP = absl_flags.DEFINE_string(
    "heat_map", None, "PNG file for when each token of the last completions was committed (diffusion only)."
)
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


def main(argv: list[str]) -> None:
    from jaxrl_llm.data.prompts import encode_prompts
    from jaxrl_llm.data.rows import MalformedRow
    from jaxrl_llm.data.sources import open_source
    from jaxrl_llm.sample_autoregressive import Autoregressive
    from jaxrl_llm.sample_diffusion import Diffusion
    from jaxrl_llm.training.checkpoints import CheckpointError

    def encode(rows: "Iterable[Row]", place: Callable[[int], str] = "row {}".format) -> "list[Prompt]":
        limit = sampler.max_prompt_length
        prompts, _ = encode_prompts(
            rows, sampler.tokenizer, max_prompt_length=limit, overlong="error", place=place
        )
        for prompt in prompts:
            if sampler.mask_id is not None and sampler.mask_id in prompt.ids:
                raise MalformedRow(
                    f"the prompt of {place(prompt.index)} contains the mask token {sampler.mask_id}, which "
                    "stands for what is to be written: take it out"
                )
        return prompts

    output = Path(_OUTPUT.value).expanduser() if _OUTPUT.value else None
    picture = Path(_HEAT_MAP.value).expanduser() if _HEAT_MAP.value else None
    prompts: list[Prompt] = []
    sampler: Autoregressive | Diffusion
    try:
        if (_INPUT.value is None) != (output is None):
            raise ValueError("--input and --output belong together: give both or neither")
        if _INPUT.value and (_PROMPT.value or _CHAT.value):
            raise ValueError("--input takes no --prompt and no --chat: its rows have prompts, or messages")
        for name, path in (("output", output), ("heat_map", picture)):
            if path is not None and not path.absolute().parent.is_dir():
                raise FileNotFoundError(f"--{name}={path}: there is no folder {path.absolute().parent}")
        config = flags.config()
        if "method" in config:
            sampler = Diffusion(config, _COUNT.value)
        else:
            sampler = Autoregressive(config, _COUNT.value)
        if picture is not None and (isinstance(sampler, Autoregressive) or picture.suffix != ".png"):
            raise ValueError(
                f"--heat_map={picture}: a .png file, for a model sampled by configs/diffusion.py"
            )
        if _INPUT.value:
            source = open_source("jsonl", path=_INPUT.value)
            if output is not None and output.resolve() == Path(_INPUT.value).expanduser().resolve():
                raise ValueError(f"--output={output} is the input: name another file")
            prompts = encode(source, source.place)
        sampler.load(flags.workdir(), _STEP.value, _SLOTS.value)
    except (ValueError, FileNotFoundError, CheckpointError) as error:
        flags.fail(error)
    if output is not None:
        with output.open("w") as file:
            for prompt, columns in zip(prompts, sampler.columns(prompts)):
                print(json.dumps(prompt.row | columns, ensure_ascii=False), file=file, flush=True)
        if picture is not None and isinstance(sampler, Diffusion):
            sampler.draw(picture)
        return
    uid = 0
    for text in asked():
        row = {"prompt": [{"role": "user", "content": text}] if _CHAT.value else text}
        try:
            (prompt,) = encode([row])
        except ValueError as error:
            print(f"not sampled: {error}", file=sys.stderr)
            continue
        if sys.stdout.isatty():
            sampler.show(prompt, uid)
        else:
            for written, problem in sampler.texts(prompt, uid):
                print(written, flush=True)
                if problem:
                    print(f"not sampled: {problem}", file=sys.stderr)
        uid += _COUNT.value
        if picture is not None and isinstance(sampler, Diffusion):
            sampler.draw(picture)


if __name__ == "__main__":
    flags.run(main, required=("config",))
