from collections.abc import Callable
from types import ModuleType

from common.teaching.expect import ask, expect

REFUSED = "ValueError"
# of each story: (call, its argument, what comes back)
STORIES = (
    [
        ("load", "pirate", 1), ("acquire", "pirate", 1), ("unload", "pirate", None), ("in_memory", None, [1]),
        ("load", "pirate", 2), ("in_memory", None, [1, 2]), ("release", 1, None), ("in_memory", None, [2]),
    ],  # the example
    [
        ("load", "shout", 1), ("load", "pirate", 2), ("unload", "shout", None), ("in_memory", None, [2]),
        ("acquire", "shout", REFUSED), ("unload", "shout", REFUSED), ("load", "shout", 3), ("in_memory", None, [2, 3]),
    ],  # nobody uses it: it goes at once, and its identity is never used again
    [
        ("load", "shout", 1), ("load", "shout", REFUSED), ("acquire", "shout", 1), ("acquire", "shout", 1),
        ("unload", "shout", None), ("acquire", "shout", REFUSED), ("release", 1, None), ("in_memory", None, [1]),
        ("release", 1, None), ("in_memory", None, []),
    ],  # the last of two users; and nobody new meanwhile
    [
        ("load", "shout", 1), ("acquire", "shout", 1), ("unload", "shout", None), ("load", "shout", 2),
        ("acquire", "shout", 2), ("unload", "shout", None), ("in_memory", None, [1, 2]), ("release", 2, None),
        ("in_memory", None, [1]), ("release", 1, None), ("in_memory", None, []), ("load", "shout", 3),
    ],  # two of one name leave, the newer one first
    [
        ("load", "shout", 1), ("acquire", "shout", 1), ("release", 1, None), ("in_memory", None, [1]),
        ("acquire", "shout", 1),
    ],  # without users it stays, until somebody unloads it
    [("acquire", "nobody", REFUSED), ("unload", "nobody", REFUSED), ("in_memory", None, [])],
)  # fmt: skip


def check(m: ModuleType) -> None:
    for story in STORIES:
        registry, said = m.Registry(), []
        for name, argument, want in story:
            arguments = () if argument is None else (argument,)
            said.append(f"{name}({', '.join(map(repr, arguments))})")
            if want == REFUSED:
                got = _refused(getattr(registry, name), arguments)
            else:
                got = ask(getattr(registry, name), *arguments, why=f"an answer after {'; '.join(said)}")
            if want is not None:
                expect("; ".join(said), got, want)


def _refused(call: Callable, arguments: tuple) -> object:
    try:
        return call(*arguments)
    except ValueError:
        return REFUSED
