"""Exercise 6: A head that knows fewer words (15 minutes).

Read  "Who guesses" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.speculative.exercises.check 6

An LM head over 150,000 tokens is most of what a small drafter would read, and nearly all that it ever says are a few thousand
of them. So EAGLE-3's head has rows for these alone. Row i of it is "draft id" i; which token of the target that is, the
checkpoint's tensor d2t says, and it does so by OFFSETS: target id = draft id + d2t[draft id].

`offsets(vocabulary)`: d2t of a head whose draft id i is token vocabulary[i] of the target.

    offsets([0, 3, 4, 9])                         ->  [0, 2, 2, 6]

`best(parts, d2t)`: the head is cut over ranks, rank r has as many rows as any other and begins where rank r-1 ends. parts[r] are
its logits for one token; the last rank may have some more than there are draft ids, which are padding and nobody's token.
The target's id of the token with the largest logit; of equal ones that with the smallest id.

    best([[0.1, 0.7], [0.9, 0.2]], [0, 2, 2, 6])  ->  4         draft id 2, the first row of rank 1
    best([[0.1, 0.7], [0.2, 5.0]], [0, 2, 2])     ->  3         5.0 is padding
"""

from collections.abc import Sequence


def offsets(vocabulary: Sequence[int]) -> list[int]:
    raise NotImplementedError  # your turn


def best(parts: Sequence[Sequence[float]], d2t: Sequence[int]) -> int:
    raise NotImplementedError  # your turn
