from types import ModuleType

from common.teaching.expect import ask, expect

CASES = [
    ("its own", {3: 77}, (3, 77, 42), ("token", 77, 42), {}),
    ("another room's", {3: 77}, (3, 5, 13), ("failed", 77, None), {}),
    ("a slot where nobody waits", {3: 77}, (4, 77, 42), ("late", None, None), {3: 77}),
    ("the number of a room that waits elsewhere", {3: 77, 4: 5}, (3, 5, 13), ("failed", 77, None), {4: 5}),
    ("token 0, room 0, slot 0", {0: 0}, (0, 0, 0), ("token", 0, 0), {}),
    ("others wait, too", {3: 77, 4: 5}, (4, 5, 13), ("token", 5, 13), {3: 77}),
    ("no slots at all", {}, (3, 77, 42), ("late", None, None), {}),
]


def check(m: ModuleType) -> None:
    for said, before, metadata, wanted, after in CASES:
        slots = dict(before)
        expect(f"{said}: what comes of {metadata} at {before}", ask(m.take, slots, metadata), wanted)
        expect(f"{said}: slots afterwards", slots, after)
    slots = {3: 77}
    ask(m.take, slots, (3, 77, 42))
    expect("the same again: what comes of it", ask(m.take, slots, (3, 77, 42)), ("late", None, None))
