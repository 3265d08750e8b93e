"""Which of the running sequences begin with the same pages, kept up to date while they come and go.

In a decode step every sequence reads all its pages, and those that a hundred sequences begin with are read a hundred times. A
kernel can read them once for several sequences if these stand side by side in the batch (contract.py, SharedPrefixes); here is how
rank 0 finds them. Two sequences belong together if the pages of their first MIN_ALIKE_TOKENS tokens are the same ones: a page id
says it, no token is compared. A group then has in common what any two neighbours in it have:

    sequences  [a, b, c, d]              pages of b   [3, 8, 1, 5, 6]
    links      [5, 3, 4, 3]              pages of c   [3, 8, 1, 5, 2]      4 the same: the link of c
                |  b begins as a does with 3 pages
                a itself: as many as it has

and the shortest link is what all have. Whoever joins or leaves changes one link: a look at two sequences' pages, however many run.
The idea is Hydragen's (Juravsky et al. 2024). vLLM had it, for a prefix that all running sequences share, as cascade attention;
0.33.0 has removed it (v1/core/kv_cache_manager.py, get_num_common_prefix_blocks: always 0).
"""

from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

MIN_ALIKE = 4  # so many sequences that begin alike are worth a tile of attention's
MIN_ALIKE_TOKENS = 256  # a shorter common prefix is read again by each
ALONE = 0  # the number of no group


class Alike(NamedTuple):
    """Sequences first .. first+count-1 of a decode step begin with the same pages: attention may read them once."""

    first: int
    count: int
    pages: int


class PrefixGroups:
    """The sequences of a batch by the pages that they begin with."""

    def __init__(self, page_size: int):
        self.first_pages = -(-MIN_ALIKE_TOKENS // page_size)
        self._groups: dict[bytes, _Group] = {}
        self._of: dict[Hashable, _Group | None] = {}  # None: it is alone
        self._numbers = ALONE

    def join(self, sequence: Hashable, pages: np.ndarray) -> int:
        """sequence: what it is known by. pages [n] int64: of its beginning, to which nobody writes any more. Returns the number of
        its group, or ALONE. Raises ValueError for one that has not left."""
        if sequence in self._of:
            raise ValueError(f"sequence {sequence} joins a second time; it must leave first")
        self._of[sequence] = group = self._group(pages) if len(pages) >= self.first_pages else None
        if group is None:
            return ALONE
        group.join(sequence, pages)
        return group.number

    def leave(self, sequence: Hashable) -> None:
        """Raises KeyError for one that has not joined."""
        group = self._of.pop(sequence)
        if group is None:
            return
        group.leave(sequence)
        if not group.sequences:
            del self._groups[group.key]

    def in_order(self, numbers: np.ndarray) -> tuple[np.ndarray, tuple[Alike, ...]]:
        """numbers [B] as `join` gave them -> the order [B] in which each group's sequences are neighbours, else as they stand, and
        which of them are worth saying."""
        order = np.argsort(numbers, kind="stable")
        there = {group.number: group for group in self._groups.values() if len(group.sequences) >= MIN_ALIKE}
        if not there:
            return order, ()
        found, firsts, counts = np.unique(numbers[order], return_index=True, return_counts=True)
        return order, tuple(
            Alike(first, count, min(there[number].links))
            for number, first, count in zip(found.tolist(), firsts.tolist(), counts.tolist(), strict=True)
            if number in there
        )

    def _group(self, pages: np.ndarray) -> "_Group":
        key = pages[: self.first_pages].tobytes()
        if key not in self._groups:
            self._numbers += 1
            self._groups[key] = _Group(key, self._numbers)
        return self._groups[key]


class _Group:
    """Sequences, their pages and their links: with how many pages each begins as the one before it; the first, all its pages."""

    def __init__(self, key: bytes, number: int):
        self.key, self.number = key, number
        self.sequences: list[Hashable] = []
        self.pages: list[np.ndarray] = []
        self.links: list[int] = []

    def join(self, sequence: Hashable, pages: np.ndarray) -> None:
        self.sequences.append(sequence)
        self.pages.append(pages)
        self.links.append(self._link(len(self.links)))

    def leave(self, sequence: Hashable) -> None:
        i = self.sequences.index(sequence)
        for column in (self.sequences, self.pages, self.links):
            del column[i]
        if i < len(self.links):
            self.links[i] = self._link(i)

    def _link(self, i: int) -> int:
        if i == 0:
            return len(self.pages[0])
        length = min(len(self.pages[i - 1]), len(self.pages[i]))
        differ = (self.pages[i - 1][:length] != self.pages[i][:length]).nonzero()[0]
        return int(differ[0]) if len(differ) else length
