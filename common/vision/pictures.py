"""The pictures of one prompt, and which of its tokens are their rows."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from common.vision.mrope import shift_of
from common.vision.pixels import Pixels


@dataclass(frozen=True, eq=False)
class Pictures:
    """pixels, in order; at: where in the prompt the rows of each begin. They do not overlap."""

    pixels: tuple[Pixels, ...]
    at: tuple[int, ...]

    def named(self, prompt_ids: list[int]) -> np.ndarray:
        """The prompt as the tree and the ranks see it: wide numbers in place of each picture's placeholders (keys.py)."""
        ids = np.array(prompt_ids, dtype=np.int64)
        for one, at in zip(self.pixels, self.at, strict=True):
            ids[at : at + one.key.rows] = one.key.ids
        return ids

    def shift(self, before: int) -> int:
        """Of the positions behind the pictures that are whole among the first `before` tokens (mrope.py)."""
        pairs = zip(self.pixels, self.at, strict=True)
        return sum(shift_of(*one.grid) for one, at in pairs if at + one.key.rows <= before)

    def within(self, start: int, stop: int) -> Iterator[Pixels]:
        """Those of which tokens start .. stop-1 have a row."""
        for one, at in zip(self.pixels, self.at, strict=True):
            if at < stop and start < at + one.key.rows:
                yield one
