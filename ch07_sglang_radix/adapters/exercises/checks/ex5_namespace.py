from itertools import combinations_with_replacement
from types import ModuleType

from common.teaching.expect import ask, expect

LOADS = (
    ("pirate", "a/pirate", None), ("pirate", "a/pirate", 3), ("pirate", "a/pirate", 4), ("pirate", "b/pirate", None),
    ("pirate", "b/pirate", 5), ("terse", "a/pirate", None), ("pirat", "ea/pirate", None), ("pirate:a", "pirate", None),
    ("pirate", "a:pirate", None), ("pirate", "a/pirate3", None), ("pirate", "a/pirate:3", None), ("pirate", "a/pirate", 34),
    ("pirate", "a/pirate-3", 4), ("pirate-a", "pirate", 3),
)  # fmt: skip
PARTS = (None, "", "None", "a", "b", "ab", "a:b", "a b", "('a', 'b')")


def check(m: ModuleType) -> None:
    for one, other in combinations_with_replacement(LOADS, 2):
        equal = ask(m.identity, *one) == ask(m.identity, *other)
        expect(f"identity{one} == identity{other}", equal, one == other)
    pairs = [(identity, salt) for identity in PARTS if identity != "" for salt in PARTS]
    for one, other in combinations_with_replacement(pairs, 2):
        first, second = ask(m.tree_key, *one), ask(m.tree_key, *other)
        expect(f"tree_key{one} == tree_key{other}", first == second, one == other)
        if one == other:
            expect(f"tree_key{one} in a dictionary", ask(lambda key: {key: True}.get(key), first), True)
    expect("tree_key(None, None): something that can be compared", ask(m.tree_key, "a", None) is not None, True)
