"""Exercise 3: Which KV heads a rank holds (10 minutes).

Read  "Heads and the MLP" in the chapter; Ainslie et al. 2023 (grouped-query attention), section 2
Edit  this file
Test  python -m ch06_tp_vllm.exercises.check 3

Query heads come in groups of Hq / Hkv neighbours that share a KV head. Query heads are cut evenly, rank 0 has
the first Hq / R. A rank needs the KV heads of its query heads, no others.

    num_q, num_kv    Hq and Hkv; R divides Hq, and of R and Hkv one divides the other
    returns          the KV heads that `rank` holds, in order; with more ranks than KV heads a list of one

    8 query and 2 KV heads: on 2 ranks [0] and [1]; on 4 ranks [0], [0], [1], [1]
"""


def kv_heads_of(rank: int, num_ranks: int, num_q: int, num_kv: int) -> list[int]:
    raise NotImplementedError  # your turn
