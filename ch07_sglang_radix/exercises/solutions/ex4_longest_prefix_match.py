"""Solution of exercise 4: Longest prefix match, and who should wait."""

import numpy as np

from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.request import Req


def shared_length(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    return int((a[:n] == b[:n]).cumprod().sum())


def lpm(waiting: list[Req], tree: RadixCache) -> list[Req]:
    if len(waiting) > 128:
        return list(waiting)
    ahead: list[np.ndarray] = []  # what those who go ahead will compute
    rank: dict[Req, float] = {}
    for req in waiting:
        ids = req.all_ids
        matched = len(tree.match_prefix(ids).slots)
        follows = matched <= 32 and any(shared_length(ids, other) >= 32 for other in ahead)
        if matched <= 32 and not follows:
            ahead.append(ids)
        rank[req] = (
            float("inf") if follows else -min(matched, len(ids) - 1)
        )  # one rank for all who wait: sorting keeps their order
    return sorted(waiting, key=rank.__getitem__)
