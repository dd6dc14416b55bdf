r"""Serves a policy over HTTP, to whatever speaks OpenAI's API.

    python -m jaxrl_llm.serve --config=configs/grpo.py:path/to/model --port=8000
    python -m jaxrl_llm.serve --config=configs/quickstart.py --workdir=runs/quickstart --slots=32

    curl localhost:8000/v1/completions -H "Content-Type: application/json" \
        -d '{"model": "policy", "prompt": "Calculate 12 + 7.", "max_tokens": 64}'

Needs the extra `serve`, and `guided` for response_format. There are no keys and no users: whoever reaches the
port may ask.
"""

from absl import flags as absl_flags

from jaxrl_llm import flags

absl_flags.adopt_module_key_flags(flags)

_STEP = absl_flags.DEFINE_integer("step", None, "Step of the checkpoint; none = the newest.")
_HOST = absl_flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0 = all of the machine.")
_PORT = absl_flags.DEFINE_integer("port", 8000, "Port; 0 = any.", lower_bound=0, upper_bound=65535)
_NAME = absl_flags.DEFINE_string("name", "policy", "What clients call the model.")
_SLOTS = absl_flags.DEFINE_integer("slots", 16, "Completions written at a time.", lower_bound=1)
_LENGTH = absl_flags.DEFINE_integer(
    "max_length", None, "Tokens of prompt and completion; none = what the config's just need.", lower_bound=2
)


def main(argv: list[str]) -> None:
    try:
        import uvicorn

        from jaxrl_llm.rollouts.serving import make_app
        from jaxrl_llm.rollouts.serving_rules import serving_rules
    except ModuleNotFoundError as error:
        error.add_note("serving needs the extra 'serve': pip install -c constraints.txt -e '.[serve]'")
        flags.fail(error)
    from jaxrl_llm.training import job as jobs
    from jaxrl_llm.training.checkpoints import CheckpointError

    try:
        job = jobs.build(flags.config(), training=False, evaluation=False)
        params, _ = jobs.policy_params(job, flags.workdir(), _STEP.value)
        rules = serving_rules(job.cfg.vocab_size, job.tokenizer.eos_ids)
        engine = jobs.make_engine(job, params, slots=_SLOTS.value, max_length=_LENGTH.value, rules=rules)
    except (ValueError, FileNotFoundError, CheckpointError) as error:
        flags.fail(error)
    app = make_app(engine, job.tokenizer, model=_NAME.value)
    uvicorn.run(app, host=_HOST.value, port=_PORT.value)


if __name__ == "__main__":
    flags.run(main, required=("config",))
