"""Exercise 1: Match a prefix (25 minutes).

Read  "The radix tree" in the chapter; Zheng et al. 2024 (SGLang), section 3, figure 3
Edit  this file
Test  python -m ch07_sglang_radix.exercises.check 1

The radix tree in plain dicts, pages of one token. A node is a dict:

    "key", "slots"    token ids on the edge that leads to it, and as many KV slots; both empty at the root
    "children"        {first token of a child's key: the child}
    "parent"          a node; None at the root
    "lock_ref"        how many running requests have locked the path from here to the root

Two functions. `split` cuts an edge in two, n tokens and the rest, and returns the new node in the middle. Requests
keep a reference to `node` itself as the end of their locked path: which half must it be, and what is the lock of
the other? `match_prefix` finds the longest cached prefix of `tokens`; an edge that matches in part is split.

    n          0 < n < len(node["key"])
    tokens     token ids, perhaps none; stay as they are
    returns    split: the upper half; match_prefix: the slots of the prefix, and the node at which it ends

    a tree of 1 2 3 4 in the slots 40 .. 43: [1, 2, 9] matches the slots [40, 41], and ends at a new node 1 2, whose only
    child is the old node, now 3 4
"""


def split(node: dict, n: int) -> dict:
    raise NotImplementedError  # your turn


def match_prefix(root: dict, tokens: list[int]) -> tuple[list[int], dict]:
    raise NotImplementedError  # your turn
