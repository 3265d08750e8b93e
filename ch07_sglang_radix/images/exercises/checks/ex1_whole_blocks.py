from types import ModuleType

from common.teaching.expect import ask, expect

LOW, HIGH = 56 * 56, 28 * 28 * 1280


def check(m: ModuleType) -> None:
    for height, width, low, high, want in (
        (480, 640, LOW, HIGH, (476, 644)),
        (56, 84, LOW, HIGH, (56, 84)),
        (70, 42, 28 * 28, HIGH, (56, 56)),
        (3000, 4000, LOW, HIGH, (840, 1148)),
        (1080, 1920, LOW, HIGH, (728, 1316)),
        (20, 20, LOW, HIGH, (56, 56)),
        (30, 100, LOW, HIGH, (28, 112)),
        (20, 60, LOW, HIGH, (56, 112)),
        (15, 2900, LOW, 28 * 28 * 64, (28, 3108)),
        (2900, 15, LOW, 28 * 28 * 4, (756, 28)),
    ):
        got = ask(m.smart_resize, height, width, 28, low, high, why="(height, width)")
        expect(f"smart_resize({height}, {width}, 28, {low}, {high})", got, want)
    try:
        got = m.smart_resize(10, 2001, 28, LOW, HIGH)
    except ValueError:
        return
    raise AssertionError(
        f"smart_resize(10, 2001, 28, {LOW}, {HIGH}): got {got}, wanted ValueError: 200 times is the most"
    )
