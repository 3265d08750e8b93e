"""Exercise 12: How many blocks fit (10 minutes).

Read  "The KV cache" in the chapter
Edit  this file
Test  python -m ch06_tp_vllm.exercises.check 12

A block holds K and V of `block_size` tokens, in every layer, for the KV heads of one rank. How many go into the memory
that is free? The ranks have not equally much of it, and a block id must mean the same block on all of them.

    free_bytes      of each rank, a list of R numbers
    num_kv_heads    of the model; with more ranks than KV heads each rank holds one (a copy). One of the two divides
                    the other
    bytes_each      of one number: 2 for bfloat16
    returns         blocks, a whole number, the same on every rank

    1000 and 700 bytes free, blocks of 2, 3 layers, 4 KV heads of 5, 2 bytes each: a block is 240 bytes on each of the
    2 ranks, and 2 of them fit
"""


def num_blocks(
    free_bytes: list[int], block_size: int, num_layers: int, num_kv_heads: int, head_dim: int, bytes_each: int
) -> int:
    raise NotImplementedError  # your turn
