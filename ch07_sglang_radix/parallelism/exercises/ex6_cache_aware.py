"""Exercise 6: The replica that has it (20 minutes).

Read  "Replicas behind one front" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.parallelism.exercises.check 6

Write what a cache-aware router does with a prompt, in two functions.

    sent   [(prompt, worker), ...], texts, oldest first: what was sent where so far. Nobody tells what has been evicted since
    loads  {worker: requests on their way}, of those that are alive, in their order; never empty

best_match(prompt, sent) -> (characters, worker): the longest common prefix of `prompt` with anything that was sent, and who was
sent it; of several the newest. Nothing in common: (0, None).

choose(prompt, sent, loads) -> worker:

    most - least requests > 64, and most > 1.5 * least    ->  the least loaded, wherever the prefix lies
    else: matched characters > 0.3 of the prompt's        ->  who was sent it, if it is alive
    else                                                  ->  the least loaded

The least loaded is the first of those with the fewest requests.

    best_match("You are a poet. Snow", [("You are a poet. Rain", "a"), ("You dance", "b")])   ->  (16, "a")
    choose("You are a poet. Snow", [("You are a poet. Rain", "a")], {"a": 9, "b": 0})         ->  "a"
"""


def best_match(prompt: str, sent: list[tuple[str, str]]) -> tuple[int, str | None]:
    raise NotImplementedError  # your turn


def choose(prompt: str, sent: list[tuple[str, str]], loads: dict[str, int]) -> str:
    raise NotImplementedError  # your turn
