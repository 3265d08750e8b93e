"""Solution of exercise 8: Preempt."""


def preempt(running: list[dict], waiting: list[dict], free_list: list[int]) -> None:
    request = running.pop()
    free_list.extend(reversed(request["blocks"]))
    request["blocks"], request["num_computed"] = [], 0
    waiting.insert(0, request)  # it came before all that wait


def tokens_of_next_step(request: dict) -> list[int]:
    return (request["prompt"] + request["output"])[request["num_computed"] :]
