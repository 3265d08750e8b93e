"""Solution of exercise 7: No trace."""

from collections.abc import Sequence


def pages_to_take(length: int, num_slots: int, nodes: int, page_size: int) -> int:
    return max(0, -(-(length + nodes - num_slots) // page_size))


def length_after(length: int, path: Sequence[int], wanted: int) -> int:
    return length + min(len(path), wanted)


def at_the_end(
    ids: Sequence[int], slots: Sequence[int], shared: int, page_size: int
) -> tuple[list[int], list[int], list[int]]:
    whole = (len(ids) - 1) // page_size * page_size
    return list(ids[:whole]), list(slots[:whole]), list(slots[max(whole, shared) :])
