"""Solution of exercise 1: One token more."""

from collections.abc import Sequence


def keep(guesses: Sequence[int], drawn: Sequence[int]) -> list[int]:
    right = 0
    while right < len(guesses) and guesses[right] == drawn[right]:
        right += 1
    return list(drawn[: right + 1])


def into(answer: Sequence[int], kept: Sequence[int], most: int, ends: set[int]) -> list[int]:
    grown = list(answer)
    for token in kept:
        if len(grown) == most:
            break
        grown.append(token)
        if token in ends:
            break
    return grown
