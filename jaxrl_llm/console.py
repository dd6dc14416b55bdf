"""Console scripts. Each runs its module as `__main__`, so that absl prints that module's flags for help."""

import runpy


def train() -> None:
    """jaxrl-train."""
    runpy.run_module("jaxrl_llm.train", run_name="__main__", alter_sys=True)


def evaluate() -> None:
    """jaxrl-evaluate."""
    runpy.run_module("jaxrl_llm.evaluate", run_name="__main__", alter_sys=True)


def sample() -> None:
    """jaxrl-sample."""
    runpy.run_module("jaxrl_llm.sample", run_name="__main__", alter_sys=True)


def serve() -> None:
    """jaxrl-serve."""
    runpy.run_module("jaxrl_llm.serve", run_name="__main__", alter_sys=True)
