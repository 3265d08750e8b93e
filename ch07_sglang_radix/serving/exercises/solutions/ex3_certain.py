"""Solution of exercise 3: Half a stop string."""

from collections.abc import Sequence


def certain(text: str, stops: Sequence[str]) -> int:
    halves = [size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
    return len(text) - max(halves, default=0)
