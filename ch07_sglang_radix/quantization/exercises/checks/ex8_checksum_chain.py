from itertools import combinations
from types import ModuleType

from common.teaching.expect import ask, expect

# (namespace, pages): no two of these prompts share a prefix but for what their first pages say
PROMPTS = (
    ("base", [[1, 2], [3, 4]]), ("base", [[1, 2], [5, 6]]), ("base", [[9, 2], [3, 4]]), ("base", [[1, 2], [1, 2]]),
    ("base", [[12], [3]]), ("base", [[1], [23]]), ("base", [[1, 2, 3, 4]]), ("base", [[1], [2, 3]]), ("base", [[2, 1], [3, 4]]),
    ("salt", [[1, 2], [3, 4]]), ("base1", [[2]]), ("base", [[1, 2]]),
)  # fmt: skip
NAME, PAYLOAD = b"a page of this name", bytes(range(90))


def check(m: ModuleType) -> None:
    _names(m)
    expect("seal returns bytes", type(ask(m.seal, NAME, PAYLOAD)), bytes)
    for payload in (PAYLOAD, b"", b"\0" * 40):
        file = ask(m.seal, NAME, payload)
        expect(f"unseal of what seal has made of {len(payload)} bytes", ask(m.unseal, NAME, file), payload)
    file = ask(m.seal, NAME, PAYLOAD)
    for other in (b"another page's name", NAME + b"!", b""):
        expect(f"unseal({other!r}, a file of {NAME!r})", m.unseal(other, file), None)
    for length in (0, 1, 31, 32, 33, len(file) // 2, len(file) - 32, len(file) - 1):
        expect(f"unseal of its first {length} of {len(file)} bytes", m.unseal(NAME, file[:length]), None)
    expect("unseal of a file with a byte too many", m.unseal(NAME, file + b"\0"), None)
    for at in range(len(file)):
        turned = bytearray(file)
        turned[at] ^= 4
        expect(f"unseal of a file with byte {at} of {len(file)} turned", m.unseal(NAME, bytes(turned)), None)
    expect("unseal of zeros, as a crash may leave them", m.unseal(NAME, bytes(len(file))), None)


def _names(m: ModuleType) -> None:
    named = {}
    for namespace, pages in PROMPTS:
        told = ask(m.names, namespace, pages, several=True)
        expect(f"names({namespace!r}, {pages}): how many", len(told), len(pages))
        expect(
            f"names({namespace!r}, {pages}), asked again",
            ask(m.names, namespace, pages, several=True),
            told,
        )
        for i, name in enumerate(told):
            begins = namespace, tuple(map(tuple, pages[: i + 1]))
            where = f"names({namespace!r}, {pages})[{i}]"
            expect(f"{where}: bytes, 32 at most", isinstance(name, bytes) and len(name) <= 32, True)
            expect(f"{where}, and where the prompt begins the same", named.setdefault(begins, name), name)
    for (one, a), (other, b) in combinations(named.items(), 2):
        expect(f"the page at the end of {one} has the name of the one at the end of {other}", a == b, False)
