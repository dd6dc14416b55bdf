"""The flags that the binaries share, and how mistakes in them are reported."""

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with an argument after a colon where it takes one.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics, plots and the exported model."
)


def config() -> ConfigDict:
    """The config with its overrides."""
    return _CONFIG.value


def workdir() -> Path | None:
    """The folder of the run."""
    return Path(_WORKDIR.value).expanduser() if _WORKDIR.value else None


def fail(error: Exception) -> NoReturn:
    """Ends the program with what is wrong and the way out, and no traceback."""
    notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
    sys.exit(f"{type(error).__name__}: {error}{notes}")


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        getattr(_CONFIG.value, "seed", None)  # a file that could not be loaded is an error only when used
        return rest
    except flags.Error as error:
        text = str(error)
        if refused := re.search(r"Error whilst parsing config file:.*\nValueError: (.*)", text, re.DOTALL):
            text = f"--config: {refused[1].strip()}"  # the config file itself refuses its argument
        sys.exit(f"{text}\n--helpshort lists the flags")
    except OSError as error:  # its last lines: the path, and why
        sys.exit(
            "--config cannot be loaded: " + " ".join(line.strip() for line in str(error).splitlines()[-2:])
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # raised by a config file, or by an override of a key that it does not have
        text = str(error.args[0] if error.args else error)
        hint = re.search(r"Did you mean .*?\?", text)
        sys.exit(f"--config or its overrides: {'unknown key. ' + hint.group() if hint else text}")


def run(main: Callable[[list[str]], None], required: Sequence[str]) -> None:
    """Parses the command line and calls `main` with what no flag took."""
    flags.mark_flags_as_required(required)

    def checked(argv: list[str]) -> None:
        if len(argv) > 1:
            sys.exit(f"unexpected arguments {argv[1:]}; --helpshort lists the flags")
        try:
            main(argv)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)

    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is absent is no news here
    app.run(checked, flags_parser=_parse)
