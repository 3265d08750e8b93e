"""Solution of exercise 1: Whole blocks."""

from math import ceil, floor, sqrt


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"a picture of {width}x{height} is too long for its width")
    new = round(height / factor) * factor, round(width / factor) * factor
    if new[0] * new[1] > max_pixels:
        b = sqrt(height * width / max_pixels)
        return tuple(max(factor, floor(side / b / factor) * factor) for side in (height, width))
    if new[0] * new[1] < min_pixels:
        b = sqrt(min_pixels / (height * width))
        return tuple(ceil(side * b / factor) * factor for side in (height, width))
    return new
