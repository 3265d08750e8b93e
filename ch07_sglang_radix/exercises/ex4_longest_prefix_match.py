"""Exercise 4: Longest prefix match, and who should wait (30 minutes).

Read  ch07_sglang_radix/schedule_policy.py, _lpm
Edit  this file
Test  python -m ch07_sglang_radix.exercises.check 4

Order the queue: the request with the most tokens in the tree first, equals as they came. One rule more: where
several requests share a beginning that nobody has computed, one goes ahead and the others go to the back, so that
they find it in the tree a step later. A request goes to the back if

    - at most 32 of its tokens are in the tree, and
    - it shares at least 32 leading tokens with an earlier request of the queue that has at most 32 in the tree
      itself and does not go to the back.

Those at the back keep the order in which they came: SGLang gives them all the same last rank. A request whose
tokens (req.all_ids) are all in the tree still has to compute the last one: for the order it has found one less. With
more than 128 requests matching costs more than it brings: then all stay as they came.

    waiting    the queue, the oldest first; must stay as it is
    tree       the radix tree, pages of one token; tree.match_prefix(ids).slots are the tokens found
    returns    a list of the same requests in the order in which they should try to get in
"""

from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.request import Req


def lpm(waiting: list[Req], tree: RadixCache) -> list[Req]:
    raise NotImplementedError  # your turn
