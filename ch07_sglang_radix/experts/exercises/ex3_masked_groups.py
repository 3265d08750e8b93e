"""Exercise 3: Only from the best groups (20 minutes).

Read  "A router chooses" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.experts.exercises.check 3

Experts of one group lie on one machine. A token that may choose from few groups travels to few machines, so DeepSeek's routers
first choose groups, and then experts in these alone.

`choose(scores, groups, chosen, k)`: the E experts lie in `groups` groups of equally many neighbours: of 6 experts in 3 groups, 0 1,
2 3, 4 5. A group counts as much as its two best experts together. The `chosen` best groups are looked at, and of their
experts the k with the largest scores are taken. Of two groups or experts alike the lower number is first.

The scores have a bias in them already, and may be below zero: an expert of another group must not win for being 0.

    scores   a float for each of E experts
    returns  k numbers of experts, best first

    choose([9, 1,  6, 5,  0, 0], groups=3, chosen=1, k=2)     ->  [2, 3]       10, 11 and 0: the group without the best expert
    choose([-4, -2,  -8, -9], groups=2, chosen=1, k=2)        ->  [1, 0]
"""

from collections.abc import Sequence


def choose(scores: Sequence[float], groups: int, chosen: int, k: int) -> list[int]:
    raise NotImplementedError  # your turn
