"""Eight virtual CPU devices, so that sharding is tested everywhere. Set before jax is imported."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
