"""Solution of exercise 6: The duplicate page that is freed too early."""

from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.request import Req


def cache_unfinished_req(tree: RadixCache, req: Req) -> None:
    ids = req.all_ids[: req.kv_len]
    row = tree.req_to_token.req_to_token[req.row]
    known = tree.insert(ids, row)
    if known > req.prefix_len:  # up to prefix_len they are the tree's own
        tree.pool.free(row[req.prefix_len : known])
        req.sent_len = min(req.sent_len, req.prefix_len)  # the ranks still read from the pages that are free now
    match = tree.match_prefix(ids)
    row[: len(match.slots)] = match.slots
    tree.inc_lock_ref(match.last_node)  # before the old lock goes: the path is safe at every moment
    tree.dec_lock_ref(req.last_node)
    req.last_node, req.prefix_len = match.last_node, len(match.slots)
