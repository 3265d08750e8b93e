from collections.abc import Iterator
from itertools import product
from random import Random
from types import ModuleType

from common.teaching.expect import ask, expect, short


def check(m: ModuleType) -> None:
    expect("names of 5 tokens in blocks of 2: only full blocks have one", len(_names(m, [1, 2, 3, 4, 5], 2)), 2)
    expect("names of 3 tokens in blocks of 4", len(_names(m, [1, 2, 3], 4)), 0)
    prompts = list(_prompts())
    for size in (1, 2, 3):
        _check_names(m, prompts, size)
    _check_hits(m)


def _names(m: ModuleType, tokens: list[int], size: int) -> list:
    names = ask(m.block_hashes, list(tokens), size, why="a name for each full block", several=True)
    for name in names:
        ask(hash, name, why="names that can be in a set")
    return names


def _prompts() -> Iterator[list[int]]:
    """Short ones, all there are of 0, 1 and 2; ids that look alike when they are written down; random ones."""
    for length in range(1, 6):
        yield from map(list, product(range(3), repeat=length))
    yield from ([1, 23], [12, 3], [1, 2, 3], [123], [11, 1], [1, 11], [111], [10, 0, 1], [1, 0, 0, 1], [100, 1], [1, 1])
    yield from ([0, base] for base in (10, 31, 256, 1000, 1 << 16))  # 1 0 in that base
    rng = Random(0)
    heads = [[rng.randrange(150_000) for _ in range(6)] for _ in range(4)]
    for _ in range(60):
        head = rng.choice(heads)
        yield rng.sample(head, len(head))  # the same tokens in another order
        yield head[: rng.randint(1, 6)] + [rng.randrange(150_000) for _ in range(4)]


def _check_names(m: ModuleType, prompts: list[list[int]], size: int) -> None:
    """Equal name, equal beginning, and the other way round."""
    begins, named = {}, {}
    for tokens in prompts:
        names = _names(m, tokens, size)
        expect(f"number of names of {tokens} in blocks of {size}", len(names), len(tokens) // size)
        for i, name in enumerate(names):
            begin = tuple(tokens[: (i + 1) * size])
            known = begins.setdefault(name, begin)
            assert known == begin, (
                f"blocks of {size}: got the same name for the last block of {list(known)} and of {list(begin)}, wanted two: "
                "other tokens, or the same behind another beginning, are another block"
            )
            known = named.setdefault(begin, name)
            assert known == name, (
                f"blocks of {size}: got {short(name)} for the last block of {list(begin)}, and {short(known)} before; "
                "wanted the same name: whoever begins alike must find it"
            )


def _check_hits(m: ModuleType) -> None:
    cached = set(_names(m, list(range(12)), 4))
    middle = set(_names(m, list(range(12)), 4)[1:])
    first = set(_names(m, list(range(4)), 4))
    for what, tokens, known, want in (
        ("three blocks cached, one token behind them", [*range(12), 99], cached, 12),
        ("the first two blocks match", [*range(8), 99, 98, 97, 96, 95], cached, 8),
        ("the first token differs", [99, *range(11)], cached, 0),
        ("a prompt cached from end to end leaves its last token to compute, and computing begins where a block does",
         list(range(12)), cached, 8),
        ("a prompt of one block, cached from end to end", list(range(4)), cached, 0),
        ("three full blocks, of which only the first is cached: that one is all right", list(range(12)), first, 4),
        ("a block that is not full is not in the cache", list(range(7)), cached, 4),
        ("the first block is missing, a hit begins at the first block", [*range(12), 99], middle, 0),
        ("nothing is cached", list(range(12)), set(), 0),
        ("one token", [0], cached, 0),
    ):  # fmt: skip
        got = ask(m.computed_tokens, list(tokens), set(known), 4)
        rule = "" if not isinstance(got, int) or got % 4 == 0 else " (a block is found as a whole or not at all)"
        expect(f"{what}: tokens that need not be computed{rule}, of {len(tokens)} in blocks of 4", got, want)
