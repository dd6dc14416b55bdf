"""TPU kernels on the CPU: memory is full of NaN until written, and what lies out of bounds raises."""

import functools

from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # races have no public name
from jax.experimental.pallas import tpu as pltpu


def emulated(function, **params):
    """The function with the kernels that it calls emulated, by `pltpu.InterpretParams(**params)`."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**params)):
            return function(*args, **kwargs)

    return run


def races_found():
    """Whether the last kernel that was emulated with detect_races=True had any."""
    return interpret_pallas_call.races.races_found
