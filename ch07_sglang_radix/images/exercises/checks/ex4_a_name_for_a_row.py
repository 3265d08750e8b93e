import hashlib
from types import ModuleType

from common.teaching.expect import ask, expect
from common.vision.keys import ImageKey

ONE, ALL = (1).to_bytes(32, "big"), b"\xff" * 32
SHA = hashlib.sha256(b"a picture").digest()


def check(m: ModuleType) -> None:
    for said, sha, row, want in (
        ("of the number 1", ONE, 0, 2**62 + 2**14),
        ("of the number 1", ONE, 1, 2**62 + 1),
        ("of the number 1", ONE, 4, 2**62 + 2**14 + 4),
        ("of ones alone", ALL, 0, 2**63 - 2**14),
        ("of ones alone", ALL, 16383, 2**63 - 1),
        *(("of a picture", SHA, row, int(ImageKey(SHA, 1, row + 1).ids[row])) for row in (0, 1, 2, 3, 7, 1279)),
    ):
        expect(f"name(a SHA {said}, {row})", ask(m.name, sha, row, why="a number"), want)
    try:
        got = m.name(ONE, 1 << 14)
    except ValueError:
        return
    raise AssertionError(f"name(a SHA, {1 << 14}): got {got}, wanted ValueError: the row would run into the SHA")
