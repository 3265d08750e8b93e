"""Solution of exercise 5: Give back on failure."""

from collections.abc import Callable
from typing import Any


def give_back(
    room: dict[str, Any],
    free: list[int],
    rows: list[int],
    locks: dict[int, int],
    close: Callable[[dict[str, Any]], None],
) -> int:
    if not room["own"] and not room["locked"] and room["row"] is None:
        return 0
    close(room)
    count = len(room["own"])
    free += room["own"]
    if room["locked"]:
        for page in room["prefix"]:
            locks[page] -= 1
    if room["row"] is not None:
        rows.append(room["row"])
    room |= {"prefix": [], "own": [], "locked": False, "row": None}
    return count
