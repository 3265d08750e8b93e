"""Solution of exercise 5: A group on two ranks."""

from collections.abc import Callable


def columns(
    read_words: Callable[[int, int], list[int]], read_scales: Callable[[int, int], list[float]], size: int,
    start: int, stop: int,
) -> list[float]:  # fmt: skip
    word, group = start // 8, start // size
    words, scales = read_words(word, (stop + 7) // 8), read_scales(group, -(-stop // size))
    numbers = []
    for i in range(start, stop):
        code = (words[i // 8 - word] >> 4 * (i % 8) & 15) - 8
        numbers.append(code * scales[i // size - group])
    return numbers
