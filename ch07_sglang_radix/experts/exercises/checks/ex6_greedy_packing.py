from types import ModuleType

from common.teaching.expect import ask, expect

REPLICAS = {
    ((6, 1, 2), 5): [0, 1, 2, 0, 0],
    ((6, 1, 2), 3): [0, 1, 2],
    ((8, 3), 5): [0, 1, 0, 0, 1],  # 8 / 3 is less than 3
    ((4, 4, 1), 5): [0, 1, 2, 0, 1],  # of two alike the first
    ((2, 2), 4): [0, 1, 0, 1],
}
PACKS = {
    ((7, 1, 5, 3), 2): [[0, 1], [2, 3]],
    ((9, 1, 1, 1, 1, 1), 2): [[0, 4, 5], [1, 2, 3]],  # the second pack is full when it is still the lighter one
    ((1, 2, 3, 4), 4): [[3], [2], [1], [0]],
    ((2, 2, 2, 2), 2): [[0, 2], [1, 3]],
    ((5, 4, 3, 2, 1, 0), 3): [[0, 5], [1, 4], [2, 3]],
    ((3, 1, 2), 1): [[0, 2, 1]],
}


def check(m: ModuleType) -> None:
    for (load, slots), want in REPLICAS.items():
        expect(f"replicate({list(load)}, {slots})", ask(m.replicate, list(load), slots), want)
    for (weights, packs), want in PACKS.items():
        expect(f"pack({list(weights)}, {packs})", ask(m.pack, list(weights), packs), want)
    try:
        got = m.pack([1, 2, 3], 2)
    except ValueError:
        return
    expect("pack([1, 2, 3], 2): ValueError is raised", got, "ValueError")
