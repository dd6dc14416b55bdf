"""Bundles of a steady grid step of the TPU kernels of linear_logprob, for chips that are not here.

    pip install -c constraints.txt -e '.[tpu]' && python tools/benchmarks/kernel_schedule.py

libtpu compiles a kernel for a chip it does not have and writes down the program: very long instruction words,
the bundles, each of which names what every unit of the core does in it. A step of the grid is one turn of one
loop. What is counted here is the shortest way through that loop that passes every matrix product and every
transfer it starts or waits for: the products and the soft-max, and what the pipeline adds at each step, but
not what runs at the first or last step of a row only. Tiles, and the figures they had when they were chosen,
are in `jaxrl_kernels/linear_logprob/blocks.py`.

Columns:
  bundles      of a step, at least one cycle each
  floor        cycles that the products would take with every matrix unit busy: 2·rows·columns·D operations
               forward and three times that backward, over the operations of a cycle (inferred from the
               vendor's peak rate and clock)
  use          floor / bundles. On v5e, v5p and 7x it can exceed 100%: a product there takes its unit for
               longer than the bundles say (or, on 7x, the operations of a cycle are more than was inferred)
  slots        share of the matrix units' slots that the bundles fill
  transfers    cycles that the HBM traffic of a step would take at the vendor's bandwidth: head tiles forward;
               hidden states and their float32 gradient, read and written, backward
  bound        the largest of bundles, floor and transfers

What it does not prove: time. A bundle can take longer than a cycle (waiting for a transfer, for the matrix
unit, for another core's use of the HBM), nothing is checked against a chip, and nothing is run at all.

With --tiles it measures candidates instead, and says which of them the compiler refuses and why.
Otherwise a second table sets ours beside tokamax's, on v6e at its default tile; see `tokamax_bundles`.
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import peers
import report
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_kernels.linear_logprob import pallas_tpu, tiles
from jaxrl_kernels.linear_logprob.blocks import CHIPS, Plan, Tile

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
OPERATIONS = {"v4": 131_072, "v5e": 131_072, "v5p": 131_072, "v6e": 524_288, "7x": 524_288}
"""Floating-point operations of a core in a cycle: vendor's peak over clock."""
PRODUCTS = {"forward": 1, "backward": 3}
"""Kernel -> matrix products of a tile."""
WIDTHS = (2048, 4096)
ROWS, VOCAB = 8192, 151_936

USE = {("forward", 2048): 0.76, ("forward", 4096): 0.85, ("backward", 2048): 0.90, ("backward", 4096): 0.92}
"""Goal on v6e: floor / bundles at least."""
NEAR = 1.05
"""Goal on v5e and v5p: max(bundles, floor) / floor at most."""

VECTOR = 1024
"""Float32 numbers of a vector register."""
DELAY = {"v4": 1, "v5e": 4, "v5p": 4, "v6e": 4, "7x": 1}
"""Bundles after a branch that run before it is taken."""

HERE = pathlib.Path(__file__).resolve().parent
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
FLAGS = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_.*"
"""Of libtpu: writes down the bundles alone. All passes take hundreds of MB for a kernel."""

OURS = report.OURS
TOKAMAX = dataclasses.replace(
    peers.TOKAMAX,
    requirements={**peers.TOKAMAX.requirements, "libtpu": "0.0.42.1"},
    pip_options="'jax[tpu]==0.10.2' ",
)
TOKAMAX_TILE, TOKAMAX_FEATURES = Tile(1024, 2048), 512
"""Its default on v6e: logits of a tile, and how much of D is in a step."""
TOKAMAX_VMEM_MIB = 116
"""That ours needs there."""


