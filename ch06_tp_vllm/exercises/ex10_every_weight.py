"""Exercise 10: No weight left behind (10 minutes).

Read  "Loading" in the chapter
Edit  this file
Test  python -m ch06_tp_vllm.exercises.check 10

A checkpoint whose names nobody recognises loads without an error and talks nonsense (nano-vllm #97). Compare
what the model needs with what the file has, before anything is read.

    needed, found    {name: shape}
    raises           ValueError whose text has the name of every missing and every unexpected tensor, and of every one
                     with a wrong shape that shape too; no name of a tensor that is as it should be

    needed {"a": (2, 3), "b": (2,)}, found {"a": (3, 2), "c": (1,)}: the text has b, c, a and (3, 2) in it
"""


def check_names(needed: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    raise NotImplementedError  # your turn
