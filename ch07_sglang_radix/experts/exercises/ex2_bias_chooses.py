"""Exercise 2: A bias chooses and never weighs (20 minutes).

Read  "A router chooses" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.experts.exercises.check 2

DeepSeek-V3 keeps its experts equally busy without a loss that would pull at the weights: each expert has a bias, which is
added to its score while experts are chosen, and at no other moment.

`choose(scores, bias, k, scaling)`: the k experts with the largest score + bias, best first (of two alike, the lower number).
Each counts its plain score, divided by the sum of the k plain scores, times `scaling`. Returns [(expert, weight), ...].

    choose([0.8, 0.6, 0.2], [0.0, 0.0, 0.9], 2, 2.5)   ->  [(2, 0.5), (0, 2.0)]      1.1, 0.8 and 0.6 choose; 0.2 and 0.8 weigh

`nudge(bias, load, step)`: what training does after each batch. Who had more tokens than the mean gets `step` less bias, who had
fewer gets `step` more, and who had just the mean keeps his: by the sign alone, however far off. Returns the new biases.

    nudge([0.5, 0.0, 0.0], [9, 4, 5], 0.25)            ->  [0.25, 0.25, 0.25]        the mean is 6
"""

from collections.abc import Sequence


def choose(scores: Sequence[float], bias: Sequence[float], k: int, scaling: float) -> list[tuple[int, float]]:
    raise NotImplementedError  # your turn


def nudge(bias: Sequence[float], load: Sequence[int], step: float) -> list[float]:
    raise NotImplementedError  # your turn
