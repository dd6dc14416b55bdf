"""Runs many command lines of the binaries in one process, by forks, so that the imports are paid for once.

Standard input has a JSON list [script, argument...] per line, script being a function of `jaxrl_llm.console`;
["terminal", path, script, argument...] gives the script that terminal. Standard output gets a JSON list
[exit code, stdout, stderr] for each.
"""

import json
import os
import sys
import tempfile
import traceback
import warnings

import orbax.checkpoint  # noqa: F401
import transformers  # noqa: F401

import jaxrl_llm.training.loop  # noqa: F401
from jaxrl_llm import console


def become(script: str, arguments: list[str]) -> int:
    """Runs the script as its own process would, and returns its exit code."""
    sys.argv = [f"jaxrl-{script}", *arguments]
    try:
        getattr(console, script)()
        return 0
    except SystemExit as ending:  # as the interpreter does
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
            return 1
        return ending.code or 0
    except BaseException:
        traceback.print_exc()
        return 99


def main() -> None:
    warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)  # no backend is up yet
    for line in sys.stdin:
        script, *arguments = json.loads(line)
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            pid = os.fork()
            if pid == 0:
                files = [0, out.fileno(), err.fileno()]
                if script == "terminal":
                    path, script, *arguments = arguments
                    os.setsid()  # the first terminal that a session's leader opens is its own
                    files = [os.open(path, os.O_RDWR)] * 3
                for number, file in enumerate(files):
                    os.dup2(file, number)
                code = become(script, arguments)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            for file in (out, err):
                file.seek(0)
            print(json.dumps([code, out.read(), err.read()]), flush=True)


if __name__ == "__main__":
    main()
