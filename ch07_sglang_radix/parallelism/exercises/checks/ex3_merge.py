from itertools import pairwise
from math import exp, inf, isclose, log, nan
from types import ModuleType

from common.teaching.expect import ask, expect

SCORES, VALUES = (
    [0.0, 0.7, -1.2, 2.0, 1.1, 0.3],
    [[1.0, 10.0], [2.0, -4.0], [3.0, 0.5], [4.0, 8.0], [5.0, 2.0], [6.0, 1.0]],
)
NOTHING = ([nan, nan], -inf)


def check(m: ModuleType) -> None:
    like(m, "keys of weight 1 and 2", [([10.0], log(1)), ([40.0], log(2))], ([30.0], log(3)))
    whole = over(range(6))
    for name, cuts in (("two halves", (3,)), ("unequal parts", (1, 3)), ("six parts of one key", (1, 2, 3, 4, 5))):
        bounds = [0, *cuts, 6]
        parts = [over(range(a, b)) for a, b in pairwise(bounds)]
        like(m, name, parts, whole)
        like(m, f"{name}, the last one first", parts[::-1], whole)
    like(m, "one part alone", [whole], whole)
    like(m, "a part without keys behind another", [whole, NOTHING], whole)
    like(m, "a part without keys before another", [NOTHING, whole], whole)
    like(m, "no part has keys", [NOTHING, NOTHING], ([0.0, 0.0], -inf))
    far = [(o, lse + 1000) for o, lse in (over(range(3)), over(range(3, 6)))]
    like(m, "scores that are 1000 larger", far, (whole[0], whole[1] + 1000))
    low = [(o, lse - 1000) for o, lse in (over(range(3)), over(range(3, 6)))]
    like(m, "scores that are 1000 smaller", low, (whole[0], whole[1] - 1000))


def over(keys: range) -> tuple[list[float], float]:
    """Attention over these keys alone."""
    total = sum(exp(SCORES[i]) for i in keys)
    return [sum(exp(SCORES[i]) * VALUES[i][j] for i in keys) / total for j in range(2)], log(total)


def like(m: ModuleType, what: str, parts: list, want: tuple[list[float], float]) -> None:
    before = [(list(o), lse) for o, lse in parts]
    o, lse = ask(m.merge, before, why="o, lse", several=2)
    try:
        got = [float(x) for x in o], float(lse)
    except (TypeError, ValueError):
        got = o, lse
    right = got == want or (
        isinstance(got[0], list)
        and len(got[0]) == len(want[0])
        and all(
            isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
            for a, b in zip([*got[0], got[1]], [*want[0], want[1]], strict=True)
        )
    )
    if not right:
        expect(f"{what}: o, lse", got, want)
