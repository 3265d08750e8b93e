"""Solution of exercise 4: Who sees whom."""

from collections.abc import Sequence


def tree_mask(parents: Sequence[int]) -> list[list[bool]]:
    mask: list[list[bool]] = []
    for node, parent in enumerate(parents):
        row = list(mask[parent]) if parent >= 0 else [False] * len(parents)
        row[node] = True
        mask.append(row)
    return mask


def seen(parents: Sequence[int], cached: int, node: int) -> list[int]:
    own = [cached + other for other, sees in enumerate(tree_mask(parents)[node]) if sees]
    return [*range(cached), *own]
