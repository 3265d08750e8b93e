"""Exercise 4: Longest prefix match, and who should wait (25 minutes).

Read  "Schedule policies" in the chapter; Zheng et al. 2024 (SGLang), section 3, cache-aware scheduling
Edit  this file
Test  python -m ch07_sglang_radix.exercises.check 4

Order the queue as SGLang 0.5 does: the request with the most tokens in the tree first, equals as they came. One rule
more: where several requests share a beginning that nobody has computed, one goes ahead and the others go to the back,
so that they find it in the tree a step later. A request goes to the back if

    - at most 32 of its tokens are in the tree, and
    - it shares at least 32 leading tokens with an earlier request of the queue that has at most 32 in the tree
      itself and does not go to the back.

All that go to the back have the same, last rank: among themselves they stay as they came, however much of them is in the
tree. A request's tokens are req.all_ids. One that is in the tree as a whole still has to compute its last token: for the
order in front it has found one less. With more than 128 requests in the queue matching costs more than it brings: then
all stay as they came.

    waiting    the queue, the oldest first; must stay as it is
    tree       the radix tree, pages of one token; tree.match_prefix(ids).slots are the tokens found
    returns    a list of the same requests in the order in which they should try to get in

    nothing in the tree; A B C begin with the same 50 tokens, D with others: A D B C
"""

from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.request import Req


def lpm(waiting: list[Req], tree: RadixCache) -> list[Req]:
    raise NotImplementedError  # your turn
