"""Compiles tokamax's fused cross-entropy for a TPU that is not here: its kernels alone, at their own tiles.

The public function asks the default device whether it is a TPU, so the functions below it are called.
"""

import functools
import importlib.metadata
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tokamax._src.ops.linear_softmax_cross_entropy_loss import pallas_mosaic_tpu_kernel as kernel


def main() -> None:
    task = json.loads(sys.argv[1])
    jax.config.update("jax_platforms", "cpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=task["topology"]).devices
    mesh = Mesh(np.array(devices[:1]), ("one",))
    array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, P()))
    rows, width, vocab = task["rows"], task["width"], task["vocab"]
    hidden, head = array((rows, width), jnp.bfloat16), array((width, vocab), jnp.bfloat16)
    targets, lse = array((rows,), jnp.int32), array((rows,), jnp.float32)
    forward = kernel.linear_softmax_cross_entropy_loss_fwd_pallas_mosaic_tpu
    backward = kernel.linear_softmax_cross_entropy_loss_bwd_pallas_mosaic_tpu
    with jax.set_mesh(mesh):
        if task["kernel"] == "forward":
            forward.lower(hidden, targets, head).compile()
        else:
            backward.lower(array((), jnp.float32), lse, hidden, targets, head).compile()
    print(json.dumps({name: importlib.metadata.version(name) for name in ("tokamax", "libtpu")}))


if __name__ == "__main__":
    main()
