"""Exercise 1: Softmax first, then the best (15 minutes).

Read  "A router chooses" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.experts.exercises.check 1

A router gives every expert a logit. Of a token's logits make the k experts it is sent to, best first, and what each of them
counts: softmax over ALL experts, then the k largest (of two alike, the lower number). With `normalise` the k weights are then
divided by their sum; without it they stay as they are, and do not sum to 1: what the token would have given to the other
experts is missing, and the model was trained so.

Logits may be large: e^1000 is no float. Subtract the largest logit from all of them first.

    logits   a float for each of E experts
    returns  [(expert, weight), ...], k of them

    route([log 5, log 3, log 2], 2, normalise=False)   ->  [(0, 0.5), (1, 0.3)]
    route([log 5, log 3, log 2], 2, normalise=True)    ->  [(0, 0.625), (1, 0.375)]
"""

from collections.abc import Sequence


def route(logits: Sequence[float], k: int, normalise: bool) -> list[tuple[int, float]]:
    raise NotImplementedError  # your turn
