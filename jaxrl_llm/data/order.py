"""In which order rows are visited: a pure function of (seed, epoch), resumed from three integers."""

import functools
from typing import NamedTuple

import numpy as np


class Cursor(NamedTuple):
    """Where the data stand; three Python integers in the checkpoint. A run begins at `Cursor(seed)`.

    Attributes:
      seed: chooses the order of every epoch.
      epoch: passes over the data completed.
      position: rows of this epoch already taken, below the number of rows.
    """

    seed: int
    epoch: int = 0
    position: int = 0


def take(cursor: Cursor, count: int, size: int) -> tuple[np.ndarray, Cursor]:
    """The next `count` row indices and the cursor after them; runs across ends of epochs.

    Every epoch visits each row once. `take(a)` followed by `take(b)` gives what `take(a + b)` gives.

    Args:
      cursor: where to go on.
      count: indices wanted, 0 or more.
      size: rows of the source.

    Returns:
      i64[count] indices below `size`, and the next cursor.

    Raises:
      ValueError: an empty source, a negative count or field, or a position past the source's end.
    """
    seed, epoch, position = (int(field) for field in cursor)
    if size <= 0:
        raise ValueError(f"cannot take rows from a source of {size} rows")
    if count < 0 or seed < 0 or epoch < 0:
        raise ValueError(f"count={count} and {cursor} must not be negative")
    if not 0 <= position < size:
        raise ValueError(
            f"{cursor} stands outside a source of {size} rows: the data have changed since it was saved"
        )
    pieces = [np.empty(0, np.int64)]
    while count > 0:
        pieces.append(permutation(seed, epoch, size)[position : position + count])
        count -= len(pieces[-1])
        position += len(pieces[-1])
        if position == size:
            epoch, position = epoch + 1, 0
    return np.concatenate(pieces), Cursor(seed, epoch, position)


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """i64[size], read-only: the order of one epoch.

    Sorts raw Philox words, whose stream numpy guarantees from version to version; it gives no such promise
    for `Generator.permutation`, and a resumed run must not depend on the numpy that it finds.
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(size)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order
