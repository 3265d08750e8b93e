"""Exercise 7: The prompt that is cached from end to end (5 minutes).

Read  "The life of a request" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.exercises.check 7

Somebody asks the same question twice. All its K and V are in the pool; but the first token of the answer is drawn
from the logits of the last prompt token, and logits are not cached. A query of no tokens at all was a real crash
(nano-vllm #144). Which part of a prompt comes from the cache, and which is computed? As much as possible from the
cache, but computing goes on where a page begins: pages of the tree belong to others too and are never written to.

    tree       match_prefix(ids).slots: those of the longest cached prefix of ids, whole pages of tree.page_size tokens
    prompt     token ids, at least one
    returns    the slots of the cached part, whole pages; the tokens that must be computed, a list

    pages of 4, 0 .. 11 in the tree: of the prompt 0 .. 11 eight come from the cache, of 0 .. 12 twelve
"""

import numpy as np

from ch07_sglang_radix.radix_cache import RadixCache


def split_prompt(tree: RadixCache, prompt: list[int]) -> tuple[np.ndarray, list[int]]:
    raise NotImplementedError  # your turn
