"""Exercise 4: Blocks of one expert (25 minutes).

Read  "One layer, three forms" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.experts.exercises.check 4

A program of the fused kernel multiplies `block` rows by the matrices of one expert. So the rows are sorted by expert, and
those of each expert filled up to whole blocks. A row is named by its pair: token * k + choice, where k is the number of
experts that a token has. What fills up is the number T * k, one more than the last pair: it stands for no row.

`pad_to_blocks(chosen, num_experts, block)`: chosen[t] are the k experts of token t; -1 is one that another rank holds, and its
pair is in no block. Returns the pairs, block after block, and the expert of each block. Experts ascend, and so do the pairs of
an expert. An expert that nobody chose has no block.

    pad_to_blocks([[2, 0], [2, 1], [0, 2]], 3, 2)
        ->  ([1, 4, 3, 6, 0, 2, 5, 6], [0, 1, 2, 2])         6 = 3 tokens * 2: a place without a row

`mixture(x, weights, pairs, owners, experts)`: what the kernels do with it. x[t] is a token's row, here a single number;
weights[t] are its k weights; pairs and owners are what pad_to_blocks returned; experts[e] is a function of a row. Returns for
each token the sum over its choices of weight * expert(row); 0.0 for a token that has no pair here.

    mixture([10.0, 1.0], [[0.5], [2.0]], [1, 2, 0, 2], [0, 1], [lambda row: row + 1, lambda row: row * row])
        ->  [50.0, 4.0]                                      0.5 * 10 * 10 and 2 * (1 + 1)
"""

from collections.abc import Callable, Sequence


def pad_to_blocks(chosen: Sequence[Sequence[int]], num_experts: int, block: int) -> tuple[list[int], list[int]]:
    raise NotImplementedError  # your turn


def mixture(
    x: Sequence[float], weights: Sequence[Sequence[float]], pairs: Sequence[int], owners: Sequence[int],
    experts: Sequence[Callable[[float], float]],
) -> list[float]:  # fmt: skip
    raise NotImplementedError  # your turn
