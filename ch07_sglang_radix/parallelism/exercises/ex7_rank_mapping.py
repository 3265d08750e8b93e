"""Exercise 7: A seat for every rank (15 minutes).

Read  "The world as a table" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.parallelism.exercises.check 7

Hosts of `node_size` GPUs are to hold `stages` stages of `tp` ranks each; ranks of stage s are s*tp .. s*tp + tp - 1. Inside a
host messages are fast, between hosts they are slow, and the ranks of one stage talk in every layer. So:

    a stage that fits into one host stays inside one: it never straddles two, even if GPUs stay empty for that
    a host takes as many whole stages as fit, in order
    a stage larger than a host fills whole hosts; where it cannot, raise ValueError

Return [(host, GPU), ...], both from 0, for rank 0, 1, 2, ...

    tp 2, 3 stages, hosts of 4   ->  [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    tp 3, 2 stages, hosts of 4   ->  [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
"""


def seats(tp: int, stages: int, node_size: int) -> list[tuple[int, int]]:
    raise NotImplementedError  # your turn
