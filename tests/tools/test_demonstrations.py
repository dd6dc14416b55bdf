"""A demonstration prints what it found, and ends with an error where its formula does not hold."""

import runpy
from pathlib import Path

import pytest

from jaxrl_llm.sampling import enumerated

FOCORE = Path(__file__).resolve().parents[2] / "tools" / "demonstrations" / "focore.py"


def test_focore(monkeypatch, capsys):
    """One of its cases, with the analytic weight and with another."""
    names = runpy.run_path(str(FOCORE))
    main = names["main"]
    own = main.__globals__
    monkeypatch.setitem(own, "CASES", [case for case in own["CASES"] if case[0].startswith("FoCore")])
    monkeypatch.setitem(own, "WEIGHTS", (0.7, 0.75, 0.8, 1.15))
    main()
    row = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("FoCore"))
    assert row.split()[-5:] == ["0", "6", "7", "8", "yes"]
    analytic = enumerated.flip_weight
    monkeypatch.setattr(enumerated, "flip_weight", lambda k, copied: analytic(k, copied=copied) + 0.01)
    with pytest.raises(SystemExit, match="not as computed"):
        main()
    assert "NO" in capsys.readouterr().out
