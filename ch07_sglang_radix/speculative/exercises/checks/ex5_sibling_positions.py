from types import ModuleType

from common.teaching.expect import ask, expect

TREES = (  # parents, root, positions
    ([-1, 0, 0, 1, 3], 7, [7, 8, 8, 9, 10]),
    ([-1, 0, 1, 2], 0, [0, 1, 2, 3]),
    ([-1, 0, 0, 0], 4, [4, 5, 5, 5]),
    ([-1, 0, 0, 2, 1, 3, 0], 2, [2, 3, 3, 4, 4, 5, 3]),
    ([-1], 9, [9]),
)
PATHS = (  # path, nodes of the tree, slot of the root
    ([0, 2, 3], 4, 7),
    ([0, 1, 2], 4, 7),
    ([0, 1, 4], 6, 0),
    ([0, 3, 4, 5], 6, 2),
    ([0, 2, 3, 4], 5, 1),  # from the back, 3 would be overwritten before it is copied
    ([0], 3, 5),
)


def check(m: ModuleType) -> None:
    for parents, root, want in TREES:
        got = ask(m.positions, list(parents), root, why="a position for each node", several=len(parents))
        expect(f"positions({parents}, {root})", got, want)
    for path, nodes, first in PATHS:
        call = f"moves({path}, {first})"
        got = ask(m.moves, list(path), first, why="a list of pairs", several=True)
        slots = [f"token {i}" for i in range(first)] + [f"node {i}" for i in range(nodes)]
        for pair in got:
            source, target = pair if isinstance(pair, list | tuple) and len(pair) == 2 else (None, None)
            known = all(isinstance(x, int) and 0 <= x < len(slots) for x in (source, target))
            expect(f"{call}: are {pair} two of the {len(slots)} slots", known, True)
            slots[target] = slots[source]
        want = [f"token {i}" for i in range(first)] + [f"node {i}" for i in path]
        expect(f"what lies in the first {len(want)} slots after {call}", slots[: len(want)], want)
        still = [(first + node, first + place) for place, node in enumerate(path) if node != place]
        expect(f"{call}: how many copies", len(got), len(still))
