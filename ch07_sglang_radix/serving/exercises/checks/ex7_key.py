import random
from collections.abc import Sequence
from types import ModuleType

from common.teaching.expect import ask, expect


class Byte:
    """A number from 0 to 255 that counts how often it was looked at: by an operator, and nothing else works."""

    def __init__(self, value: int):
        self.value, self.looks = value, 0

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return str(self.value)


def _counting(name: str):
    def operator(self: Byte, other: object):
        self.looks += 1
        if isinstance(other, Byte):
            other.looks += 1
            other = other.value
        return getattr(self.value, name)(other)

    return operator


for _name in ("__eq__", "__ne__", "__xor__", "__rxor__", "__sub__", "__rsub__", "__add__", "__radd__"):
    setattr(Byte, _name, _counting(_name))


def check(m: ModuleType) -> None:
    key = b"a secret of 24 bytes ..."
    for at in (None, 0, 1, 12, len(key) - 1):
        other = bytearray(key)
        if at is not None:
            other[at] ^= 1
        given, wanted = counted(bytes(other)), counted(key)
        said = f"{bytes(other)!r} and {key!r}"
        expect(f"equal: are they the same, {said}", ask(m.equal, given, wanted), at is None)
        looks = [[one.looks for one in some] for some in (given, wanted)]
        expect(f"equal: looks at each byte, {said}", looks, [[1] * len(key)] * 2)
    pairs = [
        (b"", b""),
        (b"", b"a"),
        (b"a", b""),
        (b"ab", b"abc"),
        (b"abc", b"ab"),
        (b"ab", b"ba"),
        (b"\x01\x02", b"\x02\x01"),
    ]
    rng = random.Random(0)
    pairs += [tuple(bytes(rng.choices((0, 1, 255), k=3)) for _ in range(2)) for _ in range(100)]
    for a, b in pairs:
        expect(f"equal: are they the same, {a!r} and {b!r}", ask(m.equal, counted(a), counted(b)), a == b)
    _check_header(m)


def counted(raw: bytes) -> list[Byte]:
    return [Byte(value) for value in raw]


def _check_header(m: ModuleType) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def equal(given: Sequence[int], wanted: Sequence[int]) -> bool:
        for one in (given, wanted):
            assert isinstance(one, bytes), f"authorized: what is compared: got {type(one).__name__}, wanted bytes"
        compared.append((given, wanted))
        return given == wanted

    for header, key, want in (
        ("Bearer sesame", "sesame", True),
        ("bearer sesame", "sesame", True),
        ("BEARER   sesame ", "sesame", True),
        ("Bearer sesam", "sesame", False),
        ("Bearer sesame street", "sesame", False),
        ("Basic sesame", "sesame", False),
        ("sesame", "sesame", False),
        ("Bearer", "sesame", False),
        ("", "sesame", False),
        (None, "sesame", False),
        (None, None, True),
        ("Bearer anything", None, True),
        ("Bearer schlüssel", "schlüssel", True),
        ("Bearer schlussel", "schlüssel", False),
        ("Bearer 钥匙", "钥匙", True),
    ):
        compared.clear()
        got = ask(m.authorized, header, key, equal)
        expect(f"authorized: may it pass, Authorization: {header!r}, key {key!r}", got, want)
        if want and key is not None:
            want_pair = [(key.encode(), key.encode())]
            expect(f"authorized: what `equal` was given, Authorization: {header!r}", compared, want_pair)
        if header == "Bearer sesam":
            expect(f"authorized: was `equal` asked, Authorization: {header!r}", bool(compared), True)
