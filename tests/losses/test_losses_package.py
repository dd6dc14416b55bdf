"""What the packages promise as packages: light to import, documented by examples that run."""

import doctest
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys

import pytest

from jaxrl_llm import advantages, losses
from jaxrl_llm.advantages import ADVANTAGES
from jaxrl_llm.losses import KL_ESTIMATORS, SURROGATES

MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (losses, advantages)
    for module in pkgutil.iter_modules(package.__path__)
]
FUNCTIONS = {
    f"{package.__name__}.{name}": function
    for package in (losses, advantages)
    for name, function in inspect.getmembers(package, inspect.isfunction)
}


def test_importing_pulls_in_jax_alone_and_quickly():
    """The modules that appear beyond jax are ours and the standard library's; in half a second of CPU."""
    program = """
import sys, time, jax, jax.numpy
before, start = set(sys.modules), time.process_time()
from jaxrl_llm import losses, advantages
seconds = time.process_time() - start
import json
print(json.dumps([seconds, sorted({name.split(".")[0] for name in set(sys.modules) - before})]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, names = json.loads(done.stdout)
    assert set(names) - set(sys.stdlib_module_names) == {"jaxrl_llm"}
    assert seconds < 0.5


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_are_documented(name):
    """A sentence, and for whatever can be chosen by name an example that runs."""
    function = FUNCTIONS[name]
    assert function.__doc__ and function.__doc__.splitlines()[0].endswith(".")
    if function in [*SURROGATES.values(), *KL_ESTIMATORS.values(), *ADVANTAGES.values()]:
        assert ">>>" in function.__doc__
