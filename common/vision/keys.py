"""How an image is named where tokens are: one number for each of its rows, wider than any token id.

    bit 62      1: an image's row
    bits 14..61 48 bits of the picture's SHA-256, the (row % 4)-th such slice of it
    bits 0..13  row: which one of the image's

The radix tree compares these as it compares token ids: same picture, same path; another picture, another path, from the first row
on. Four slices, 192 bits, make it hopeless to draw a picture that has another one's path: with 48 bits alone 2^24 pictures
would hold two that are alike in them. A rank finds in these numbers which image is meant and which of its rows, so a task needs
nothing else, and a chunk may cut an image anywhere.

They live in Req.all_ids, the tree and the task alone. Before anything is embedded they are put back to the placeholder.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

WIDE = 1 << 62
ROW_BITS, SLICE_BITS, SLICES = 14, 48, 4
MAX_ROWS = 1 << ROW_BITS


class ImageKey(NamedTuple):
    """A picture's SHA-256, and its blocks (height, width)."""

    sha: bytes
    height: int
    width: int

    @property
    def rows(self) -> int:
        return self.height * self.width

    @property
    def slices(self) -> np.ndarray:
        """int64 [4]."""
        number, mask = int.from_bytes(self.sha, "big"), (1 << SLICE_BITS) - 1
        return np.array([number >> (SLICE_BITS * i) & mask for i in range(SLICES)], dtype=np.int64)

    @property
    def ids(self) -> np.ndarray:
        """int64 [rows]: what stands for its rows."""
        row = np.arange(self.rows, dtype=np.int64)
        return WIDE | self.slices[row % SLICES] << ROW_BITS | row


def is_wide(ids: np.ndarray) -> np.ndarray:
    """bool [n]: which are rows of images. (A token id never is; -1 is a token that only the device knows.)"""
    return ids >= WIDE


def row_of(ids: np.ndarray) -> np.ndarray:
    return ids & (MAX_ROWS - 1)


class Run(NamedTuple):
    """Neighbouring rows of one image: tokens at .. at+count-1 are its rows first .. first+count-1."""

    at: int
    count: int
    first: int
    slices: tuple[int, ...]  # of its SHA, as far as these rows show them: the (first % 4)-th, and up to three after it


def runs(ids: np.ndarray) -> Iterator[Run]:
    """The images in `ids`, or what a chunk has of them, in order; two beside each other are two, even if they are the same."""
    wide, row, part = is_wide(ids), row_of(ids), ids >> ROW_BITS & (1 << SLICE_BITS) - 1
    begins = wide & ~(np.append(False, wide[:-1]) & (np.diff(row, prepend=-1) == 1))
    at = np.flatnonzero(begins)
    ends = np.flatnonzero(wide & np.append(begins[1:] | ~wide[1:], True)) + 1
    for start, end in zip(at.tolist(), ends.tolist(), strict=True):
        yield Run(start, end - start, int(row[start]), tuple(part[start : min(end, start + SLICES)].tolist()))


def readable(ids: np.ndarray, placeholder: int) -> np.ndarray:
    """For eyes and detokenizers: one placeholder where rows of an image stand."""
    kept = ~is_wide(ids)
    kept[[run.at for run in runs(ids)]] = True
    return np.where(is_wide(ids), placeholder, ids)[kept]
