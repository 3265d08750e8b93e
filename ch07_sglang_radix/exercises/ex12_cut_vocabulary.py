"""Exercise 12: The best token of a vocabulary that is cut (15 minutes).

Read  "One will" in the chapter; Shoeybi et al. 2019 (Megatron-LM), section 3
Edit  this file
Test  python -m ch07_sglang_radix.exercises.check 12

Each rank has the logits of its part of the vocabulary: rank r those of the tokens r * share .. (r + 1) * share - 1. V need not
be a multiple of R, so the last columns are padding: they are no tokens, whatever stands in them (zeros, mostly, and a zero beats
every negative logit). Sending all logits to rank 0 costs V numbers a row. For a greedy step two are enough: each rank
offers its best token, rank 0 takes the best of the offers. It must be the token that argmax finds in the whole row, and of
equal logits argmax takes the first.

    logits        this rank's [B, share]; stay as they are
    vocab_size    V; share * R >= V. A rank may have nothing but padding
    offers        of all ranks, rank 0's first
    returns       offer: [(logit, token id in the whole vocabulary)], one a row; a rank without a token offers -inf
                  choose: [token id], one a row

    V = 5 on 3 ranks, shares [[1, 2]], [[2, -3]], [[-1, 0]]: the offers are [(2, 1)], [(2, 2)], [(-1, 4)], the token is 1
"""

import numpy as np


def offer(logits: np.ndarray, rank: int, vocab_size: int) -> list[tuple[float, int]]:
    raise NotImplementedError  # your turn


def choose(offers: list[list[tuple[float, int]]]) -> list[int]:
    raise NotImplementedError  # your turn
