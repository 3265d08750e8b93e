"""Exercise 5: Hash a block, find a prefix (30 minutes).

Read  ch06_tp_vllm/block_manager.py, hash_block and get_computed_blocks
Edit  this file
Test  python -m ch06_tp_vllm.exercises.check 5

Two functions. `block_hashes` names the full blocks of a prompt: two prompts have the same i-th hash exactly
if their first i + 1 blocks are the same. `computed_tokens` says how many tokens of a prompt need not be
computed, given the hashes in the cache. A real bug hides here: a prompt that is cached from end to end (nano-
vllm #144): what is left to take logits from?

    tokens     token ids
    cached     the hashes of blocks that lie in the cache
    returns    block_hashes: one value a full block; computed_tokens: a multiple of block_size
"""

from collections.abc import Hashable


def block_hashes(tokens: list[int], block_size: int) -> list[Hashable]:
    raise NotImplementedError  # your turn


def computed_tokens(tokens: list[int], cached: set[Hashable], block_size: int) -> int:
    raise NotImplementedError  # your turn
