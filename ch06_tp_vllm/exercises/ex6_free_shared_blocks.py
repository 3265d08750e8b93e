"""Exercise 6: Free what several requests hold (10 minutes).

Read  "Blocks" in the chapter; Kwon et al. 2023 (PagedAttention), section 4.4
Edit  this file
Test  python -m ch06_tp_vllm.exercises.check 6

A request ends. Some of its blocks are held by others too. Free blocks are taken from the front of the free
list, so what goes in first is overwritten first; which end of the sequence should that be?

    block_table    the request's blocks, in order; stays as it is
    ref_cnt        {block: how many requests hold it}; change it
    free_list      free blocks, the next to be taken first; append to it

    block_table [4, 7, 2], ref_cnt {4: 2, 7: 1, 2: 1}: afterwards {4: 1, 7: 0, 2: 0}; 4 is not free
"""


def free_request(block_table: list[int], ref_cnt: dict[int, int], free_list: list[int]) -> None:
    raise NotImplementedError  # your turn
