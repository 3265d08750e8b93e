"""Exercise 8: Preempt (15 minutes).

Read  "The scheduler" in the chapter; Kwon et al. 2023 (PagedAttention), section 4.5, recomputation
Edit  this file
Test  python -m ch06_tp_vllm.exercises.check 8

Out of blocks: the newest running request goes back to the queue. Then it runs again. Two functions. A real
bug hides in the second one (nano-vllm #144, PR 211): a request that comes back has answers already, so "has
output tokens" is not "decodes".

    request                a dict: "prompt", "output" (token ids), "num_computed" (so many of prompt and output have
                           their K and V in its blocks), "blocks" (its block table)
    preempt                the last of `running` goes to the head of `waiting`; its blocks, one by one, to the end of
                           `free_list`, and it has none; what was computed is lost, what it has put out is not
    tokens_of_next_step    the token ids that the request must feed in next: all that are not computed

    prompt [4, 5], output [7, 8]: with num_computed 3 it feeds in [8], with num_computed 0 all four
"""


def preempt(running: list[dict], waiting: list[dict], free_list: list[int]) -> None:
    raise NotImplementedError  # your turn


def tokens_of_next_step(request: dict) -> list[int]:
    raise NotImplementedError  # your turn
