"""Solution of exercise 4: Which way a scale is cut."""


def part(
    strategy: str, sizes: tuple[int, int], shape: tuple[int, int], cut: str, rank: int, ranks: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    held = [(0, shape[0]), (0, shape[1])]
    axis = 0 if cut == "column" else 1
    share = shape[axis] // ranks
    held[axis] = (rank * share, (rank + 1) * share)
    sharing = {"tensor": shape, "channel": (1, shape[1])}.get(strategy, sizes)
    rows, columns = ((first // size, -(-last // size)) for (first, last), size in zip(held, sharing, strict=True))
    return rows, columns
