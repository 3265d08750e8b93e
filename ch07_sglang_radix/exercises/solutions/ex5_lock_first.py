"""Solution of exercise 5: The lock that was forgotten."""

from ch07_sglang_radix.radix_cache import MatchResult
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.request_memory import RequestMemory


def reserve(memory: RequestMemory, req: Req, match: MatchResult, promised: float) -> bool:
    memory.tree.inc_lock_ref(match.last_node)  # before counting: what it uses itself, eviction cannot give it
    needed = memory.whole_pages(req.max_len) - len(match.slots)
    if needed > memory.obtainable_slots() - promised:
        memory.tree.dec_lock_ref(match.last_node)
        return False
    memory.admit(req, match)
    return True
