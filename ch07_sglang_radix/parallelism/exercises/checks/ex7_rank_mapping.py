from types import ModuleType

from common.teaching.expect import ask, expect

RIGHT = {
    (2, 3, 4): [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)],
    (3, 2, 4): [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)],
    (1, 3, 2): [(0, 0), (0, 1), (1, 0)],
    (4, 2, 4): [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)],
    (4, 2, 2): [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)],
    (2, 3, 5): [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)],
    (3, 3, 8): [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 0), (1, 1), (1, 2)],
}


def check(m: ModuleType) -> None:
    for (tp, stages, node_size), want in RIGHT.items():
        expect(f"tp {tp}, {stages} stages, hosts of {node_size}", ask(m.seats, tp, stages, node_size), want)
    for tp, node_size in ((3, 2), (6, 4), (9, 8)):
        try:
            got = m.seats(tp, 2, node_size)
        except ValueError:
            continue
        expect(f"tp {tp} on hosts of {node_size}, which it cannot fill: ValueError is raised", got, "ValueError")
