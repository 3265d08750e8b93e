"""(what stands in for the solution's functions, words that the checker must say) of plausible wrong answers."""

from math import ceil, floor, sqrt

from ch07_sglang_radix.images.exercises.solutions import ex1_whole_blocks as right


def halves_up(height, width, factor, low, high):
    new = tuple(floor(side / factor + 0.5) * factor for side in (height, width))
    return new if low <= new[0] * new[1] <= high else right.smart_resize(height, width, factor, low, high)


def never_too_large(height, width, factor, low, high):
    return right.smart_resize(height, width, factor, low, 1 << 40)


def never_too_small(height, width, factor, low, high):
    return right.smart_resize(height, width, factor, 0, high)


def rounded_when_shrunk(height, width, factor, low, high):
    new = right.smart_resize(height, width, factor, low, 1 << 40)
    if new[0] * new[1] <= high:
        return new
    b = sqrt(height * width / high)
    return tuple(max(factor, ceil(side / b / factor) * factor) for side in (height, width))


def down_when_grown(height, width, factor, low, high):
    new = right.smart_resize(height, width, factor, 0, high)
    if new[0] * new[1] >= low:
        return new
    b = sqrt(low / (height * width))
    return tuple(max(factor, floor(side * b / factor) * factor) for side in (height, width))


def of_the_rounded(height, width, factor, low, high):
    new = round(height / factor) * factor, round(width / factor) * factor
    if new[0] * new[1] > high:
        b = sqrt(new[0] * new[1] / high)
        return tuple(max(factor, floor(side / b / factor) * factor) for side in new)
    return right.smart_resize(height, width, factor, low, high)


def to_nothing(height, width, factor, low, high):
    b = sqrt(height * width / high)
    new = right.smart_resize(height, width, factor, low, 1 << 40)
    return new if new[0] * new[1] <= high else tuple(floor(side / b / factor) * factor for side in (height, width))


def turned(height, width, factor, low, high):
    return right.smart_resize(height, width, factor, low, high)[::-1]


def any_shape(height, width, factor, low, high):
    return right.smart_resize(height, width, factor, low, high) if (height, width) != (10, 2001) else (28, 2016)


WRONG = [
    ({"smart_resize": halves_up}, "wanted (56, 56)"),
    ({"smart_resize": never_too_large}, "smart_resize(3000, 4000"),
    ({"smart_resize": never_too_small}, "smart_resize(20, 20"),
    ({"smart_resize": rounded_when_shrunk}, "wanted (840, 1148)"),
    ({"smart_resize": down_when_grown}, "wanted (56, 112)"),
    ({"smart_resize": to_nothing}, "wanted (28, 3108)"),
    ({"smart_resize": turned}, "got (644, 476), wanted (476, 644)"),
    ({"smart_resize": any_shape}, "wanted ValueError"),
]
