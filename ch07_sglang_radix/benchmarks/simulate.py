"""What the radix cache would hit on a recorded trace, without a model.

Traces are those of traces.py. A hash id of theirs, a block of 512 prompt tokens, is a key of one token on a page of its own
here, so the tree that serves the engine answers for the trace as well:

    request  1 2 3      hits 0    tree  1 2 3
    request  1 2 4      hits 2    tree  1 2 -> 3 | 4
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from tqdm import tqdm

from ch07_sglang_radix.eviction import STRATEGIES
from ch07_sglang_radix.memory_pool import TokenToKVPool
from ch07_sglang_radix.radix_cache import RadixCache


@dataclass
class Counts:
    """In blocks, over all requests; hit_rate = hit_blocks / prompt_blocks."""

    requests: int = 0
    prompt_blocks: int = 0
    hit_blocks: int = 0
    hit_rate: float = 0.0
    evicted_blocks: int = 0
    eviction: str = "lru"
    capacity_blocks: int = 0

    def as_dict(self) -> dict:
        return asdict(self)


class BlockCache:
    """The radix tree over `capacity` blocks, asked request by request. eviction: see eviction.py."""

    def __init__(self, capacity: int, eviction: str = "lru"):
        if eviction not in STRATEGIES:
            raise ValueError(f"eviction={eviction!r} is unknown; use {', '.join(STRATEGIES)}")
        self.capacity = capacity
        self.pool = TokenToKVPool(num_pages=capacity, page_size=1)
        self.tree = RadixCache(self.pool, eviction=eviction)

    def serve(self, ids: Sequence[int]) -> int:
        """How many leading blocks are there; afterwards all are, or as many of the first as fit."""
        match = self.tree.match_prefix(ids)
        hits, kept = len(match.slots), min(len(ids), self.capacity)
        self.tree.inc_lock_ref(match.last_node)  # what is matched must outlive the eviction
        lacking = kept - hits - self.pool.num_free_pages
        if lacking > 0:
            self.tree.evict(lacking)
        new = self.pool.alloc(kept - hits)
        self.tree.insert(ids[:kept], np.concatenate([match.slots, new]))  # counts as a use even where nothing is new
        self.tree.dec_lock_ref(match.last_node)
        return hits


def simulate(requests: Sequence[Sequence[int]], capacity_blocks: int = 0, eviction: str = "lru") -> Counts:
    """Serve the hash ids of each request in order. capacity_blocks = 0: nothing is ever evicted.

    Raises ValueError for a negative capacity and an unknown strategy.
    """
    if capacity_blocks < 0:
        raise ValueError(f"capacity_blocks={capacity_blocks} must be at least 0; 0 is no limit")
    prompt = sum(map(len, requests))
    cache = BlockCache(capacity_blocks or prompt, eviction)  # no more distinct blocks than blocks
    hits = sum(map(cache.serve, tqdm(requests, desc="simulate", unit="request", leave=False, disable=None)))
    rate = hits / prompt if prompt else 0.0
    return Counts(len(requests), prompt, hits, rate, cache.tree.evicted, eviction, capacity_blocks)
