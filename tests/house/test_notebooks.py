"""Every notebook runs from top to bottom, without a kernel and without a screen."""

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_runs(path, monkeypatch, capsys):
    matplotlib.use("Agg")
    names: dict = {"__name__": "notebook"}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(path), "exec"), names)
    if path.name == "losses.ipynb":  # its last line prints how far the pieces are from the whole
        assert float(capsys.readouterr().out.splitlines()[-1]) < 1e-6