@dataclasses.dataclass(frozen=True)
class Bundle:
    """An instruction word.

    Attributes:
      units: unit -> instructions for it.
      moves: whether it starts or awaits a transfer.
      target: index of the bundle it may branch to, or None.
    """

    units: Mapping[str, int]
    moves: bool
    target: int | None


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel as the compiler left it.

    Attributes:
      bundles: in the order of their addresses.
      capacity: unit -> instructions that a bundle has room for.
      delay: bundles after a branch that run before it is taken.
    """

    bundles: Sequence[Bundle]
    capacity: Mapping[str, int]
    delay: int

    @classmethod
    def read(cls, text: str, utilization: str, delay: int) -> "Program":
        """From libtpu's *-final_bundles.txt and *-final_hlo-static-per-bundle-utilization.txt.

        Raises:
          ValueError: they do not belong together.
        """
        _, head, capacity, _, *counts = utilization.splitlines()
        units = [name.strip() for name in head.split(",")]
        lines = re.findall(r"^ *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2})? *:.*$", text, re.MULTILINE)
        if len(lines) != len(counts):
            raise ValueError(f"{len(lines)} bundles, and the use of {len(counts)}")
        starts = {
            region: index
            for index, line in enumerate(lines)
            for region in re.findall(r"Start(?:/End empty)? region (\d+)", line)
        }
        bundles = []
        for line, row in zip(lines, counts):
            branch = re.search(r"sbr\.rel .*?target = \$region(\d+)", line)
            target = starts[branch[1]] if branch else None
            bundles.append(Bundle(dict(zip(units, map(int, row.split()))), "= dma." in line, target))
        return cls(bundles, dict(zip(units, map(int, capacity.split()))), delay)

    def total(self, unit: str, indices: Iterable[int]) -> int:
        """Instructions for a unit."""
        return sum(self.bundles[index].units[unit] for index in indices)

    def behind(self, index: int) -> int:
        """Where the program goes on if the branch at `index` is not taken."""
        return index + 1 + self.delay

    def blocks(self) -> list[range]:
        """Indices between which there is no branch in or out."""
        branches = [(i, bundle.target) for i, bundle in enumerate(self.bundles) if bundle.target is not None]
        cuts = {0, len(self.bundles)}.union(*((self.behind(i), target) for i, target in branches))
        return [range(start, stop) for start, stop in itertools.pairwise(sorted(cuts))]

    def loop(self) -> range:
        """Indices of the loop over the grid.

        Raises:
          ValueError: there is none or another one, or matrix products are outside.
        """
        branches = [(i, bundle.target) for i, bundle in enumerate(self.bundles) if bundle.target is not None]
        loops = [range(target, self.behind(i)) for i, target in branches if target <= i]
        if len(loops) != 1:
            raise ValueError(f"{len(loops)} loops instead of one over the grid")
        if self.total("MXU", loops[0]) < self.total("MXU", range(len(self.bundles))):
            raise ValueError("matrix products outside the loop over the grid")
        return loops[0]

    def step(self, needed: Collection[int]) -> list[int]:
        """Indices of the shortest way through the loop that passes all the needed bundles."""
        loop = self.loop()
        fewest, jumps = {loop.stop: 0}, {}
        barrier, barriers = loop.stop, {loop.stop: loop.stop}  # index -> first needed bundle from there on
        for index in reversed(loop):
            barrier = barriers[index] = index if index in needed else barrier
            fewest[index] = 1 + fewest[index + 1]
            target, behind = self.bundles[index].target, self.behind(index)
            if target in fewest and behind <= target <= barriers[behind]:
                by_jump = behind - index + fewest[target]
                if by_jump < fewest[index]:
                    fewest[index], jumps[index] = by_jump, target
        way, index = [], loop.start
        while index < loop.stop:
            stop = self.behind(index) if index in jumps else index + 1
            way += range(index, stop)
            index = jumps.get(index, stop)
        return way

    def steady_step(self) -> list[int]:
        """Indices of the shortest way through the loop that passes every matrix product and transfer."""
        return self.step({i for i, bundle in enumerate(self.bundles) if bundle.moves or bundle.units["MXU"]})


def dumped(folder: pathlib.Path, kernel: str, chip: str) -> Program:
    """What libtpu wrote for a kernel, which is deleted."""
    texts = []
    for ending in ("[0-9][0-9]-final_bundles.txt", "final_hlo-static-per-bundle-utilization.txt"):
        (path,) = folder.glob(f"*-{kernel}.*-{ending}")
        texts.append(path.read_text())
    clear(folder)
    return Program.read(*texts, DELAY[chip])


def clear(folder: pathlib.Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A kernel to compile."""

    chip: str
    kernel: str
    width: int
    tile: Tile
    vmem_mib: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Of a steady step of a core; see the columns at the top.

    Attributes:
      bundles: how many.
      floor, transfers: cycles.
      slots: share, of 1.
    """

    bundles: int
    floor: float
    slots: float
    transfers: float

    @property
    def use(self) -> float:
        """Of 1."""
        return self.floor / self.bundles

    @property
    def bound(self) -> float:
        """In floors."""
        return max(self.bundles, self.floor, self.transfers) / self.floor


def measure(candidate: Candidate, folder: pathlib.Path) -> Schedule:
    """Compiles a kernel and reads what libtpu wrote into `folder`: bfloat16, with the gradient of the
    entropy, without temperature, soft cap and bias.

    Raises:
      jax.errors.JaxRuntimeError: the compiler refuses.
      ValueError: the program is not of the form that is understood here.
    """
    width, tile = candidate.width, candidate.tile
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[candidate.chip])
    mesh = Mesh(np.array(topology.devices[:1]), ("one",))
    array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    operands = tiles.Operands(
        array((ROWS, width), jnp.bfloat16),
        array((VOCAB, width), jnp.bfloat16),
        array((ROWS,), jnp.int32),
        array((ROWS,), jnp.bool_),
    )
    with jax.set_mesh(mesh):
        info = pltpu.get_tpu_info()
        using = Plan(tile, tile, candidate.vmem_mib, info.num_cores)
        if candidate.kernel == "forward":
            moved = 2 * tile.columns * width  # the head
            forward = functools.partial(pallas_tpu.forward, softcap=None, using=using)
            lowered = jax.jit(forward).lower(operands)
        else:
            moved = (2 + 4 + 4) * tile.rows * width  # hidden, and its gradient there and back
            of_row = tiles.Coefficients(*(array((ROWS,), jnp.float32) for _ in range(4)))
            backward = functools.partial(pallas_tpu.backward, softcap=None, head_gradient=True, using=using)
            lowered = jax.jit(backward).lower(operands, of_row)
        lowered.compile()
    program = dumped(folder, f"linear_logprob_{candidate.kernel}", candidate.chip)
    step = program.steady_step()
    if program.total("EUP", step) < tile.rows * tile.columns / VECTOR:
        raise ValueError("the exponentials of a step are not all among its bundles")
    rate = OPERATIONS[candidate.chip]
    return Schedule(
        bundles=len(step),
        floor=2 * PRODUCTS[candidate.kernel] * tile.rows * tile.columns * width / rate,
        slots=program.total("MXU", step) / (program.capacity["MXU"] * len(step)),
        transfers=moved * info.bf16_ops_per_second / info.mem_bw_bytes_per_second / rate,
    )


def goal(candidate: Candidate, schedule: Schedule) -> str:
    """The chip's goal and whether it is reached; empty where there is none."""
    if candidate.chip == "v6e":
        least = USE.get((candidate.kernel, candidate.width))
        if least is None:
            return ""
        return f"use ≥ {least:.0%}: {'reached' if schedule.use >= least else 'missed'}"
    if candidate.chip in ("v5e", "v5p"):
        return f"bound ≤ {NEAR} floors: {'reached' if schedule.bound <= NEAR else 'missed'}"
    return ""


