from types import ModuleType

from common.teaching.expect import ask, expect

TREES = {  # parents: of each node, the nodes that it sees
    (-1,): "0",
    (-1, 0, 1, 2): "0 01 012 0123",  # a chain
    (-1, 0, 0, 0): "0 01 02 03",
    (-1, 0, 0, 1): "0 01 02 013",
    (-1, 0, 0, 2, 1, 3, 3): "0 01 02 023 014 0235 0236",
    (-1, 0, 1, 1, 2, 0, 5): "0 01 012 013 0124 05 056",
}


def check(m: ModuleType) -> None:
    for parents, rows in TREES.items():
        wanted = [[str(other) in row for other in range(len(parents))] for row in rows.split()]
        mask = ask(m.tree_mask, list(parents), why="a list for each node", several=len(parents))
        for node, want in enumerate(wanted):
            got = (
                [bool(x) if hasattr(x, "dtype") else x for x in mask[node]]
                if hasattr(mask[node], "__iter__")
                else mask[node]
            )
            expect(f"tree_mask({list(parents)})[{node}]", got, want)
    for cached in (0, 3):
        for parents, rows in TREES.items():
            for node, row in enumerate(rows.split()):
                got = ask(m.seen, list(parents), cached, node, why="a list of slots", several=True)
                want = [*range(cached), *(cached + int(other) for other in row)]
                expect(f"seen({list(parents)}, {cached}, {node})", got, want)
