from types import ModuleType

from common.teaching.expect import ask, expect

PAGES = (  # length, slots, nodes, page size: pages
    (13, 16, 6, 4, 1),
    (13, 20, 6, 4, 0),
    (12, 12, 6, 4, 2),
    (3, 4, 1, 4, 0),
    (4, 4, 1, 4, 1),
    (7, 7, 5, 1, 5),
    (7, 12, 5, 1, 0),  # the last step's reserve is there still
    (10, 32, 4, 16, 0),
    (31, 32, 8, 16, 1),
)
LENGTHS = (  # length, path, wanted: length
    (13, [0, 1, 2], 9, 16),
    (13, [0], 9, 14),
    (13, [0, 2, 5], 9, 16),  # the nodes' numbers are not how many there are
    (13, [0, 1, 2, 3], 2, 15),
    (13, [0, 1], 2, 15),
    (20, [0, 3], 1, 21),
)
ROW = [8, 9, 4, 5, 0, 1, 6, 7]
ENDS = (  # ids, slots, shared, page size: tokens and slots of the tree, slots given back
    ([1, 2, 3, 4, 5, 6], ROW, 2, 2, ([1, 2, 3, 4], [8, 9, 4, 5], [0, 1, 6, 7])),
    ([1, 2, 3, 4, 5], ROW, 2, 2, ([1, 2, 3, 4], [8, 9, 4, 5], [0, 1, 6, 7])),
    ([1, 2, 3, 4, 5, 6, 7, 8, 9], ROW, 0, 2, ([1, 2, 3, 4, 5, 6, 7, 8], ROW, [])),
    ([1, 2, 3], [3, 5, 6], 0, 1, ([1, 2], [3, 5], [6])),
    ([1, 2, 3], [4, 5, 6, 7], 0, 4, ([], [], [4, 5, 6, 7])),
    ([1, 2, 3, 4, 5], [4, 5, 6, 7, 0, 1, 2, 3], 4, 4, ([1, 2, 3, 4], [4, 5, 6, 7], [0, 1, 2, 3])),
)


def check(m: ModuleType) -> None:
    for *given, want in PAGES:
        got = ask(m.pages_to_take, *given, why="a number of pages")
        expect("pages_to_take({}, {}, {}, {})".format(*given), got, want)
    for length, path, wanted, want in LENGTHS:
        got = ask(m.length_after, length, list(path), wanted, why="a number of tokens")
        expect(f"length_after({length}, {path}, {wanted})", got, want)
    for ids, slots, shared, page_size, want in ENDS:
        got = ask(
            m.at_the_end, list(ids), list(slots), shared, page_size, why="tokens, slots, slots given back", several=True
        )
        given = f"at_the_end({ids}, {slots}, {shared}, {page_size})"
        expect(f"{given}: three lists", len(got), 3)
        for name, one, right in zip(("tokens", "slots", "given back"), got, want, strict=True):
            expect(f"{given}: {name}", list(one), right)
