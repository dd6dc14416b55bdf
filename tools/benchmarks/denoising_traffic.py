"""HBM traffic of a denoising step on a TPU that is not here: the fused kernel beside the formulas in XLA.

    pip install -c constraints.txt -e '.[tpu]' && python tools/benchmarks/denoising_traffic.py

libtpu compiles both for the chip at LLaDA-8B's vocabulary, with float32 logits of the input and of its
negative, banned and distrusted tokens, and with or without the look at the 8 most likely tokens.

Columns:
  positions    rows of logits: batch × block
  look         whether distributions are compared with those of the last step
  inputs       MiB of the operands, each of which has to be read once
  traffic      MiB read and written. XLA: the compiler's own count. The kernel: operands and results, as every
               block of them is transferred once
  temporaries  MiB, by the compiler

What it does not prove: time, or numerics; nothing is run.
"""

import argparse
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import report
from jax.experimental import topologies

from jaxrl_kernels.denoising_step import Look, denoising_step

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
VOCAB, TRACKED = 126_464, 8
ROWS = (32, 512)
MIB = 2**20


def compiled(chip: str, rows: int, tracked: int, implementation: str) -> Any:
    """The program for one chip."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def array(dtype: Any, *tail: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *tail), dtype, sharding=sharding)

    batch: dict[str, Any] = {name: array(jnp.float32, VOCAB) for name in ("logits", "negative")}
    batch |= {name: array(jnp.int32, 2) for name in ("banned", "distrusted")}
    batch["weight"] = array(jnp.float32)
    if tracked:
        batch["last"] = Look(array(jnp.int32, tracked), array(jnp.float32, tracked), array(bool))
    step = jax.jit(lambda batch: denoising_step(**batch, implementation=implementation))
    return step.lower(batch).compile()


def run(argv: Sequence[str] | None = None) -> None:
    """From the command line to the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", choices=[*TOPOLOGIES], default="v6e")
    chip = parser.parse_args(argv).chip
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit("libtpu is absent: pip install -c constraints.txt -e '.[tpu]'")
    os.environ |= ENVIRONMENT
    jax.config.update("jax_platforms", "cpu")
    lines = [("positions", "look", "body", "inputs (MiB)", "traffic (MiB)", "temporaries (MiB)")]
    for rows in ROWS:
        for tracked in (0, TRACKED):
            for implementation in ("xla", "pallas_tpu"):
                program = compiled(chip, rows, tracked, implementation)
                memory = program.memory_analysis()
                traffic = program.cost_analysis()["bytes accessed"]
                sizes = memory.argument_size_in_bytes, traffic, memory.temp_size_in_bytes
                numbers = (f"{size / MIB:,.1f}" for size in sizes)
                lines.append((str(rows), "yes" if tracked else "no", implementation, *numbers))
    print(report.markdown(lines))


if __name__ == "__main__":
    run()
