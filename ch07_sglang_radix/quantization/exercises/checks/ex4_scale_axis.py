from itertools import product
from types import ModuleType

from common.teaching.expect import ask, expect

CASES = (  # strategy, sizes, shape
    ("tensor", (1, 1), (8, 12)),
    ("channel", (1, 1), (8, 12)),
    ("group", (1, 4), (8, 12)),
    ("group", (1, 3), (12, 24)),
    ("group", (1, 5), (8, 12)),  # the last group has two columns
    ("block", (4, 4), (8, 12)),
    ("block", (5, 8), (12, 24)),
)


def check(m: ModuleType) -> None:
    for (strategy, sizes, shape), cut, ranks in product(CASES, ("column", "row"), (1, 2, 4)):
        for rank in range(ranks):
            args = strategy, sizes, shape, cut, rank, ranks
            expect(f"part{args}", ask(m.part, *args, several=2), list(_needed(*args)))


def _needed(strategy, sizes, shape, cut, rank, ranks) -> tuple[tuple[int, int], tuple[int, int]]:
    """Number by number: whose scale each of this rank's numbers has."""
    rows, columns = range(shape[0]), range(shape[1])
    if cut == "column":
        rows = rows[rank * shape[0] // ranks : (rank + 1) * shape[0] // ranks]
    else:
        columns = columns[rank * shape[1] // ranks : (rank + 1) * shape[1] // ranks]
    size = {"tensor": shape, "channel": (1, shape[1])}.get(strategy, sizes)
    down, across = [row // size[0] for row in rows], [column // size[1] for column in columns]
    return (min(down), max(down) + 1), (min(across), max(across) + 1)
