from types import ModuleType

from common.teaching.expect import ask, expect

NOTHING = object()  # the call returns nothing that is looked at
# of each story: pages, and (call, its argument or None, what comes back)
STORIES = (
    (1, [
        ("compute", "a", 0), ("evict", None, "a"), ("free", None, []), ("compute", "b", None), ("copied", "a", NOTHING),
        ("free", None, [0]), ("compute", "b", 0), ("use", "a", "host"), ("use", "b", "device"), ("use", "c", None),
    ]),  # the example
    (3, [
        ("compute", "a", 0), ("compute", "b", 1), ("evict", None, "a"), ("evict", None, "b"), ("evict", None, None),
        ("copied", "b", NOTHING), ("free", None, [1, 2]), ("copied", "a", NOTHING), ("free", None, [0, 1, 2]),
    ]),  # nobody is copied twice; copies may end in another order
    (2, [
        ("compute", "a", 0), ("compute", "b", 1), ("use", "a", "device"), ("evict", None, "b"), ("evict", None, None),
        ("copied", "b", NOTHING), ("free", None, [1]), ("release", "a", NOTHING), ("free", None, [1]), ("evict", None, "a"),
        ("free", None, [1]),
    ]),  # who is used does not go, and who is no longer used does not go by itself
    (1, [
        ("compute", "a", 0), ("evict", None, "a"), ("use", "a", "device"), ("copied", "a", NOTHING), ("free", None, []),
        ("compute", "b", None), ("release", "a", NOTHING), ("free", None, []), ("use", "a", "device"), ("release", "a", NOTHING),
        ("evict", None, "a"), ("free", None, [0]), ("use", "a", "host"),
    ]),  # a request comes while it is copied: the page stays; afterwards both have it, and to evict it costs no copy
    (1, [
        ("compute", "a", 0), ("use", "a", "device"), ("use", "a", "device"), ("release", "a", NOTHING), ("evict", None, None),
        ("release", "a", NOTHING), ("evict", None, "a"), ("copied", "a", NOTHING), ("free", None, [0]),
    ]),  # the last of two users
    (1, [
        ("compute", "a", 0), ("evict", None, "a"), ("use", "a", "device"), ("release", "a", NOTHING), ("evict", None, None),
        ("free", None, []), ("copied", "a", NOTHING), ("free", None, [0]),
    ]),  # a user comes and goes before the copy is done
    (1, [
        ("compute", "a", 0), ("evict", None, "a"), ("copied", "a", NOTHING), ("use", "a", "host"), ("compute", "b", 0),
        ("evict", None, "b"), ("copied", "b", NOTHING), ("use", "b", "host"), ("use", "a", "host"),
    ]),  # who is found on the host alone has no page to keep
)  # fmt: skip


def check(m: ModuleType) -> None:
    for pages, story in STORIES:
        tree, said = m.WriteBack(pages), [f"WriteBack({pages})"]
        for name, argument, want in story:
            arguments = () if argument is None else (argument,)
            said.append(f"{name}({', '.join(map(repr, arguments))})")
            if want is NOTHING:
                getattr(tree, name)(*arguments)
            elif want is None:
                expect("; ".join(said), getattr(tree, name)(*arguments), want)
            else:
                got = ask(getattr(tree, name), *arguments, why=f"an answer after {'; '.join(said)}")
                expect("; ".join(said), got, want)
