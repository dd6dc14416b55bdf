"""Makes tests/losses/golden/<library>.json: what another library's losses and advantages are, with gradients.

    python tools/make_golden_losses.py --library trl   # in an interpreter that has it; verl, liger, tunix

Runs in the other library's environment and imports nothing of this project's package. Each file holds the
library's version, the inputs, and per case the options, the value and the gradients of its sum. The tests
compare ours with these files; `pytest -m oracle` makes them anew and compares with that.
"""

import argparse
import importlib
import json
import pathlib
from importlib.metadata import version
from typing import Any

import numpy as np

PACKAGES = {
    "trl": ("trl", "torch"),
    "verl": ("verl", "torch"),
    "liger": ("liger-kernel", "torch"),
    "tunix": ("google-tunix", "jax"),
}


def plain(x: Any) -> Any:
    """An array as nested lists of numbers with 9 digits; NaN and infinities as JSON has them in Python."""
    x = np.asarray(x)
    if x.dtype.kind in "biu":
        return x.astype(int).tolist()
    return np.vectorize(lambda value: float(f"{value:.9g}"), otypes=[float])(x).tolist()


def main() -> None:
    """Runs one library's cases and writes its file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", choices=sorted(PACKAGES), required=True)
    parser.add_argument("--out", type=pathlib.Path, help="the file; by default where the tests look")
    args = parser.parse_args()
    golden = pathlib.Path(__file__).parents[1] / "tests" / "losses" / "golden"
    out = args.out or golden / f"{args.library}.json"
    library = importlib.import_module(f"golden_losses.{args.library}")
    inputs = importlib.import_module("golden_losses.inputs").make_inputs()

    cases = {}
    for name, case in library.CASES.items():
        value, gradients = library.evaluate(case, {key: inputs[key] for key in case.inputs})
        cases[name] = {
            "inputs": list(case.inputs),
            "options": case.options,
            "value": plain(value),
            "gradients": {key: plain(gradient) for key, gradient in gradients.items()},
        }
    used = {key for case in library.CASES.values() for key in case.inputs}
    stored = {
        "versions": {package: version(package) for package in PACKAGES[args.library]},
        "inputs": {key: plain(inputs[key]) for key in sorted(used)},
        "cases": cases,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [f'"versions": {json.dumps(stored["versions"])}']
    for part in ("inputs", "cases"):
        rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(x)}" for key, x in stored[part].items())
        lines.append(f'"{part}": {{\n{rows}\n}}')
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{out}: {len(cases)} cases, {out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
