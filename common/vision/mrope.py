"""M-RoPE: three positions a token, so that a row of a picture knows its line and its column.

    text        time, line and column are all the same number, one more than the last: plain RoPE
    a picture   of h x w rows that begins at position p: time p for all, line p + i // w, column p + i % w for its row i
    after it    the text goes on at p + max(h, w): fewer positions than rows have gone by

                A    B    [ a 2 x 3 picture           ]    C    D
    token       0    1     2   3   4   5   6   7           8    9
    time        0    1     2   2   2   2   2   2           5    6
    line        0    1     2   2   2   3   3   3           5    6
    column      0    1     2   3   4   2   3   4           5    6

What pages and causal order go by stays the number of the token. The difference, of every token behind the pictures the same, is
called shift here (rope_delta in transformers, which counts it from the whole prompt): 5 - 8 = -3 for C, D, and all that is
generated. So a chunk needs one number to begin with, the shift of the pictures that are whole before it, and a decode step adds
one number a row. Wang et al. 2024 (Qwen2-VL), section 2.1; transformers 5.23, Qwen2VLModel.get_rope_index.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Part(NamedTuple):
    """What a chunk has of a picture of height x width rows: its tokens at .. at+count-1 are rows first .. first+count-1."""

    at: int
    count: int
    first: int
    height: int
    width: int

    @property
    def ends(self) -> bool:
        return self.first + self.count == self.height * self.width


def shift_of(height: int, width: int) -> int:
    """By how much the text behind a picture moves: never forward."""
    return max(height, width) - height * width


def chunk_positions(start: int, count: int, shift: int, parts: Iterable[Part]) -> tuple[np.ndarray, int]:
    """Positions [3, count] of tokens start .. start+count-1 of a sequence, and the shift behind them.

    shift: of the pictures that are whole before `start`. parts: in order. A picture that is cut moves nothing until its last
    row has come.
    """
    positions = np.tile(np.arange(start, start + count) + shift, (3, 1))
    for part in parts:
        own = slice(part.at, part.at + part.count)
        begins = start + part.at - part.first + shift
        line, column = np.divmod(np.arange(part.first, part.first + part.count), part.width)
        positions[:, own] = begins
        positions[1, own] += line
        positions[2, own] += column
        if part.ends:
            moved = shift_of(part.height, part.width)
            positions[:, part.at + part.count :] += moved
            shift += moved
    return positions, shift
