from types import ModuleType

from common.teaching.expect import ask, expect

RIGHT = {
    (7, 3): [(0, 2), (2, 4), (4, 7)],
    (8, 2): [(0, 4), (4, 8)],
    (8, 3): [(0, 2), (2, 5), (5, 8)],
    (5, 5): [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)],
    (28, 1): [(0, 28)],
    (80, 6): [(0, 13), (13, 26), (26, 39), (39, 52), (52, 66), (66, 80)],
}
OWN = {(7, 3, (3, 2, 2)): [(0, 3), (3, 5), (5, 7)], (22, 3, (8, 8, 6)): [(0, 8), (8, 16), (16, 22)]}
NOT = [(3, 4, None), (7, 3, [3, 4]), (7, 3, [3, 3, 3]), (7, 3, [4, 3, 0]), (7, 2, [8, -1])]


def check(m: ModuleType) -> None:
    for (layers, stages), want in RIGHT.items():
        expect(f"{layers} layers, {stages} stages", ask(m.split, layers, stages), want)
    for (layers, stages, parts), want in OWN.items():
        expect(f"{layers} layers, {stages} stages, {list(parts)}", ask(m.split, layers, stages, list(parts)), want)
    for layers, stages, parts in NOT:
        try:
            got = m.split(layers, stages, parts)
        except ValueError:
            continue
        expect(f"{layers} layers, {stages} stages, {parts}: ValueError is raised", got, "ValueError")
