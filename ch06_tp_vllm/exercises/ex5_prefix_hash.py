"""Exercise 5: Name a block, find a prefix (25 minutes).

Read  "Blocks" in the chapter; vLLM's design document "Automatic Prefix Caching"
Edit  this file
Test  python -m ch06_tp_vllm.exercises.check 5

Two functions. `block_hashes` names the full blocks of a prompt. Whoever finds a name believes that the K and V behind
it are his: so two blocks, of any two prompts, have the same name exactly if they hold the same tokens behind the same
beginning. Any value that can be in a set will do. `computed_tokens` says how many tokens of a prompt need not be
computed, given the names in the cache: whole blocks from the first one on, without a gap. A real bug hides here: a
prompt that is cached from end to end (nano-vllm #144): what is left to take logits from?

    tokens     token ids
    cached     the names of blocks that lie in the cache
    returns    block_hashes: one value a full block; computed_tokens: a multiple of block_size, less than len(tokens)

    blocks of 2: [1, 2, 3, 4, 5] has two names; the first is also that of [1, 2, 9, 9], neither is one of [3, 4, 1, 2]
    blocks of 2, everything in the cache: 4 of [1, 2, 3, 4, 5] need not be computed, and 2 of [1, 2, 3, 4]
"""

from collections.abc import Hashable


def block_hashes(tokens: list[int], block_size: int) -> list[Hashable]:
    raise NotImplementedError  # your turn


def computed_tokens(tokens: list[int], cached: set[Hashable], block_size: int) -> int:
    raise NotImplementedError  # your turn
