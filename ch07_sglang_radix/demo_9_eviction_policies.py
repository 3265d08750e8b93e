"""Eviction strategies side by side: which one is right depends on who comes back.

    python ch07_sglang_radix/demo_9_eviction_policies.py

Prompts of 4 pages, a cache that holds 8 of them, no model. Three patterns of use:

    hot + scans   four prompts that come again and again, between them long runs of prompts that come once
    loop          ten prompts in a circle: two more than fit
    shift         prompts of unequal popularity, and every 300 requests others are the popular ones

`priority` goes by what the caller says of a request; here the caller knows the hot prompts of the first phase, and no
more. The last line knows the future: it throws out what will not be used for the longest time.
"""

import random

from ch07_sglang_radix.eviction import STRATEGIES
from ch07_sglang_radix.memory_pool import TokenToKVPool
from ch07_sglang_radix.radix_cache import RadixCache
from common.distributed.launch import run_main
from common.teaching.show import check, heading, table

PAGE_SIZE, PAGES, FITS = 4, 4, 8
HOT = range(4)
KNOWS = "knows the future"


def main() -> None:
    patterns = {"hot + scans": hot_and_scans(), "loop": loop(), "shift": shifting()}
    rates = {name: [hit_rate(name, uses) for uses in patterns.values()] for name in STRATEGIES}
    rates[KNOWS] = [best_rate(uses) for uses in patterns.values()]
    heading(f"Hit rate in %, a cache for {FITS} prompts")
    table(("", *patterns), [(name, *(round(100 * rate) for rate in row)) for name, row in rates.items()])
    for i, pattern in enumerate(patterns):
        best = max(rates[name][i] for name in STRATEGIES)
        print(f"  {pattern}: best {', '.join(name for name in STRATEGIES if rates[name][i] > best - 0.01)}")
    lru, lfu, fifo, mru, slru, priority = (rates[name] for name in ("lru", "lfu", "fifo", "mru", "slru", "priority"))
    check("a scan washes the hot prompts out of lru and fifo; lfu, slru and priority keep them",
          max(lru[0], fifo[0]) < min(lfu[0], slru[0], priority[0]) - 0.15)  # fmt: skip
    check("in a loop lru and fifo throw out exactly what comes next, and never hit", lru[1] == fifo[1] == 0)
    check("mru keeps most of the loop", mru[1] > 0.7)
    check("mru is the worst where popularity shifts: what is old stays", mru[2] == min(r[2] for r in rates.values()))
    check("lfu holds on to what was popular once", lfu[2] < lru[2])
    behind = {
        name: max(max(rates[other][i] for other in STRATEGIES) - rates[name][i] for i in range(len(patterns)))
        for name in STRATEGIES
    }
    check("each is at least 25 points behind another somewhere: there is no best one", min(behind.values()) > 0.25)
    check("and none beats the future", all(rates[KNOWS][i] >= max(r[i] for r in rates.values()) for i in range(3)))


# --- patterns: which prompt is used, by number


def hot_and_scans() -> list[int]:
    rng, uses, once = random.Random(0), [], 100
    for _ in range(60):
        uses += rng.choices(HOT, k=8)
        uses += range(once, once + 10)  # longer than the cache
        once += 10
    return uses


def loop() -> list[int]:
    return list(range(FITS + 2)) * 100


def shifting() -> list[int]:
    rng, uses = random.Random(0), []
    for phase in range(4):
        names = [100 * phase + i for i in range(20)] if phase else list(range(20))
        uses += rng.choices(names, weights=[1 / (i + 1) ** 1.2 for i in range(20)], k=300)
    return uses


# --- what a request does to the cache


def hit_rate(strategy: str, uses: list[int]) -> float:
    """Tokens found over tokens asked for, the requests one after the other."""
    pool = TokenToKVPool(num_pages=PAGES * FITS, page_size=PAGE_SIZE)
    tree = RadixCache(pool, eviction=strategy)
    found = 0
    for prompt in uses:
        ids = [prompt] * (PAGES * PAGE_SIZE)
        important = int(prompt in HOT)
        match = tree.match_prefix(ids)
        found += len(match.slots)
        slots = match.slots
        if len(slots) == 0:
            if pool.num_free_pages < PAGES:
                tree.evict(len(ids))
            slots = pool.alloc(PAGES)
        tree.insert(ids, slots, priority=important)  # a hit too: an insertion counts as a use
        if pool.free_slots + tree.evictable_size != pool.size:
            raise SystemExit("check failed: a slot is lost or has two owners")
    return found / (len(uses) * PAGES * PAGE_SIZE)


def best_rate(uses: list[int]) -> float:
    """Belady 1966: throw out what is used again last, or never."""
    next_use, coming = [0] * len(uses), {}
    for at in range(len(uses) - 1, -1, -1):
        next_use[at] = coming.get(uses[at], len(uses))
        coming[uses[at]] = at
    cache: dict[int, int] = {}  # prompt -> when it is used again
    hits = 0
    for at, prompt in enumerate(uses):
        hits += prompt in cache
        if prompt not in cache and len(cache) == FITS:
            del cache[max(cache, key=cache.__getitem__)]
        cache[prompt] = next_use[at]
    return hits / len(uses)


if __name__ == "__main__":
    run_main(main)
