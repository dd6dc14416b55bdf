"""Every notebook runs from top to bottom, without a kernel and without a screen."""

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


CLOSE = {"losses.ipynb": 1e-6, "two_roles.ipynb": 1e-5}
"""Notebooks that print last how far two things are from each other, and how far that may be."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_runs(path, monkeypatch, capsys):
    matplotlib.use("Agg")
    names: dict = {"__name__": "notebook"}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(path), "exec"), names)
    if path.name in CLOSE:
        assert float(capsys.readouterr().out.splitlines()[-1]) < CLOSE[path.name]
