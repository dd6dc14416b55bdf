"""The house keeps its floors: a file imports only from its own floor or from below."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FLOORS = {
    "jaxrl_kernels": 1,
    "jaxrl_llm.trajectory": 1,
    "jaxrl_llm.losses": 2,
    "jaxrl_llm.advantages": 2,
    "jaxrl_llm.rewards": 2,
    "jaxrl_llm.environments": 2,
    "jaxrl_llm.data": 2,
    "jaxrl_llm.models": 3,
    "jaxrl_llm.parallel": 3,
    "jaxrl_llm.sampling": 4,
    "jaxrl_llm.rollouts": 5,
    "jaxrl_llm.training": 6,
    "jaxrl_llm.systems": 7,
    "jaxrl_llm": 8,
    "configs": 9,
    "notebooks": 9,
    "tools": 9,
}

ALLOWED = {1: {"jax", "jaxlib"}}
"""What floors that must stay light may import besides the standard library and our own."""


def floor(module: str) -> int:
    """The floor of a dotted module: that of its longest known prefix."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if (name := ".".join(parts[:end])) in FLOORS:
            return FLOORS[name]
    raise KeyError(f"{module} lives on no floor; see the table in this file")


def modules() -> list[tuple[str, Path]]:
    """Every Python file of the product, by its dotted name."""
    found = []
    for top in (ROOT / "jaxrl_llm", ROOT / "kernels" / "jaxrl_kernels", ROOT / "configs", ROOT / "tools"):
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top.parent).with_suffix("").parts
            found.append((".".join(p for p in parts if p != "__init__"), path))
    return found


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda x: x if isinstance(x, str) else "")
def test_no_import_from_a_floor_above(module, path):
    own = floor(module)
    for name in imported(path):
        if re.match(r"(jaxrl_llm|jaxrl_kernels|configs|tools)(\.|$)", name):
            assert floor(name) <= own or floor(name.rpartition(".")[0]) <= own, f"{module} imports {name}"
        elif own in ALLOWED:
            top = name.partition(".")[0]
            assert top in ALLOWED[own] or top in sys.stdlib_module_names, f"{module} imports {name}"


def test_the_table_covers_every_folder():
    for path in (ROOT / "jaxrl_llm").iterdir():
        if path.is_dir() and path.name != "__pycache__":
            assert f"jaxrl_llm.{path.name}" in FLOORS


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_losses_and_advantages_import_without_host_libraries():
    heavy = (
        "transformers",
        "tensorflow_datasets",
        "clu",
        "flax",
        "optax",
        "orbax",
        "reasoning_gym",
        "rich",
        "yaml",
    )
    out = run_python(
        "import sys; from jaxrl_llm import losses, advantages; "
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_nothing_asks_for_the_backend():
    for module, path in modules():
        assert not re.search(r"default_backend\(|\.platform ==", path.read_text()), module


def test_readme_names_what_exists():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"(?:configs|tools|jaxrl_llm|kernels|tests|notebooks)/[\w/]+\.\w+", text):
        assert (ROOT / path).exists(), f"README names {path}"
    assert len(re.findall(r"^pip install -c constraints\.txt ", text, re.MULTILINE)) == 2
