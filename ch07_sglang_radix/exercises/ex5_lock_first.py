"""Exercise 5: The lock that was forgotten (20 minutes).

Read  ch07_sglang_radix/prefill_adder.py, _reserve; ch07_sglang_radix/request_memory.py, admit and grow
Edit  this file
Test  python -m ch07_sglang_radix.exercises.check 5

A request has found a prefix in the tree and wants to get in. Its slots in the row would be the prefix's, and `grow`
will take pages for all the rest, evicting whatever nobody has locked. Two things go wrong if this is done in the
wrong order: the request's own prefix is evicted under its feet, or it counts the pages of that prefix among those
that eviction can give it.

The rule: a request gets in if slots for its whole answer, req.max_len tokens in whole pages, less those of the
prefix, can be had besides what was promised to others. obtainable_slots says how many can be had: those free and
those in unlocked nodes. Give it its row with memory.admit and keep its path locked, or leave everything as it was.

    memory     RequestMemory: tree, obtainable_slots(), whole_pages(tokens), admit(req, match)
    match      of match_prefix: slots and last_node; not yet locked
    returns    whether it got in
"""

from ch07_sglang_radix.radix_cache import MatchResult
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.request_memory import RequestMemory


def reserve(memory: RequestMemory, req: Req, match: MatchResult, promised: float) -> bool:
    raise NotImplementedError  # your turn
