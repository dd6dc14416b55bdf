"""Tile sizes, by TPU generation and width of the hidden state, chosen by the compiler's schedule.

`tools/benchmarks/kernel_schedule.py` measures them: fewest bundles for a logit, among the tiles whose traffic
takes less time than their bundles and that leave memory for the options that were not on.
"""

import dataclasses
from collections.abc import Mapping

from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 16
"""Columns and rows of a TPU register of bfloat16: the units of a tile's."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """One step of a kernel works on `rows` × `columns` logits.

    Attributes:
      rows, columns: how many.
      bundles: of a step when the tile was chosen (libtpu 0.0.42.1); a record that nothing depends on.
    """

    rows: int
    columns: int
    bundles: int | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Chip:
    """How a generation is used.

    Attributes:
      vmem_mib: on-chip memory a kernel may take, of the 128 (v5e, v6e), 64 (v5p, v7x) or 16 (v4) there is.
      forward, backward: width D -> tile. A width takes the tile of the next width listed. Beyond the last
        one the columns shrink in proportion and the rows by the next whole number, so that memory suffices.
    """

    vmem_mib: int
    forward: Mapping[int, Tile]
    backward: Mapping[int, Tile]


CHIPS: dict[str, Chip] = {
    "v4": Chip(
        vmem_mib=14,
        forward={2048: Tile(256, 256, 2576), 4096: Tile(256, 256, 4488)},
        backward={2048: Tile(128, 256, 3543), 4096: Tile(64, 128, 2741)},
    ),
    "v5e": Chip(
        vmem_mib=100,
        forward={2048: Tile(512, 1024, 14736), 4096: Tile(512, 1024, 27968)},
        backward={2048: Tile(512, 1024, 40799), 4096: Tile(512, 512, 43081)},
    ),
    "v5p": Chip(
        vmem_mib=60,
        forward={2048: Tile(512, 1024, 14855), 4096: Tile(512, 1024, 28084)},
        backward={2048: Tile(256, 1024, 22135), 4096: Tile(256, 512, 21933)},
    ),
    "v6e": Chip(
        vmem_mib=112,
        forward={2048: Tile(1024, 2048, 20316), 4096: Tile(1024, 2048, 36695)},
        backward={2048: Tile(512, 2048, 25877), 4096: Tile(512, 1024, 25445)},
    ),
    "7x": Chip(
        vmem_mib=60,
        forward={2048: Tile(512, 2048, 7701), 4096: Tile(512, 2048, 12517)},
        backward={2048: Tile(512, 1024, 10658), 4096: Tile(256, 512, 6459)},
    ),
}
"""By `pltpu.ChipVersion`."""

UNKNOWN = "v4"
"""Whose tiles fit on every generation: for compiling without a mesh that says which chip it is for."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tiles for one call.

    Attributes:
      forward, backward: tiles.
      vmem_mib: to ask for.
      cores: that share the backward pass of one device, each with its own part of the vocabulary.
    """

    forward: Tile
    backward: Tile
    vmem_mib: int
    cores: int = 1


def plan(width: int) -> Plan:
    """For the chip of the mesh in context, or of the default device; for any chip if that is no TPU.

    Args:
      width: D of the hidden states.
    """
    try:
        info = pltpu.get_tpu_info()
    except ValueError:  # "Unsupported TPU device kind: cpu"
        name, cores = UNKNOWN, 1
    else:
        name, cores = info.chip_version.value, info.num_cores
    chip = CHIPS.get(name, CHIPS[UNKNOWN])
    return Plan(_tile(chip.forward, width), _tile(chip.backward, width), chip.vmem_mib, cores)


def _tile(table: Mapping[int, Tile], width: int) -> Tile:
    listed = min((d for d in table if d >= width), default=None)
    if listed is not None:
        return table[listed]
    largest = max(table)
    tile = table[largest]
    rows, columns = tile.rows // -(-width // largest), tile.columns * largest // width
    return Tile(max(SUBLANES, rows // SUBLANES * SUBLANES), max(LANES, columns // LANES * LANES))
