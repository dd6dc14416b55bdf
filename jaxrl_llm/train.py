r"""Trains a policy as a config file describes.

    python -m jaxrl_llm.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m jaxrl_llm.train --config=configs/grpo.py:path/to/model --workdir=runs/mine \
        --config.optimizer.learning_rate=1e-6

Every key of the config can be set on the command line. The same command resumes an interrupted run.
"""

import time

from absl import flags as absl_flags

from jaxrl_llm import flags

absl_flags.adopt_module_key_flags(flags)


def main(argv: list[str]) -> None:
    from jaxrl_llm.data.sources import MalformedRow
    from jaxrl_llm.training import job as jobs
    from jaxrl_llm.training import loop
    from jaxrl_llm.training.checkpoints import CheckpointError, ConfigMismatch
    from jaxrl_llm.training.groups import DegenerateBatch
    from jaxrl_llm.training.progress import summary
    from jaxrl_llm.training.rewarding import RewardError

    started, workdir = time.time(), flags.workdir()
    assert workdir is not None
    try:
        job = jobs.validate(flags.config(), title=str(workdir))
    except (ValueError, FileNotFoundError) as error:  # mistakes in what the user named, all found by now
        flags.fail(error)
    try:
        loop.run(job, workdir)
    except (
        CheckpointError,
        ConfigMismatch,
        DegenerateBatch,
        FloatingPointError,
        MalformedRow,
        RewardError,
        loop.NonFinite,
        loop.WriteError,
    ) as error:
        flags.fail(error)
    except loop.Stopped as stopped:
        print(stopped)
        return
    summary([*loop.results(job, workdir), ("seconds", f"{time.time() - started:.0f}")], title="done")


if __name__ == "__main__":
    flags.run(main, required=("config", "workdir"))
