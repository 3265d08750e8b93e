from types import ModuleType

from common.teaching.expect import ask, expect

# of each story: (call, its arguments, what comes back)
STORIES = (
    [
        ("insert", ("a", (1, 2), 7), None), ("insert", ("b", (1, 3), 8), None), ("end", ("b",), None), ("update", (), None),
        ("free", (), [8]), ("find", ("c", (1, 2)), 0), ("find", ("a", (1, 2)), 7), ("end", ("a",), None), ("free", (), [7, 8]),
    ],  # the example
    [
        ("insert", ("a", (5,), 1), None), ("end", ("a",), None), ("find", ("b", (5,)), 1), ("free", (), []),
        ("end", ("b",), None), ("free", (), []), ("find", ("c", (5,)), 1),
    ],  # without an update a cache is a cache
    [
        ("insert", ("a", (5,), 1), None), ("update", (), None), ("insert", ("a", (5, 6), 2), None), ("find", ("b", (5, 6)), 0),
        ("insert", ("b", (5,), 3), None), ("insert", ("b", (5, 6), 4), None), ("end", ("a",), None), ("free", (), [1, 2]),
        ("find", ("c", (5, 6)), 4),
    ],  # what an old request computes now is made from old K and V
    [
        ("insert", ("a", (5,), 1), None), ("find", ("b", (5,)), 1), ("update", (), None), ("end", ("a",), None),
        ("free", (), []), ("find", ("b", (5,)), 1), ("end", ("b",), None), ("free", (), [1]),
    ],  # two users of an old page: it goes with the last
    [
        ("insert", ("a", (5,), 1), None), ("update", (), None), ("insert", ("b", (5,), 2), None), ("update", (), None),
        ("find", ("c", (5,)), 0), ("find", ("a", (5,)), 1), ("find", ("b", (5,)), 2), ("end", ("b",), None), ("free", (), [2]),
    ],  # two updates: three kinds of pages
)  # fmt: skip


def check(m: ModuleType) -> None:
    for story in STORIES:
        cache, said = m.Cache(), []
        for name, arguments, want in story:
            said.append(f"{name}({', '.join(map(repr, arguments))})")
            if want is None:
                getattr(cache, name)(*arguments)
            elif name == "find":  # None is an answer here, and 0 stands for it
                got = cache.find(*arguments)
                expect("; ".join(said), got, want or None)
            else:
                expect(
                    "; ".join(said),
                    ask(getattr(cache, name), *arguments, why=f"an answer after {'; '.join(said)}"),
                    want,
                )
