"""The reader of compiled programs on made-up ones; the recorded schedules against the real compiler (aot)."""

import importlib
import importlib.util
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_kernels.linear_logprob.blocks import CHIPS, Tile

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "tools" / "benchmarks"
MODULES = ("kernel_schedule", "peers", "report")
WORSE, BETTER = 1.03, 0.9
"""Times the recorded bundles: more fails, and less fails until it is recorded."""


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("kernel_schedule")
    for name in MODULES:
        sys.modules.pop(name, None)


PROGRAM = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = inlined_call_operand.hbm [shape: bf16[8,8], index: 0, kind: input] }
   0x1 LB: > { %s2 = sld [smem:[#allocation1]] } /* Start region 9 :: Start region 1 */
   0x2   : > { %5 = sbr.rel (%p3) target = $region2 } /* End region 1 */
   0x3   : > { %s4 = smov 0 }
   0x4   : > { %6 = dma.hbm_to_vmem [thread:$0] %s1, 16, %s4, [#allocation2] }
   0x5 PF: > { %8 = sbr.rel (%p7) target = $region4  ;;  %s9 = smov 1 } /* Start/End empty region 2 */
   0x6   : > { %s10 = smov 2 } /* End region 3 */
   0x7   : > { %11 = vst [vmem:[#allocation3]] %v0 }
   0x8   : > { %12 = vst [vmem:[#allocation4]] %v0 }
   0x9 PF: > { %13 = vmatmul.bf16 %v1 } /* Start/End empty region 4 :: Start region 5 */
   0xa   : > { %14 = vpow2.f32 %v2  ;;  %15 = vmatmul.bf16 %v3 } /* End region 5 */
   0xb   : > { %16 = sbr.rel (%p8) target = $region6 }
   0xc   : > { %17 = vst [vmem:[#allocation5]] %v4 }
   0xd   : > { %18 = vpow2.f32 %v5 }
   0xe PF: > { %19 = sbr.rel (!%p9) target = $region9 } /* Start/End empty region 6 */
   0xf   : > { %s20 = smov 3 }
  0x10 PF:  { %21 = vsyncpa [#allocation6], 1 } /* Start/End empty region 7 */
"""
USE = {9: (1, 0), 10: (1, 1), 13: (0, 1)}
"""Bundle -> instructions for the matrix unit and for exponentials."""


def utilization(use: dict[int, tuple[int, int]], count: int) -> str:
    rows = "\n".join(" ".join(map(str, use.get(index, (0, 0)))) for index in range(count))
    return f"== CAPACTIY:\nMXU, EUP\n    2     1\n== UTILIZATION:\n{rows}\n"


def test_a_steady_step_skips_what_runs_at_the_first_or_last(tool: ModuleType) -> None:
    """It passes the transfer though it could jump over it, and neither the stores nor what lies behind."""
    program = tool.Program.read(PROGRAM, utilization(USE, 17), delay=1)
    assert program.capacity == {"MXU": 2, "EUP": 1}
    assert [program.bundles[i].target for i in (2, 5, 11, 14)] == [5, 9, 14, 1]
    assert program.loop() == range(1, 16)
    step = program.steady_step()
    assert step == [1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 14, 15]
    assert (program.total("MXU", step), program.total("EUP", step)) == (2, 1)
    assert program.step(needed=[13]) == [1, 2, 3, 5, 6, 9, 10, 11, 12, 13, 14, 15]
    assert program.blocks()[:4] == [range(0, 1), range(1, 4), range(4, 5), range(5, 7)]


@pytest.mark.parametrize(
    ("text", "use", "complaint"),
    [
        (PROGRAM, utilization(USE, 16), "17 bundles, and the use of 16"),
        (PROGRAM, utilization({**USE, 16: (1, 0)}, 17), "matrix products outside the loop"),
        (
            PROGRAM.replace("(!%p9) target = $region9", "(!%p9) target = $region7"),
            utilization(USE, 17),
            "0 loops",
        ),
        (
            PROGRAM.replace("(%p8) target = $region6", "(%p8) target = $region4"),
            utilization(USE, 17),
            "2 loops",
        ),
    ],
)
def test_programs_of_another_form_are_refused(tool: ModuleType, text: str, use: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        tool.Program.read(text, use, delay=1).steady_step()


@st.composite
def programs(draw: st.DrawFn) -> tuple[dict[int, int], int, int, set[int]]:
    """Branches (bundle -> target, forward), number of bundles, delay, needed bundles."""
    count, delay = draw(st.integers(3, 12)), draw(st.integers(0, 3))
    branches = {}
    for index in range(count - delay - 1):
        if draw(st.booleans()):
            branches[index] = draw(st.integers(index + delay + 1, count - 1))
    return branches, count, delay, draw(st.sets(st.integers(0, count - 1), max_size=3))


@settings(max_examples=200, deadline=None)
@given(case=programs())
def test_the_shortest_way_is_the_shortest_of_all(tool: ModuleType, case: tuple) -> None:
    branches, count, delay, needed = case

    def ways(index: int) -> Iterator[list[int]]:
        if index == count:
            yield []
            return
        yield from ([index, *rest] for rest in ways(index + 1))
        if index in branches:
            taken = list(range(index, index + 1 + delay))
            yield from (taken + rest for rest in ways(branches[index]))

    back = {count: 0}  # the loop: from the last bundle to the first
    bundles = [
        tool.Bundle({"MXU": 0}, False, (branches | back).get(index)) for index in range(count + 1 + delay)
    ]
    step = tool.Program(bundles, {"MXU": 1}, delay).step(needed)
    found = step[: len(step) - 1 - delay]
    possible = [way for way in ways(0) if needed <= set(way)]
    assert found in possible and len(found) == min(map(len, possible))


def test_every_tile_has_its_record_and_the_goals_hold(tool: ModuleType) -> None:
    for name, chip in CHIPS.items():
        for kernel, products in tool.PRODUCTS.items():
            table = getattr(chip, kernel)
            assert set(table) == set(tool.WIDTHS)
            for width, tile in table.items():
                floor = 2 * products * tile.rows * tile.columns * width / tool.OPERATIONS[name]
                candidate = tool.Candidate(name, kernel, width, tile, chip.vmem_mib)
                verdict = tool.goal(candidate, tool.Schedule(tile.bundles, floor, 0.5, 0.0))
                assert verdict.endswith("reached") or (name in ("v4", "7x") and not verdict)


def test_table_says_what_is_missed(tool: ModuleType) -> None:
    tile = Tile(512, 1024, bundles=1000)
    table = tool.table(
        {
            tool.Candidate("v6e", "backward", 2048, tile, 100): tool.Schedule(1200, 900.0, 0.7, 300.0),
            tool.Candidate("v5e", "forward", 2048, tile, 100): tool.Schedule(800, 1000.0, 0.7, 1040.0),
            tool.Candidate("7x", "forward", 1024, tile, 100): tool.Schedule(800, 1000.0, 0.7, 1.0),
        }
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert rows[0][4:9] == ["1,200", "900", "75.0%", "70.0%", "300"]
    assert rows[0][9:] == ["1.333", "1,000", "use ≥ 90%: missed"]
    assert rows[1][9:] == ["1.040", "1,000", "bound ≤ 1.05 floors: reached"]
    assert rows[2][11] == ""


def test_flags(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    args = tool.parse_args(
        ["--chips", "v6e,v4", "--widths", "1024", "--tiles", "512x2048,256x128", "--vmem", "9"]
    )
    found = tool.candidates(args)
    assert len(found) == 2 * 2 * 2
    assert found[1] == tool.Candidate("v6e", "forward", 1024, Tile(256, 128), 9)
    assert tool.candidates(tool.parse_args([]))[0].tile == CHIPS["v4"].forward[2048]
    for flags, complaint in (
        (["--chips", "v6"], "--chips: 'v6' is none of v4"),
        (["--widths", "1024"], "no tile for D = 1024; give --tiles"),
    ):
        with pytest.raises(SystemExit):
            tool.parse_args(flags)
        assert complaint in capsys.readouterr().err


@pytest.mark.aot
@pytest.mark.parametrize("chip", CHIPS)
def test_schedules_are_no_worse_than_recorded(chip: str, tmp_path: pathlib.Path) -> None:
    """A process of its own, as libtpu reads its flags once."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is absent: pip install -c constraints.txt -e '.[tpu]'")
    output = tmp_path / "schedule.json"
    script = str(BENCHMARKS / "kernel_schedule.py")
    command = [sys.executable, script, "--chips", chip, "--only", "jaxrl_llm", "--output", str(output)]
    subprocess.run(command, check=True)
    rows = json.loads(output.read_text())
    assert len(rows) == sum(len(table) for table in (CHIPS[chip].forward, CHIPS[chip].backward))
    for row in rows:
        recorded = row["tile"]["bundles"]
        assert row["bundles"] <= WORSE * recorded, row
        assert row["bundles"] >= BETTER * recorded, f"better: record it in blocks.py: {row}"
