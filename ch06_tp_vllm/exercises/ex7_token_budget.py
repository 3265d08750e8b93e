"""Exercise 7: One budget of tokens (30 minutes).

Read  ch06_tp_vllm/scheduler.py, schedule
Edit  this file
Test  python -m ch06_tp_vllm.exercises.check 7

Give out a step's budget as vLLM V1 does. Running requests come first, in order, each with what it lacks (a
decode lacks one token, a prompt in chunks the rest of it); then waiting ones, in order. The last one gets
what is left, if that is less than it lacks.

    running, waiting    lists of (name, tokens it lacks)
    returns             [(name, tokens to compute)], in order, none with 0; together at most `budget`
"""


def give_out(running: list[tuple[str, int]], waiting: list[tuple[str, int]], budget: int) -> list[tuple[str, int]]:
    raise NotImplementedError  # your turn
