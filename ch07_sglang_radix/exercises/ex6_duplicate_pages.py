"""Exercise 6: The duplicate page that is freed too early (40 minutes).

Read  "Pages and pools" and "The life of a request" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.exercises.check 6

Two requests with the same beginning were computed in one step, each on pages of its own. Both hand what they have
to the tree. The first leaves its pages there. For the second the tree has the tokens already: its own pages are
duplicates. They should be freed, and it goes on with the tree's.

Write that hand-over. The row of the request, `tree.req_to_token.req_to_token[req.row]`, reads from the left:

    0 .. req.prefix_len    slots of the tree, on the path that ends at req.last_node, which is locked
    .. req.kv_len          its own slots, with K and V in them
    0 .. req.sent_len      slots that are known to the page table of every rank

Afterwards all its whole pages are the tree's: prefix_len and last_node say so, the new path is locked and the old
lock is gone. A real bug hides in the last line of the table (mini-sglang PR 142): the ranks are told about pages
from sent_len on, and about nothing before it.

    tree    insert(ids, row) takes over what it has not got, and returns how many of the tokens it had before;
            match_prefix(ids) -> slots, last_node; inc_lock_ref(node), dec_lock_ref(node); pool.free(slots)
    req     its tokens so far are req.all_ids[: req.kv_len]

    pages of 2, six tokens of its own in the slots 12 .. 17, of which the tree had four in 4 .. 7: 12 .. 15 are freed, the
    row begins 4 5 6 7 16 17, prefix_len is 6, and sent_len at most 0
"""

from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.request import Req


def cache_unfinished_req(tree: RadixCache, req: Req) -> None:
    raise NotImplementedError  # your turn
