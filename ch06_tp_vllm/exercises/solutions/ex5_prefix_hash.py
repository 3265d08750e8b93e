"""Solution of exercise 5: Hash a block, find a prefix."""

from collections.abc import Hashable


def block_hashes(tokens: list[int], block_size: int) -> list[Hashable]:
    hashes: list[Hashable] = []
    for i in range(len(tokens) // block_size):
        parent = hashes[-1] if hashes else None  # a block counts together with all that came before it
        hashes.append((parent, tuple(tokens[i * block_size : (i + 1) * block_size])))
    return hashes


def computed_tokens(tokens: list[int], cached: set[Hashable], block_size: int) -> int:
    hits = 0
    for name in block_hashes(tokens, block_size)[
        : (len(tokens) - 1) // block_size
    ]:  # the last token is always computed
        if name not in cached:
            break
        hits += 1
    return hits * block_size
