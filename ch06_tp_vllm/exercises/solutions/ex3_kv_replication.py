"""Solution of exercise 3: Which KV heads a rank holds."""


def kv_heads_of(rank: int, num_ranks: int, num_q: int, num_kv: int) -> list[int]:
    per_rank, group = num_q // num_ranks, num_q // num_kv
    mine = range(rank * per_rank, (rank + 1) * per_rank)  # query heads of this rank
    return sorted({head // group for head in mine})
