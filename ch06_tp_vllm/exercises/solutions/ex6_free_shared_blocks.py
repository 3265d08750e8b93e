"""Solution of exercise 6: Free what several requests hold."""


def free_request(block_table: list[int], ref_cnt: dict[int, int], free_list: list[int]) -> None:
    for block in reversed(block_table):  # the tail first: another prompt is less likely to share it than the head
        ref_cnt[block] -= 1
        if ref_cnt[block] == 0:
            free_list.append(block)