def table(measured: Mapping[Candidate, Schedule]) -> str:
    """A line for each kernel that compiled."""
    head = "chip, kernel, D, tile, bundles, floor, use, slots, transfers, bound / floor, recorded, goal"
    lines = [tuple(head.split(", "))]
    for candidate, schedule in measured.items():
        tile = candidate.tile
        lines.append(
            (
                candidate.chip,
                candidate.kernel,
                str(candidate.width),
                f"{tile.rows} × {tile.columns}",
                f"{schedule.bundles:,}",
                f"{schedule.floor:,.0f}",
                f"{schedule.use:.1%}",
                f"{schedule.slots:.1%}",
                f"{schedule.transfers:,.0f}",
                f"{schedule.bound:.3f}",
                "" if tile.bundles is None else f"{tile.bundles:,}",
                goal(candidate, schedule),
            )
        )
    return report.markdown(lines)


def tokamax_bundles(python: str, kernel: str, width: int, folder: pathlib.Path) -> int:
    """Bundles that tokamax's kernel takes for one of its tiles on v6e, neither the first nor the last.

    A tile is several steps of its grid, as it cuts D into blocks. Forward: the first block starts the logits,
    the others add to them, and the last takes the soft-max too. Backward: the logits in the same way; then
    every block again, for the gradients of head and hidden, which it reads from HBM, adds to and writes back;
    in the first of these steps the soft-max too. Counted is the shortest way through the loop that passes
    these parts of the program, whether it passes the transfers or not; they are waited for within a step.

    Raises:
      subprocess.CalledProcessError: it does not compile.
      ValueError: the program is not of that form.
    """
    task = {"topology": TOPOLOGIES["v6e"], "rows": ROWS, "width": width, "vocab": VOCAB, "kernel": kernel}
    script = HERE / "contenders" / "tokamax_schedule.py"
    command, environment = [python, str(script), json.dumps(task)], os.environ | {"PYTHONPATH": ""}
    reply = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(*TOKAMAX.differences(json.loads(reply)), sep="\n", end="")
    short = {"forward": "fwd", "backward": "bwd"}[kernel]
    program = dumped(folder, f"linear_softmax_cross_entropy_loss_{short}_pallas_mosaic_tpu", "v6e")
    products = [block for block in program.blocks() if program.total("MXU", block)]
    soft_max = max(program.blocks(), key=functools.partial(program.total, "EUP"))
    if len(products) != {"forward": 2, "backward": 6}[kernel]:
        raise ValueError(f"{len(products)} blocks with matrix products in tokamax's {kernel} kernel")
    start, add = products[:2]
    more = width // TOKAMAX_FEATURES - 1
    if kernel == "forward":
        steps = [[start], *[[add]] * (more - 1), [add, soft_max]]
    else:
        gradients = products[4:]  # the two before them are for the first rows and the first columns
        steps = [[start], *[[add]] * more, [soft_max, *gradients], *[gradients] * more]
    return sum(len(program.step({*itertools.chain(*parts)})) for parts in steps)


