"""Exercise 1: Layers for every stage (15 minutes).

Read  "Two stages" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.parallelism.exercises.check 1

A model of `layers` layers is to run on `stages` stages, one after the other. Every stage gets as many as the others, and where
that does not come out even the LAST stages get one more each: SGLang's rule. With more stages than layers one would have
nothing to do: raise ValueError.

`parts`, if not None, is the user's own list: so many layers for each stage. Raise ValueError if it is not one number of at least 1
for each stage, or does not sum up to `layers`.

Return [(first, end), ...] for stage 0, 1, ...: it has the layers first .. end - 1.

    7 layers, 3 stages              ->  [(0, 2), (2, 4), (4, 7)]
    7 layers, 3 stages, [3, 2, 2]   ->  [(0, 3), (3, 5), (5, 7)]
"""


def split(layers: int, stages: int, parts: list[int] | None = None) -> list[tuple[int, int]]:
    raise NotImplementedError  # your turn
