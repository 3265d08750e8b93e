"""Solution of exercise 4: Heads re-cut."""


def slices(held: list[list[int]], wanted: list[int]) -> dict[int, list[tuple[int, list[int]]]]:
    found: dict[int, list[tuple[int, list[int]]]] = {}
    for head in dict.fromkeys(wanted):
        source = next(rank for rank, heads in enumerate(held) if head in heads)
        places = [place for place, one in enumerate(wanted) if one == head]
        found.setdefault(source, []).append((held[source].index(head), places))
    return found