def beside_tokamax(python: str, folder: pathlib.Path) -> str:
    """Ours and tokamax's at its tile on v6e, as a table."""
    lines = [("kernel", "D", "tile", "ours (bundles)", "tokamax (bundles)", "ratio", "goal")]
    width, tile = WIDTHS[0], TOKAMAX_TILE
    for kernel in PRODUCTS:
        ours = measure(Candidate("v6e", kernel, width, tile, TOKAMAX_VMEM_MIB), folder).bundles
        theirs = tokamax_bundles(python, kernel, width, folder)
        lines.append(
            (
                kernel,
                str(width),
                f"{tile.rows} × {tile.columns}",
                f"{ours:,}",
                f"{theirs:,}",
                f"{theirs / ours:.2f}×",
                f"fewer: {'reached' if ours < theirs else 'missed'}",
            )
        )
    return report.markdown(lines)


def candidates(args: argparse.Namespace) -> list[Candidate]:
    """What was asked for: the tiles of the project's table, or the given ones."""
    found = []
    for chip in args.chips:
        vmem_mib = args.vmem or CHIPS[chip].vmem_mib
        for kernel in args.kernels:
            recorded = getattr(CHIPS[chip], kernel)
            for width in args.widths:
                chosen = args.tiles or [recorded[width]]
                found += [Candidate(chip, kernel, width, tile, vmem_mib) for tile in chosen]
    return found


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Which kernels, at which tiles."""

    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    def sizes(text: str) -> list[Tile]:
        return [Tile(*map(int, size.split("x"))) for size in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", type=names, default=[*CHIPS], help="of " + ",".join(CHIPS))
    parser.add_argument("--kernels", type=names, default=[*PRODUCTS], help="of " + ",".join(PRODUCTS))
    parser.add_argument("--widths", type=numbers, default=[*WIDTHS], help="D of the hidden states")
    parser.add_argument("--tiles", type=sizes, help="candidates, as 512x2048,512x1024 (default: the table's)")
    parser.add_argument("--vmem", type=int, help="MiB that a kernel may take (default: the table's)")
    parser.add_argument("--output", type=pathlib.Path, help="the figures as JSON")
    parser.add_argument(
        "--only",
        choices=(OURS, TOKAMAX.name),
        nargs="+",
        default=(OURS, TOKAMAX.name),
        help="tables (default: both)",
    )
    parser.add_argument(f"--{TOKAMAX.flag}", metavar="PATH", help=f"python that has {TOKAMAX.wanted()}")
    args = parser.parse_args(argv)
    for flag, known in (("chips", CHIPS), ("kernels", PRODUCTS)):
        for name in getattr(args, flag):
            if name not in known:
                parser.error(f"--{flag}: {name!r} is none of {', '.join(known)}")
    if not args.tiles:
        for chip, kernel, width in itertools.product(args.chips, args.kernels, args.widths):
            if width not in getattr(CHIPS[chip], kernel):
                parser.error(f"--widths: the table has no tile for D = {width}; give --tiles")
    return args


def run(argv: Sequence[str]) -> dict[Candidate, Schedule]:
    """From the command line to the tables."""
    args = parse_args(argv)
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit("libtpu is absent: pip install -c constraints.txt -e '.[tpu]'")
    jax.config.update("jax_platforms", "cpu")
    measured = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        os.environ |= ENVIRONMENT | {"LIBTPU_INIT_ARGS": FLAGS.format(folder)}  # read when libtpu is loaded
        if OURS in args.only:
            for candidate in candidates(args):
                tile = candidate.tile
                what = f"{candidate.chip} {candidate.kernel} D={candidate.width} {tile.rows}x{tile.columns}"
                try:
                    measured[candidate] = measure(candidate, folder)
                    print(f"{what}: {measured[candidate].bundles:,} bundles", flush=True)
                except jax.errors.JaxRuntimeError as error:
                    reason = textwrap.shorten(str(error), 200)
                    print(f"{what}: refused with {candidate.vmem_mib} MiB: {reason}", flush=True)
                    clear(folder)
            print("\n" + table(measured), flush=True)
        if TOKAMAX.name in args.only and not args.tiles:
            try:
                print("\n" + beside_tokamax(peers.find_python(TOKAMAX, args.tokamax_python), folder))
            except peers.Missing as missing:
                print(missing)
    if args.output:
        rows = [dataclasses.asdict(c) | dataclasses.asdict(s) for c, s in measured.items()]
        args.output.write_text(json.dumps(rows, indent=2))
    return measured


if __name__ == "__main__":
    run(sys.argv[1:])
