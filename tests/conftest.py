"""Eight virtual CPU devices, so that sharding is tested everywhere. Set before jax is imported.

By name: where none is named, jax-cuda13-plugin refuses to load without cuDNN, even for compiling alone.

Tests compile many small programs and run each once or twice, so the compiler does not optimise machine code,
and makes one module of a program's loops instead of one of each: a quarter of the time to compile.
"""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)

import jax
import pytest

MOST_MAPS = 20_000
"""Of the 65,530 that Linux allows a process by default; beyond them it crashes."""


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Forgets what was compiled before a process runs out of memory maps, which programs take up."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > MOST_MAPS:
        jax.clear_caches()
