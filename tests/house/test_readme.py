"""What the README names exists."""

import re
from pathlib import Path

import pytest

from jaxrl_llm import advantages, losses

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
PACKAGES = {"losses": losses, "advantages": advantages}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:losses|advantages)\.\w+)`", TEXT))))
def test_functions(name):
    package, function = name.split(".")
    assert hasattr(PACKAGES[package], function)


def test_files():
    paths = re.findall(r"`((?:configs|tools|tests|jaxrl_llm)/[\w./]+)`", TEXT)
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_examples():
    """Every Python block of the README about losses runs by itself."""
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    blocks = [block for block in blocks if re.search(r"import .*losses", block)]
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
