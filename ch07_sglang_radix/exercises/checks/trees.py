"""Trees, requests and their memory, without a model."""

from ch07_sglang_radix.memory_pool import ReqToTokenPool, TokenToKVPool
from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.request_memory import RequestMemory
from common.sampling.params import SamplingParams


def tree_with(*keys: list[int], tree: RadixCache) -> RadixCache:
    """Leave `keys` to the tree, on pages of its pool."""
    for key in keys:
        slots = tree.pool.alloc(-(-len(key) // tree.page_size))
        tree.pool.free(slots[: tree.insert(key, slots)])
    return tree


def a_req(rid: int, prompt: list[int], max_new_tokens: int = 4, **fields) -> Req:
    return Req(rid, None, prompt, SamplingParams(max_new_tokens=max_new_tokens), 0, **fields)


def memory_of(num_pages: int, *cached: list[int]) -> RequestMemory:
    """Pages of two tokens, four rows, and a tree that holds `cached`."""
    pool, rows = TokenToKVPool(num_pages=num_pages, page_size=2), ReqToTokenPool(4, 64)
    return RequestMemory(pool, rows, tree_with(*cached, tree=RadixCache(pool, rows)))
