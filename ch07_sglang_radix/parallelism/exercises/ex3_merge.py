"""Exercise 3: One answer out of parts (25 minutes).

Read  "A context over several ranks" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.parallelism.exercises.check 3

Attention over some of the keys is o = sum of e^score * value / sum of e^score, over these keys alone. Whoever computed it kept
the log of the sum it divided by: lse = log of the sum of e^score. From any number of such parts, whose keys do not overlap,
make what attention over all of their keys would have given: its o, and its lse.

Scores may be large: e^1000 is no float. Subtract the largest lse from all of them first. A part that had no keys has lse -inf,
and what stands in its o, nan perhaps, counts for nothing. If no part had any, o is all zeros and lse is -inf.

    parts     [(o, lse), ...], at least one; each o a list of d floats
    returns   (o, lse)

    [([10.0], log 1), ([40.0], log 2)]     ->  ([30.0], log 3)
    [([30.0], log 10), ([nan], -inf)]      ->  ([30.0], log 10)
"""


def merge(parts: list[tuple[list[float], float]]) -> tuple[list[float], float]:
    raise NotImplementedError  # your turn
