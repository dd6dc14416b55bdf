"""The libraries that we are measured against, each in a virtual environment of its own."""

import dataclasses
import os
import pathlib
import subprocess
from collections.abc import Mapping

PROJECT = pathlib.Path(__file__).resolve().parent.parent.parent


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another library.

    Attributes:
      name: what the table calls it.
      flag: command-line flag with the path of its python.
      variable: environment variable with the same.
      folder: virtual environment looked for in the project when neither is given.
      requirements: distribution -> version that the goals are about.
      pip_options: what pip needs besides the requirements.
    """

    name: str
    flag: str
    variable: str
    folder: str
    requirements: Mapping[str, str]
    pip_options: str = ""

    def wanted(self) -> str:
        """The requirements as pip reads them."""
        return " ".join(f"{name}=={version}" for name, version in self.requirements.items())

    def differences(self, found: Mapping[str, str]) -> list[str]:
        """A note for each requirement of which another version was found (builds such as +cpu aside)."""
        return [
            f"note: {name} is {found[name]} here, and the goals are about {version}"
            for name, version in self.requirements.items()
            if found[name].split("+")[0] != version
        ]


TUNIX = Peer(
    name="google-tunix",
    flag="tunix_python",
    variable="JAXRL_TUNIX_PYTHON",
    folder=".venv-tunix",
    requirements={"google-tunix": "0.1.7"},
)
TORCH = Peer(
    name="transformers",
    flag="torch_python",
    variable="JAXRL_TORCH_PYTHON",
    folder=".venv-torch",
    requirements={"transformers": "5.23.0", "torch": "2.13.0"},
    pip_options="--extra-index-url https://download.pytorch.org/whl/cpu ",
)
TORCH_LOOP = dataclasses.replace(
    TORCH, name="torch", requirements={"torch": TORCH.requirements["torch"], "safetensors": "0.8.0"}
)
CONTINUOUS = dataclasses.replace(TORCH, name="transformers-cb")
GEMMA = Peer(
    name="gemma",
    flag="gemma_python",
    variable="JAXRL_GEMMA_PYTHON",
    folder=".venv-gemma",
    requirements={"gemma": "3.3.0"},
    pip_options="'sentencepiece<=0.2.1' 'jax==0.10.2' ",  # newer ones of the former want another protobuf
)
TRL = Peer(
    name="TRL",
    flag=TORCH.flag,
    variable=TORCH.variable,
    folder=TORCH.folder,
    requirements={"trl": "1.16.0", **TORCH.requirements},
    pip_options=TORCH.pip_options,
)
LIGER = Peer(
    name="Liger",
    flag=TORCH.flag,
    variable=TORCH.variable,
    folder=TORCH.folder,
    requirements={"liger-kernel": "0.8.5", "torch": TORCH.requirements["torch"]},
    pip_options=TORCH.pip_options,
)
TOKAMAX = Peer(
    name="tokamax",
    flag="tokamax_python",
    variable="JAXRL_TOKAMAX_PYTHON",
    folder=".venv-tokamax",
    requirements={"tokamax": "0.0.12"},
)


class Missing(Exception):
    """A peer is not installed; the message says how to install it."""


def find_python(peer: Peer, given: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """The interpreter that has the peer.

    Args:
      peer: whom to look for.
      given: path from the command line, if any; then `environ[peer.variable]`, then the project's folder.

    Returns:
      Path of a python that has every requirement, in whatever version.

    Raises:
      Missing: there is no such interpreter, or it lacks a requirement.
    """
    path = given or environ.get(peer.variable) or str(PROJECT / peer.folder / "bin" / "python")
    recipe = (
        f"To include it: python -m venv {peer.folder} && "
        f"{peer.folder}/bin/pip install {peer.pip_options}{peer.wanted()}\n"
        f"  (an environment elsewhere: --{peer.flag}=PATH or {peer.variable}=PATH, the path of its python)"
    )
    if not os.access(path, os.X_OK):
        raise Missing(f"{peer.name} is skipped: there is no python at {path}. {recipe}")
    names = sorted(peer.requirements)
    query = f"import importlib.metadata as m; [m.version(name) for name in {names!r}]"
    if subprocess.run([path, "-c", query], capture_output=True, check=False).returncode:
        raise Missing(f"{peer.name} is skipped: {path} has no {' or no '.join(names)}. {recipe}")
    return path
