import random
from collections.abc import Sequence
from types import ModuleType

from common.teaching.expect import ask, expect


class Counted(Sequence):
    """Bytes that count how often they are read, and can only be read one by one."""

    def __init__(self, raw: bytes):
        self._raw, self.reads = raw, 0

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, i):
        if not isinstance(i, int):
            raise TypeError("only one at a time")
        number = self._raw[i]
        self.reads += 1
        return number

    def __repr__(self) -> str:
        return repr(self._raw)


def check(m: ModuleType) -> None:
    key = b"a secret of 24 bytes ..."
    for at in (None, 0, 1, 12, len(key) - 1):
        other = bytearray(key)
        if at is not None:
            other[at] ^= 1
        given, wanted = Counted(bytes(other)), Counted(key)
        said = f"{bytes(other)!r} and {key!r}"
        expect(f"equal: are they the same, {said}", ask(m.equal, given, wanted), at is None)
        expect(f"equal: bytes read of each, {said}", (given.reads, wanted.reads), (len(key), len(key)))
    for a, b in ((b"", b""), (b"", b"a"), (b"a", b""), (b"ab", b"abc"), (b"abc", b"ab"), (b"ab", b"ba"), (b"\x01\x02", b"\x02\x01")):
        expect(f"equal: are they the same, {a!r} and {b!r}", ask(m.equal, Counted(a), Counted(b)), a == b)
    rng = random.Random(0)
    for _ in range(100):
        a, b = (bytes(rng.choices((0, 1, 255), k=3)) for _ in range(2))
        expect(f"equal: are they the same, {a!r} and {b!r}", ask(m.equal, Counted(a), Counted(b)), a == b)
    _check_header(m)


def _check_header(m: ModuleType) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def equal(given: Sequence[int], wanted: Sequence[int]) -> bool:
        assert isinstance(given, bytes) and isinstance(wanted, bytes), (
            f"authorized: what is compared: got {type(given).__name__} and {type(wanted).__name__}, wanted bytes"
        )
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
            expect(f"authorized: what `equal` was given, Authorization: {header!r}", compared, [(key.encode(), key.encode())])
        if header == "Bearer sesam":
            expect(f"authorized: was `equal` asked, Authorization: {header!r}", bool(compared), True)
