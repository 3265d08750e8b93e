"""Exercise 5: Give back on failure (25 minutes).

Read  "Who owns what, and when" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.disaggregation.exercises.check 5

A room fails on the decode side, at any moment, perhaps for a second time (a link breaks, and time is up, too). Give everything
back that it holds, and nothing twice.

    room      a dict: "prefix", pages of the prompt that the tree has; "own", pages that were reserved for it; "locked", a bool;
              "row", None or its row's number. Before it has reserved: [], [], False, None. The row comes when all pages have
    free      the free pages; rows: the free rows; locks: {page of the tree: how often it is locked}. All three are changed
    returns   how many pages became free

The tree's pages are the tree's: the room's lock on each of them goes, and the pages stay. Bytes may still come for its own pages,
so `close(room)`, which is given, must be called before the first of them is free; and always, once for each call of yours that
gives anything back. Afterwards the room is as before it had reserved.
"""

from collections.abc import Callable
from typing import Any


def give_back(
    room: dict[str, Any],
    free: list[int],
    rows: list[int],
    locks: dict[int, int],
    close: Callable[[dict[str, Any]], None],
) -> int:
    raise NotImplementedError  # your turn
