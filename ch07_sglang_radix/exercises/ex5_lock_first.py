"""Exercise 5: The lock that was forgotten (15 minutes).

Read  "The radix tree" and "The life of a request" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.exercises.check 5

A request has found a prefix in the tree and wants to get in. Its slots in the row would be the prefix's, and pages will
be taken for all the rest, evicting whatever nobody has locked. Two things go wrong if this is done in the
wrong order: the request's own prefix is evicted under its feet, or it counts the pages of that prefix among those
that eviction can give it.

The rule: a request gets in if slots for its whole answer, req.max_len tokens in whole pages, less those of the
prefix, can be had besides what was promised to others. obtainable_slots says how many can be had: those free and
those in unlocked nodes. Give it its row with memory.admit and keep its path locked, or leave everything as it was.

    memory      tree, obtainable_slots(), whole_pages(tokens), admit(req, match)
    tree        inc_lock_ref(node) locks the path from node to the root, dec_lock_ref(node) undoes that once
    match       slots of the cached prefix, and last_node, where it ends; not yet locked
    promised    slots
    returns     whether it got in

    pages of 2, 3 free, a prefix of 8 slots in the tree and nothing else; max_len 16: 8 more are needed, 6 can be had,
    and not 14: it does not get in
"""

from ch07_sglang_radix.radix_cache import MatchResult
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.request_memory import RequestMemory


def reserve(memory: RequestMemory, req: Req, match: MatchResult, promised: float) -> bool:
    raise NotImplementedError  # your turn
