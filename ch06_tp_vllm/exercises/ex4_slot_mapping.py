"""Exercise 4: Slots of new tokens (5 minutes).

Read  "The KV cache" and "Blocks" in the chapter; Kwon et al. 2023 (PagedAttention), section 4.3
Edit  this file
Test  python -m ch06_tp_vllm.exercises.check 4

A sequence's tokens lie in blocks of P slots, in the order of its block table; slot = block * P + offset.
Where do the tokens start .. stop-1 go, for any start, in the middle of a block too?

    block_table    block ids, enough for `stop` tokens
    returns        stop - start slots, in order

    block_table [7, 3], blocks of 4, tokens 2 .. 5: slots 30, 31, 12, 13
"""


def slot_mapping(block_table: list[int], start: int, stop: int, block_size: int) -> list[int]:
    raise NotImplementedError  # your turn
