"""The choice between the bodies of one kernel."""

from collections.abc import Callable
from typing import Any

import jax

PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}
"""Body -> the platform that it is for; "xla" is for all others."""


def run(
    implementation: str | None, *operands: Any, xla: Callable[..., Any], **bodies: Callable[..., Any]
) -> Any:
    """Calls the body of that name on the operands; None leaves the choice to the platform compiled for.

    Args:
      implementation: name of a body, or None.
      operands: what every body takes.
      xla, bodies: name -> function; those other than "xla" are keys of `PLATFORMS`.

    Raises:
      ValueError: unknown implementation.
    """
    bodies = {"xla": xla, **bodies}
    if implementation is None:
        by_platform = {PLATFORMS[name]: body for name, body in bodies.items() if name != "xla"}
        return jax.lax.platform_dependent(*operands, default=xla, **by_platform)
    if implementation not in bodies:
        raise ValueError(f"unknown implementation {implementation!r}; one of {', '.join(bodies)}, or None")
    return bodies[implementation](*operands)
