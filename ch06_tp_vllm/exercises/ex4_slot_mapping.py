"""Exercise 4: Slots of new tokens (10 minutes).

Read  ch06_tp_vllm/block_manager.py, the drawing at its top; ch06_tp_vllm/demo_7_block_manager.py
Edit  this file
Test  python -m ch06_tp_vllm.exercises.check 4

A sequence's tokens lie in blocks of P slots, in the order of its block table; slot = block * P + offset.
Where do the tokens start .. stop-1 go, for any start, in the middle of a block too?

    block_table    block ids, enough for `stop` tokens
    returns        stop - start slots
"""


def slot_mapping(block_table: list[int], start: int, stop: int, block_size: int) -> list[int]:
    raise NotImplementedError  # your turn
