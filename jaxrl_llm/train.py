"""Trains a policy as a config file describes.

    python -m jaxrl_llm.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m jaxrl_llm.train --config=configs/grpo.py:path/to/model --workdir=runs/mine \
        --config.optimizer.learning_rate=1e-6

Every key of the config can be set on the command line. The same command resumes an interrupted run.
"""

import os
import sys
import time
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before jax: its compiler logs what users cannot act on

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with an argument after a colon where it takes one.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics, plots and the export.")


def main(argv: list[str]) -> None:
    from jaxrl_llm.training import job as jobs
    from jaxrl_llm.training import loop
    from jaxrl_llm.training.checkpoints import CheckpointError, ConfigMismatch
    from jaxrl_llm.training.groups import DegenerateBatch
    from jaxrl_llm.training.progress import summary

    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    workdir = Path(_WORKDIR.value or ".").expanduser()
    started = time.time()
    try:
        job = jobs.build(_CONFIG.value)
    except (ValueError, FileNotFoundError) as error:  # mistakes in what the user named, all found by now
        sys.exit(f"{type(error).__name__}: {error}")
    summary(jobs.describe(job), title=str(workdir))
    try:
        loop.run(job, workdir)
    except (CheckpointError, ConfigMismatch, DegenerateBatch, loop.NonFinite) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except loop.Stopped as stopped:
        print(stopped)
        return
    summary([*loop.results(job, workdir), ("seconds", f"{time.time() - started:.0f}")], title="done")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
