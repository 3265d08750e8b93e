"""Exercise 10: Who goes back to the queue (10 minutes).

Read  "Retract" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.exercises.check 10

Decoding needs a page and none is to be had. Some requests must give theirs back and wait; prompt and output are
computed again later. Who loses least? Those with the fewest output tokens go first, of equals the longest prompt,
since that frees most. It goes on until there is room again; but the last request stays in any case, or nobody would
ever finish.

    running       the running requests, at least one: output_ids, prompt_ids; take out of this list who goes, the others
                  stay in their order
    lacks_room    () -> bool: do those in `running` still lack room? It looks at the list as it is now
    release       (req): gives back its pages
    returns       those that went, in the order in which they went

    outputs of 8, 2, 5 and 2 tokens, prompts of 9, 3, 6 and 8: the last goes first, then the second
"""

from collections.abc import Callable

from ch07_sglang_radix.request import Req


def retract(running: list[Req], lacks_room: Callable[[], bool], release: Callable[[Req], None]) -> list[Req]:
    raise NotImplementedError  # your turn
