"""Solution of exercise 3: A chunk that cuts a picture."""

from collections.abc import Sequence


def in_chunk(
    pictures: Sequence[tuple[int, int, int]], start: int, stop: int
) -> tuple[list[tuple[int, int, int, int]], int]:
    parts, shift = [], 0
    for number, (at, height, width) in enumerate(pictures):
        end = at + height * width
        first, last = max(start, at), min(stop, end)
        if first < last:
            parts.append((number, first - at, last - first, first - start))
        if end <= start:
            shift += max(height, width) - height * width
    return parts, shift
