"""Solution of exercise 7: A key that tells nothing by the time it takes."""

from collections.abc import Callable, Sequence


def equal(given: Sequence[int], wanted: Sequence[int]) -> bool:
    if len(given) != len(wanted):  # how long a key is may be known
        return False
    different = 0
    for a, b in zip(given, wanted, strict=True):
        different |= a ^ b
    return different == 0


def authorized(header: str | None, key: str | None, equal: Callable[[Sequence[int], Sequence[int]], bool]) -> bool:
    if key is None:
        return True
    kind, _, given = (header or "").partition(" ")
    return kind.lower() == "bearer" and equal(given.strip().encode(), key.encode())
