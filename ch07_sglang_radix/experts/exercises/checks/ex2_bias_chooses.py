from types import ModuleType

from ch07_sglang_radix.experts.exercises.checks.routing import like
from common.teaching.expect import ask, expect

SCORES = [0.8, 0.6, 0.2]
NUDGES = (
    (([0.5, 0.0, 0.0], [9, 4, 5], 0.25), [0.25, 0.25, 0.25]),
    (([1.0, 1.0, 1.0], [6, 6, 6], 0.5), [1.0, 1.0, 1.0]),
    (([0.0, 0.0, 0.0], [90, 6, 0], 0.5), [-0.5, 0.5, 0.5]),  # the mean is 32
    (([-1.0, 2.0], [0, 2], 0.125), [-0.875, 1.875]),
)


def check(m: ModuleType) -> None:
    for scores, bias, k, scaling, want in (
        (SCORES, [0.0, 0.0, 0.9], 2, 2.5, [(2, 0.5), (0, 2.0)]),
        (SCORES, [0.0, 0.0, 0.0], 2, 1.0, [(0, 8 / 14), (1, 6 / 14)]),
        (SCORES, [-0.5, 0.0, 0.0], 1, 1.0, [(1, 1.0)]),
        (SCORES, [0.0, 0.5, 0.9], 3, 1.0, [(1, 0.375), (2, 0.125), (0, 0.5)]),
        ([0.5, 0.25, 0.25], [-0.25, 0.0, 0.0], 2, 3.0, [(0, 2.0), (1, 1.0)]),  # all three choose alike
        ([0.5, 0.5], [-7.0, -8.0], 1, 2.5, [(0, 2.5)]),
    ):
        like(f"choose({scores}, {bias}, {k}, {scaling})", m.choose, (list(scores), list(bias), k, scaling), want)
    for (bias, load, step), want in NUDGES:
        expect(f"nudge({bias}, {load}, {step})", ask(m.nudge, list(bias), list(load), step), want)
