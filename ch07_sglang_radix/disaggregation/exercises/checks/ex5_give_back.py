from types import ModuleType
from typing import Any

from common.teaching.expect import ask, expect

NOTHING = {"prefix": [], "own": [], "locked": False, "row": None}
CASES = [
    ("before it has reserved", NOTHING, 0),
    ("reserved", {"prefix": [], "own": [7, 8], "locked": True, "row": None}, 2),
    ("reserved behind what the tree has", {"prefix": [1, 2], "own": [7], "locked": True, "row": None}, 1),
    ("the tree has all of it", {"prefix": [1, 2], "own": [], "locked": True, "row": None}, 0),
    ("it has a row", {"prefix": [1], "own": [7, 8, 9], "locked": True, "row": 0}, 3),
    ("without a tree", {"prefix": [], "own": [7], "locked": False, "row": 2}, 1),
]


def check(m: ModuleType) -> None:
    for said, room, count in CASES:
        fails(m, said, room, count)


def fails(m: ModuleType, said: str, given: dict[str, Any], count: int) -> None:
    """And once more, of which nothing may come."""
    room = {name: list(value) if isinstance(value, list) else value for name, value in given.items()}
    free, rows, locks = [20, 21], [3], {1: 2, 2: 1, 5: 1}
    held = bool(given["own"] or given["locked"] or given["row"] is not None)
    calls: list[list[int]] = []
    call = (room, free, rows, locks, lambda one: calls.append(list(free)))
    expect(f"{said}: pages that became free", ask(m.give_back, *call), count)
    expect(f"{said}: what was free whenever close was called", calls, [[20, 21]] * held)
    expect(f"{said}: the free pages", sorted(free), sorted([20, 21, *given["own"]]))
    expect(f"{said}: the free rows", sorted(rows), sorted([3] + [given["row"]] * (given["row"] is not None)))
    left = {page: n - (page in given["prefix"] and given["locked"]) for page, n in {1: 2, 2: 1, 5: 1}.items()}
    expect(f"{said}: locks", locks, left)
    expect(f"{said}: the room", room, NOTHING)
    expect(f"{said}, a second time: pages that became free", ask(m.give_back, *call), 0)
    expect(f"{said}, a second time: calls of close", len(calls), int(held))
    expect(f"{said}, a second time: the free pages", sorted(free), sorted([20, 21, *given["own"]]))
    expect(f"{said}, a second time: locks", locks, left)
