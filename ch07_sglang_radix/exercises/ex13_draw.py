"""Exercise 13: A draw that does not depend on the others (20 minutes).

Read  "One will" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.exercises.check 13

Rank 0 draws the tokens of a step. A request's text must not depend on who else is in the batch, nor on whether it was
sent back to the queue in between: so the n-th token of a request (n from 0) is drawn with the n-th random number of its own
seed. `draw` turns a number u in [0, 1) into a token: lay the weights on a line, token 0 first; u is that share of the way
along it; the token on whose piece the place lies is drawn, and a place between two pieces belongs to the second. Real engines
drew a token of weight 0 (its piece has no length), and a token V, which does not exist: a sum of 150,000 float32 numbers
is not what it should be, and a place computed in one precision may lie behind a line measured in another.

    weights    float32 [V], at least 0, not all of them 0; they need not sum to 1
    u          in [0, 1)
    seeds      [B], one a request; outputs: [B], how many tokens each has drawn already
    random     (seed, n) -> the n-th number of a seed, in [0, 1)
    returns    draw: a token id; draw_batch: one for each row of weights [B, V]

    weights [1, 0, 3]: u = 0.2 draws 0, u = 0.25 draws 2
"""

from collections.abc import Callable, Sequence

import numpy as np


def draw(weights: np.ndarray, u: float) -> int:
    raise NotImplementedError  # your turn


def draw_batch(
    weights: np.ndarray, seeds: Sequence[int], outputs: Sequence[int], random: Callable[[int, int], float]
) -> list[int]:
    raise NotImplementedError  # your turn
