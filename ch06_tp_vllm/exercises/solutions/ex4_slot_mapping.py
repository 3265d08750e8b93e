"""Solution of exercise 4: Slots of new tokens."""


def slot_mapping(block_table: list[int], start: int, stop: int, block_size: int) -> list[int]:
    return [block_table[i // block_size] * block_size + i % block_size for i in range(start, stop)]
