"""Exercise 11: Attention by page ids (25 minutes).

Read  "Pages and pools" and "A task on the wire" in the chapter; Kwon et al. 2023 (PagedAttention), section 4.1
Edit  this file
Test  python -m ch07_sglang_radix.exercises.check 11

A rank is told page ids, and nothing else about where a sequence's K and V lie. Attend to them: one sequence that
decodes, one new token, whose K and V have been written already. Query heads come in groups of Hq / Hkv neighbours that
share a KV head. Three real traps: pages come in the order of the sequence, not of their numbers; the last page is full
only sometimes, and what its last owner left in the other slots, NaN included, counts for nothing; a row of the page table
is wider than the sequence, and behind its last page stands anything, -1 too.

    q          [Hq, d], positions are in it
    k, v       [num_pages, P, Hkv, d]: the whole pool of this rank
    pages      int64 [max_pages]: a row of the page table
    length     tokens of the sequence, the new one included; at least 1
    returns    [Hq, d]: softmax(q k^T / sqrt(d)) v, for each head over the tokens 0 .. length-1

    P = 4, pages [7, 2, -1], length 6: the tokens lie in k[7, 0], k[7, 1], k[7, 2], k[7, 3], k[2, 0], k[2, 1]
"""

import numpy as np


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, pages: np.ndarray, length: int) -> np.ndarray:
    raise NotImplementedError  # your turn
