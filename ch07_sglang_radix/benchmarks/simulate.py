"""What the radix cache would hit on a recorded trace, without a model.

A trace is JSON lines, one request each, in the form of Mooncake's published traces (Qin et al. 2025):

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2353]}

A hash id stands for 512 prompt tokens and for everything before them: equal ids are equal prefixes up to there. Here an
id is a key of one token on a page of its own, so the tree that serves the engine answers for the trace as well:

    request  1 2 3      hits 0    tree  1 2 3
    request  1 2 4      hits 2    tree  1 2 -> 3 | 4
"""

import json
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ch07_sglang_radix.eviction import STRATEGIES
from ch07_sglang_radix.memory_pool import TokenToKVPool
from ch07_sglang_radix.radix_cache import RadixCache

FORM = '{"timestamp": 0, "input_length": 700, "output_length": 20, "hash_ids": [1, 2]}'


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


def read_trace(path: str | Path) -> list[list[int]]:
    """The hash ids of each request, in order of timestamp; requests of equal timestamp in the order of the file.

    Raises ValueError, with file and line, for a line that is no request of that form, and OSError for a missing file.
    """
    with open(path, "rb") as file:
        lines = tqdm(file, desc="read", unit="line", leave=False, disable=None)
        requests = list(_requests(path, lines))
    if not requests:
        raise ValueError(f"{path}: no request in it; expected lines like {FORM}")
    return [ids for _, ids in sorted(requests, key=lambda request: request[0])]


def _requests(path: str | Path, lines: Iterable[bytes]) -> Iterable[tuple[float, list[int]]]:
    """(timestamp, hash ids) of each line that is not blank."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):  # no JSON, no UTF-8
            fields = None
        wrong = _what_is_wrong(fields)
        if wrong:
            raise ValueError(f"{path}, line {number}: {wrong}; expected a line like {FORM}")
        yield fields["timestamp"], fields["hash_ids"]


def _what_is_wrong(fields: object) -> str | None:
    """In a few words, or None."""
    if not isinstance(fields, dict):
        return "not a JSON object"
    for name, (holds, form) in FIELDS.items():
        if name not in fields:
            return f"{name} is missing"
        if not holds(fields[name]):
            return f"{name}={reprlib.repr(fields[name])} is not {form}"
    return None


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < float("inf")  # a bool is no number here


def _is_whole(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63  # the tree compares int64


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "timestamp": (_is_time, "a number"),
    "input_length": (_is_whole, "a whole number of tokens"),
    "output_length": (_is_whole, "a whole number of tokens"),
    "hash_ids": (_are_ids, "a list of whole numbers from 0 to 2^63 - 1"),
}
