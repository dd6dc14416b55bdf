r"""Samples from a policy: prompts from --prompt, or one a line from standard input.

    python -m jaxrl_llm.sample --config=configs/quickstart.py --workdir=runs/quickstart \
        --prompt="Calculate 12 + 7."
    python -m jaxrl_llm.sample --config=configs/grpo.py:path/to/model --config.rollout.top_p=0.9 < prompts.txt

Sampling parameters are the config's, under rollout.
"""

import sys
from collections.abc import Iterator

from absl import flags as absl_flags

from jaxrl_llm import flags

absl_flags.adopt_module_key_flags(flags)

_STEP = absl_flags.DEFINE_integer("step", None, "Step of the checkpoint; none = the newest.")
_PROMPT = absl_flags.DEFINE_multi_string(
    "prompt", [], "A prompt; may be repeated. None = lines of standard input."
)
_CHAT = absl_flags.DEFINE_bool("chat", False, "Wrap each prompt as a user's message in the chat template.")
_COUNT = absl_flags.DEFINE_integer("count", 1, "Completions per prompt.", lower_bound=1)


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
    import dataclasses

    from jaxrl_llm.data.prompts import encode_prompts
    from jaxrl_llm.rollouts.single_turn import rollout
    from jaxrl_llm.sampling.autoregressive import prepare
    from jaxrl_llm.training import job as jobs
    from jaxrl_llm.training.checkpoints import CheckpointError

    try:
        job = jobs.build(flags.config(), training=False, evaluation=False)
        params, _ = jobs.policy_params(job, flags.workdir(), _STEP.value)
    except (ValueError, FileNotFoundError, CheckpointError) as error:
        flags.fail(error)
    prepared = prepare(params, job.cfg, job.dtype)
    settings = dataclasses.replace(job.settings(), num_generations=_COUNT.value)
    uid = 0
    for text in asked():
        row = {"prompt": [{"role": "user", "content": text}] if _CHAT.value else text}
        limit = job.config.data.max_prompt_length
        try:
            prompts, _ = encode_prompts([row], job.tokenizer, max_prompt_length=limit, overlong="error")
        except ValueError as error:
            print(f"not sampled: {error}", file=sys.stderr)
            continue
        key = jobs.run_key(job, jobs.SAMPLE, 0)
        out = rollout(prepared, job.cfg, job.tokenizer, prompts, settings, key=key, first_uid=uid)
        uid += _COUNT.value
        for completion in out.completions:
            print(completion, flush=True)


if __name__ == "__main__":
    flags.run(main, required=("config",))
