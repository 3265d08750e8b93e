"""Exercise 7: One budget of tokens (15 minutes).

Read  "The scheduler" in the chapter; Agrawal et al. 2024 (Sarathi-Serve), section 4
Edit  this file
Test  python -m ch06_tp_vllm.exercises.check 7

Give out a step's budget as vLLM V1 does. Running requests come first, in order, each with what it lacks (a
decode lacks one token, a prompt in chunks the rest of it); then waiting ones, in order. The last one gets
what is left, if that is less than it lacks.

    running, waiting    lists of (name, tokens it lacks, at least 1); they stay as they are
    returns             [(name, tokens to compute)], in order, none with 0; together as many as `budget` allows

    running [("a", 1)], waiting [("c", 10), ("d", 4)], budget 8: [("a", 1), ("c", 7)]
"""


def give_out(running: list[tuple[str, int]], waiting: list[tuple[str, int]], budget: int) -> list[tuple[str, int]]:
    raise NotImplementedError  # your turn
