from math import log
from types import ModuleType

from ch07_sglang_radix.experts.exercises.checks.routing import like

FIVE_THREE_TWO = [log(5), log(3), log(2)]


def check(m: ModuleType) -> None:
    for logits, k, normalise, want in (
        (FIVE_THREE_TWO, 2, False, [(0, 0.5), (1, 0.3)]),
        (FIVE_THREE_TWO, 2, True, [(0, 0.625), (1, 0.375)]),
        (FIVE_THREE_TWO[::-1], 2, False, [(2, 0.5), (1, 0.3)]),
        (FIVE_THREE_TWO, 1, False, [(0, 0.5)]),
        (FIVE_THREE_TWO, 1, True, [(0, 1.0)]),
        (FIVE_THREE_TWO, 3, True, [(0, 0.5), (1, 0.3), (2, 0.2)]),
        ([log(2), log(4), log(4), log(2), log(4)], 3, False, [(1, 0.25), (2, 0.25), (4, 0.25)]),
        ([1000 + log(3), 1000.0], 1, False, [(0, 0.75)]),
        ([-1000.0, -1000 + log(3)], 1, False, [(1, 0.75)]),
    ):
        shown = ", ".join(f"{logit:.2f}" for logit in logits)
        like(f"route([{shown}], {k}, normalise={normalise})", m.route, (list(logits), k, normalise), want)
