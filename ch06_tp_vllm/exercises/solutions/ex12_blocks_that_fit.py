"""Solution of exercise 12: How many blocks fit."""


def num_blocks(
    free_bytes: list[int], block_size: int, num_layers: int, num_kv_heads: int, head_dim: int, bytes_each: int
) -> int:
    heads = max(1, num_kv_heads // len(free_bytes))
    block = 2 * num_layers * block_size * heads * head_dim * bytes_each  # K and V
    return min(free_bytes) // block  # a table of one rank must be true on all
