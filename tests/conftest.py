"""Eight virtual CPU devices, so that sharding is tested everywhere. Set before jax is imported.

By name: where none is named, jax-cuda13-plugin refuses to load without cuDNN, even for compiling alone.

Tests compile many small programs and run each once or twice, so the compiler does not optimise machine code.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)


def pytest_collection_modifyitems(items):
    """What takes longest comes first, so that the processes end together."""
    items.sort(key=lambda item: item.path.parent.name != "training")
