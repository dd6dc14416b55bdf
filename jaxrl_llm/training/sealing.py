"""Checksums over the files of a folder: what has been written is what will be read."""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKSUMS = "checksums.json"


def seal(folder: Path) -> None:
    """Flushes every file in the subfolders of `folder` to the disk and writes `checksums.json` over them.

    Files directly in `folder` are left out: orbax writes its notes there once more after this, and restores
    without them.

    Raises:
      OSError: the disk is full, or a file could not be flushed.
    """
    files = [path for path in sorted(folder.glob("*/**/*")) if path.is_file()]
    with ThreadPoolExecutor() as pool:
        sums = dict(zip((str(path.relative_to(folder)) for path in files), pool.map(_flushed, files)))
    with open(folder / CHECKSUMS, "w") as f:
        json.dump(sums, f, indent=1)
        f.flush()
        os.fsync(f.fileno())


def damaged(folder: Path) -> list[str]:
    """What is wrong with the files of a sealed folder, one sentence per file; empty if nothing is."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError) as error:
        return [f"{CHECKSUMS} cannot be read ({error})"]

    def check(name: str) -> str | None:
        path, (size, crc) = folder / name, sums[name]
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        return None if _crc(path) == crc else f"{name} has changed since it was written"

    with ThreadPoolExecutor() as pool:
        return [problem for problem in pool.map(check, sums) if problem]


def _flushed(path: Path) -> tuple[int, int]:
    """Size (bytes) and CRC-32 of a file, once it is on the disk: a full disk may show only now."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())
    return path.stat().st_size, _crc(path)


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc
