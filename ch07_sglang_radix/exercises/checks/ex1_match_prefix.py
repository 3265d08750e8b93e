"""A tree of dicts; nothing of the product is imported, so that the check takes no time."""

import random
from collections.abc import Iterator
from types import ModuleType

from common.teaching.expect import ask, expect


def new_node(key: list[int], slots: list[int], parent: dict | None, lock_ref: int = 0) -> dict:
    node = {"key": key, "slots": slots, "children": {}, "parent": parent, "lock_ref": lock_ref}
    if parent is not None:
        parent["children"][key[0]] = node
    return node


def new_tree(sequences: list[list[int]], first_slot: int = 100) -> dict:
    """A tree without needless nodes: every prefix of the sequences has one slot, numbered from first_slot."""
    root = new_node([], [], None)
    slot = iter(range(first_slot, 1 << 30))

    def grow(node: dict, tails: list[list[int]]) -> None:
        for first in dict.fromkeys(tail[0] for tail in tails if tail):
            mine = [tail for tail in tails if tail and tail[0] == first]
            n = 1
            while n < min(map(len, mine)) and len({tail[n] for tail in mine}) == 1:
                n += 1
            child = new_node(mine[0][:n], [next(slot) for _ in range(n)], node)
            grow(child, [tail[n:] for tail in mine])

    grow(root, sequences)
    return root


def nodes(node: dict) -> Iterator[dict]:
    """All but the root; what must be true of each is checked on the way."""
    for first, child in node["children"].items():
        expect("tokens of a node that is not the root: at least one; is it so", len(child["key"]) > 0, True)
        expect(f"node {child['key']} is filed under its first token", first, child["key"][0])
        expect(f"node {child['key']}: is its parent the node whose child it is", child["parent"] is node, True)
        expect(f"node {child['key']}: number of its slots", len(child["slots"]), len(child["key"]))
        yield child
        yield from nodes(child)


def path_to(node: dict) -> tuple[list[int], list[int]]:
    tokens, slots = [], []
    while node["parent"] is not None:
        tokens, slots, node = node["key"] + tokens, node["slots"] + slots, node["parent"]
    return tokens, slots


def check(m: ModuleType) -> None:
    _check_split(m)
    _check_match(m)
    _check_at_random(m)


def _check_split(m: ModuleType) -> None:
    root = new_node([], [], None)
    top = new_node([1, 2, 3, 4], [40, 41, 42, 43], root, lock_ref=3)
    below = new_node([5], [50], top, lock_ref=1)
    upper = ask(m.split, top, 3)
    expect("split 1 2 3 4 after 3: type of what is returned", type(upper).__name__, "dict")
    expect("split 1 2 3 4 after 3: key of the node returned, the upper half", upper["key"], [1, 2, 3])
    expect("its slots", upper["slots"], [40, 41, 42])
    expect("the old node, which requests know as the end of their path, is the lower half; its key", top["key"], [4])
    expect("its slots", top["slots"], [43])
    expect("lock_ref of the lower half", top["lock_ref"], 3)
    expect("lock_ref of the upper half: who has locked the lower one has locked it too", upper["lock_ref"], 3)
    expect("children of the upper half: is the lower one filed under 4", upper["children"].get(4) is top, True)
    expect("number of children of the upper half", len(upper["children"]), 1)
    expect("the children of the old node stay with it: is 5 below 4", top["children"].get(5) is below, True)
    expect("is the upper half a child of the root", root["children"].get(1) is upper, True)
    expect("nodes of the tree", len(list(nodes(root))), 3)
    again = ask(m.split, upper, 1)
    expect("split 1 2 3 after 1: keys of the two halves", (again["key"], upper["key"]), ([1], [2, 3]))
    expect("nodes of the tree", len(list(nodes(root))), 4)


def _match(m: ModuleType, root: dict, tokens: list[int]) -> tuple[list[int], dict]:
    given = list(tokens)
    found = ask(m.match_prefix, root, given)
    expect(f"match_prefix({tokens}) returns two things, slots and a node; is it so",
           isinstance(found, tuple | list) and len(found) == 2 and isinstance(found[1], dict), True)  # fmt: skip
    expect("the caller's tokens", given, tokens)
    return list(found[0]), found[1]


def _check_match(m: ModuleType) -> None:
    root = new_tree([[1, 2, 3, 4]])
    for what, tokens, want in (
        ("nothing matches: no slots", [9], []),
        ("no tokens, no slots", [], []),
        ("a prompt that goes on behind the tree", [1, 2, 3, 4, 5], [100, 101, 102, 103]),
        ("an edge that matches in part", [1, 2, 9], [100, 101]),
        ("a prompt that ends inside the tree", [1], [100]),
    ):
        slots, node = _match(m, root, tokens)
        expect(f"{what}: slots of {tokens} in a tree of 1 2 3 4", slots, want)
        expect(f"{what}: tokens from the root to the node returned for {tokens}", path_to(node)[0], tokens[: len(want)])
        list(nodes(root))


def _check_at_random(m: ModuleType) -> None:
    rng = random.Random(0)
    for _ in range(30):
        root, want = new_tree([[rng.randrange(3) for _ in range(rng.randint(1, 9))] for _ in range(5)]), {}
        for node in nodes(root):
            tokens, slots = path_to(node)
            want |= {tuple(tokens[:i]): slots[:i] for i in range(1, len(tokens) + 1)}
        ends = [(node, *path_to(node)) for node in nodes(root)]
        for _ in range(20):
            tokens = [rng.randrange(3) for _ in range(rng.randint(1, 9))]
            slots, node = _match(m, root, tokens)
            longest = max((n for n in range(1, len(tokens) + 1) if tuple(tokens[:n]) in want), default=0)
            expect(f"slots of {tokens} in a random tree", slots, want.get(tuple(tokens[:longest]), []))
            expect(f"tokens and slots up to the node returned for {tokens}", path_to(node), (tokens[:longest], slots))
            list(nodes(root))
            for end, *path in ends:
                expect(
                    "a node that a request may hold ends the same path as before; tokens and slots", path_to(end), path
                )
