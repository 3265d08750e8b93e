"""What the checks of routers have in common: (expert, weight) pairs, the experts exact and the weights close."""

from collections.abc import Callable
from math import isclose
from typing import Any

from common.teaching.expect import ask, expect


def like(what: str, function: Callable[..., Any], arguments: tuple, want: list[tuple[int, float]]) -> None:
    got = ask(function, *arguments, why="(expert, weight) pairs", several=True)
    try:
        pairs = [(int(expert), round(float(weight), 6)) for expert, weight in got]
    except (TypeError, ValueError):
        pairs = got
    close = len(pairs) == len(want) and all(
        isinstance(one, tuple) and one[0] == wanted[0] and isclose(one[1], wanted[1], rel_tol=1e-5, abs_tol=2e-6)
        for one, wanted in zip(pairs, want, strict=True)
    )
    if not close:
        expect(what, pairs, [(expert, round(weight, 6)) for expert, weight in want])
