from types import ModuleType

from common.teaching.expect import ask, expect

CASES = [
    ("the example", (95, [(40, 20), (40, 20)], [], 8), 1),
    ("one slot more", (96, [(40, 20), (40, 20)], [], 8), 2),
    ("nobody waits", (100, [], [5], 8), 0),
    ("an answer that is nearly done keeps what it may still get", (50, [(40, 20)], [2], 8), 1),
    ("a long answer keeps `reserved`", (56, [(40, 20)], [900], 8), 1),
    ("one slot less", (55, [(40, 20)], [900], 8), 0),
    ("a short answer of its own keeps less", (51, [(40, 3)], [900], 8), 1),
    ("nothing runs: the prompt alone must fit", (40, [(40, 20)], [], 8), 1),
    ("nothing runs, and it does not fit", (39, [(40, 20)], [], 8), 0),
    ("a small one behind a large one does not overtake", (50, [(60, 5), (10, 5)], [5], 8), 0),
    ("several run", (100, [(60, 20)], [20, 20, 20], 8), 1),
    ("one more runs", (91, [(60, 20)], [20, 20, 20], 8), 0),
    ("nothing is reserved", (80, [(40, 20), (40, 20)], [500], 0), 2),
]


def check(m: ModuleType) -> None:
    for said, arguments, wanted in CASES:
        expect(f"{said}: prompts that get pages", ask(m.how_many, *arguments), wanted)
