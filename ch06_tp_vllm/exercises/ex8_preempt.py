"""Exercise 8: Preempt (20 minutes).

Read  ch06_tp_vllm/scheduler.py, _preempt; ch06_tp_vllm/request.py
Edit  this file
Test  python -m ch06_tp_vllm.exercises.check 8

Out of blocks: the newest running request goes back to the queue. Then it runs again. Two functions. A real
bug hides in the second one (nano-vllm #144, PR 211): a request that comes back has answers already, so "has
output tokens" is not "decodes".

    request                a dict: "prompt", "output" (token ids), "num_computed", "blocks" (its block table)
    preempt                the last of `running` goes to the head of `waiting`; its blocks go to `free_list`; its output stays
    tokens_of_next_step    the token ids that the request must feed in next, given num_computed
"""


def preempt(running: list[dict], waiting: list[dict], free_list: list[int]) -> None:
    raise NotImplementedError  # your turn


def tokens_of_next_step(request: dict) -> list[int]:
    raise NotImplementedError  # your turn
