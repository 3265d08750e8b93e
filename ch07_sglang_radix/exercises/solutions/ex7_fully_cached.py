"""Solution of exercise 7: The prompt that is cached from end to end."""

import numpy as np

from ch07_sglang_radix.radix_cache import RadixCache


def split_prompt(tree: RadixCache, prompt: list[int]) -> tuple[np.ndarray, list[int]]:
    slots = tree.match_prefix(prompt[:-1]).slots  # the cap first: the tree then floors to whole pages
    return slots, prompt[len(slots) :]
