"""4×4 sudoku with filler: a task on which a masked-diffusion LM of half a million params learns in minutes.

    prompt    <s> 3 . . 1  . . 3 .  . 4 . .  . . . .  =      16 cells, of which 3 to 8 are given
    response  e 3 2 4 1 c   b 4 1 3 2 d   ...                4 rows of filler, 4 cells, filler

The first filler of a row is random; the last one is the row's first cell in another alphabet nine times in
ten, else random too. So some tokens of a response carry information and others hardly any, and all responses
have one length: there is no padding by EOS for a decoder to fall for.
"""

from typing import NamedTuple

import numpy as np

CELLS = 16
BLANK, START, EQUALS, FILLERS, MASK = 0, 5, 6, tuple(range(7, 14)), 14
"""Tokens; 1 to 4 are the digits."""
VOCAB_SIZE = 15
PROMPT_LENGTH = 2 + CELLS
RESPONSE_LENGTH = 4 * 6
CELL_PLACES = np.array([6 * row + 1 + column for row in range(4) for column in range(4)])
"""Where in the response the cells stand, row by row; fillers stand at the other places."""
FAITHFUL = 0.9
"""Probability that a row's last filler is made from its first cell."""


def _units() -> list[list[int]]:
    """The cells of each row, column and box."""
    rows = [[4 * i + j for j in range(4)] for i in range(4)]
    columns = [list(column) for column in zip(*rows)]
    boxes = [[4 * (a + i) + b + j for i in (0, 1) for j in (0, 1)] for a in (0, 2) for b in (0, 2)]
    return rows + columns + boxes


UNITS = _units()


def _grids() -> np.ndarray:
    """i32[288, 16]: every grid whose rows, columns and 2×2 boxes have each digit once."""
    found: list[list[int]] = [[]]
    for cell in range(CELLS):
        before = {x for unit in UNITS if cell in unit for x in unit if x < cell}
        found = [[*grid, d] for grid in found for d in range(1, 5) if all(grid[x] != d for x in before)]
    return np.array(found, np.int32)


GRIDS = _grids()


class Problems(NamedTuple):
    """N problems, each with one of its solutions.

    Attributes:
      prompts: i32[N, 18].
      responses: i32[N, 24].
    """

    prompts: np.ndarray
    responses: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """i32[N, 42] prompt and response."""
        return np.concatenate([self.prompts, self.responses], axis=1)


def make(
    rng: np.random.Generator, size: int, *, fewest: int = 3, most: int = 8, grids: np.ndarray = GRIDS
) -> Problems:
    """Random problems: one of `grids`, `fewest` to `most` of its cells as clues, and random fillers.

    Few clues leave several solutions; the response is one of them, and any other is right as well.

    Raises:
      ValueError: numbers of clues out of order.
    """
    if not 0 <= fewest <= most <= CELLS:
        raise ValueError(f"fewest={fewest} and most={most} clues must be in order between 0 and {CELLS}")
    grids = grids[rng.integers(len(grids), size=size)]
    given = rng.integers(fewest, most + 1, size)[:, None]
    is_clue = np.argsort(rng.random(grids.shape), axis=1).argsort(axis=1) < given
    prompts = np.full((size, PROMPT_LENGTH), START, np.int32)
    prompts[:, 1:-1], prompts[:, -1] = np.where(is_clue, grids, BLANK), EQUALS
    responses = rng.choice(FILLERS, (size, RESPONSE_LENGTH)).astype(np.int32)
    responses[:, CELL_PLACES] = grids
    is_faithful = rng.random((size, 4)) < FAITHFUL
    last = responses[:, 5::6]
    responses[:, 5::6] = np.where(is_faithful, FILLERS[0] - 1 + grids[:, ::4], last)
    return Problems(prompts, responses)


class Verdict(NamedTuple):
    """Of N responses.

    Attributes:
      is_legal: bool[N] rows, columns and boxes have each digit once.
      kept: f64[N] the share of the clues that the response repeats; 1 without clues.
    """

    is_legal: np.ndarray
    kept: np.ndarray

    @property
    def is_valid(self) -> np.ndarray:
        """bool[N] a solution: a legal grid with all clues."""
        return self.is_legal & (self.kept == 1)


def check(prompts: np.ndarray, responses: np.ndarray) -> Verdict:
    """Judges responses i32[N, 24] to prompts i32[N, 18], fillers aside.

    Raises:
      ValueError: arrays of other shapes.
    """
    prompts, responses = np.asarray(prompts), np.asarray(responses)
    if prompts.shape != (len(responses), PROMPT_LENGTH) or responses.shape[1:] != (RESPONSE_LENGTH,):
        raise ValueError(
            f"prompts {prompts.shape} and responses {responses.shape} must be [N, {PROMPT_LENGTH}] and "
            f"[N, {RESPONSE_LENGTH}]"
        )
    cells, clues = responses[:, CELL_PLACES], prompts[:, 1:-1]
    units = np.sort(cells[:, np.array(UNITS)], axis=-1)
    given = (clues != BLANK).sum(1)
    kept = ((clues != BLANK) & (clues == cells)).sum(1)
    return Verdict((units == np.arange(1, 5)).all((1, 2)), np.where(given, kept / np.maximum(given, 1), 1.0))
