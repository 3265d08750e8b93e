"""Exercise 6: Free what several requests hold (15 minutes).

Read  ch06_tp_vllm/block_manager.py, free and _take
Edit  this file
Test  python -m ch06_tp_vllm.exercises.check 6

A request ends. Some of its blocks are held by others too. Free blocks are taken from the front of the free
list, so what goes in first is overwritten first; which end of the sequence should that be?

    block_table    the request's blocks, in order
    ref_cnt        {block: how many requests hold it}; change it
    free_list      free blocks, the next to be taken first; append to it
"""


def free_request(block_table: list[int], ref_cnt: dict[int, int], free_list: list[int]) -> None:
    raise NotImplementedError  # your turn
