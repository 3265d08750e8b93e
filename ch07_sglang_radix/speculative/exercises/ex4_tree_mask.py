"""Exercise 4: Who sees whom (15 minutes).

Read  "A tree and its mask" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.speculative.exercises.check 4

The nodes of a tree are fed in side by side, in one step. Node 0 is the last token that is known; each other node guesses what
follows its parent. A parent has a smaller number than its children.

`tree_mask(parents)`: which nodes each node attends to, [N][N] of bool: those whose tokens would stand before it in the text, if it
were the text, and itself. Not its siblings, nor their children: they are other texts.

`seen(parents, cached, node)`: the slots that a node attends to, ascending. The sequence has `cached` tokens in the slots 0 ..
cached-1; node i lies in slot cached + i.

    parents = [-1, 0, 0, 1]        0 ─┬─ 1 ── 3
                                      └─ 2
    tree_mask(parents)[2]    ->  [True, False, True, False]
    seen(parents, 3, 3)      ->  [0, 1, 2, 3, 4, 6]
"""

from collections.abc import Sequence


def tree_mask(parents: Sequence[int]) -> list[list[bool]]:
    raise NotImplementedError  # your turn


def seen(parents: Sequence[int], cached: int, node: int) -> list[int]:
    raise NotImplementedError  # your turn
