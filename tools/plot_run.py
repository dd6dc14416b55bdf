"""Draws runs, several in one plot: python tools/plot_run.py runs/a runs/b --out=plots."""

import argparse
import sys
from pathlib import Path

from jaxrl_llm.training.plots import plot


def main() -> None:
    """Reads the command line, and prints the paths of the pictures."""
    parser = argparse.ArgumentParser(
        description="Draws reward, accuracy, length, entropy... against the step."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="workdirs of runs, with a metrics.jsonl each")
    parser.add_argument("--out", type=Path, help="folder for the PNGs; default: plots/ in the run")
    args = parser.parse_args()
    if args.out is None and len(args.runs) > 1:
        parser.error("several runs in one plot: say with --out=FOLDER where it goes")
    try:
        paths = plot(args.runs, args.out or args.runs[0] / "plots")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"plot_run.py: {error}")
    print("\n".join(map(str, paths)))


if __name__ == "__main__":
    main()
