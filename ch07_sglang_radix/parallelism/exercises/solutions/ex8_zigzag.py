"""Solution of exercise 8: Equal work."""


def zigzag(n: int, ranks: int) -> list[list[int]]:
    runs = [[*range(n * j // (2 * ranks), n * (j + 1) // (2 * ranks))] for j in range(2 * ranks)]
    return [runs[i] + runs[2 * ranks - 1 - i] for i in range(ranks)]


def pairs(n: int, ranks: int, mine: int, theirs: int) -> int:
    held = zigzag(n, ranks)
    return sum(key <= query for query in held[mine] for key in held[theirs])
